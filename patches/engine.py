"""``sglang.Engine``: it takes ``elora=True, elora_policy=…``, and its forked schedulers are ELORA's, too."""

from elora_sglang.patches.base import Kind, Patch, Process, When

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/entrypoints/engine.py"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"

PATCHES = (
    Patch(
        name="engine_arguments",
        target=f"{_ENGINE}.server_args_class",
        kind=Kind.ATTRIBUTE,
        hook="elora_sglang.integration.plugin.launch.engine_arguments",
        why="ServerArgs would reject the keywords elora and elora_*",
        upstream=_SOURCE,
        remove_when="SGLang lets a plugin declare server arguments",
        process=Process.MAIN,
        when=When.ALWAYS,
    ),
    Patch(
        name="engine_schedulers",
        target=f"{_ENGINE}.run_scheduler_process_func",
        kind=Kind.ATTRIBUTE,
        hook="elora_sglang.integration.plugin.launch.engine_schedulers",
        why="a forked scheduler inherits the mark that plugins were loaded, and would get no hooks",
        upstream=_SOURCE,
        remove_when="SGLang loads plugins in a forked scheduler process",
        process=Process.MAIN,
        when=When.ALWAYS,
    ),
)
