"""The command line: the only hooks that are in place without ``--elora``."""

from elora_sglang.patches.base import Kind, Patch, Process, When

PATCHES = (
    Patch(
        name="cli_arguments",
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.plugin.flags.add_cli_args",
        why="adds the argument group --elora, --elora-* to the parser",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/server_args.py",
        remove_when="SGLang lets a plugin declare server arguments",
        process=Process.MAIN,
        when=When.ALWAYS,
    ),
    Patch(
        name="cli_config",
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.plugin.flags.from_cli_args",
        why="attaches EloraConfig to the server arguments, so that it travels to the scheduler processes",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/server_args.py",
        remove_when="SGLang lets a plugin declare server arguments",
        process=Process.MAIN,
        when=When.ALWAYS,
    ),
)
