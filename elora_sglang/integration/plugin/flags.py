"""The command line: ``--elora`` and ``--elora-*``, and the page ``docs/flags.md``.

The flags are the fields of :class:`~elora_sglang.integration.plugin.config.EloraConfig`; the page comes from them, from
the table of LoRA flags and from the table of refusals. ``python -m elora_sglang.integration.plugin.flags --write``
writes it, ``--check`` compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from elora_sglang.integration.plugin import config, flags_lora, refusals, refusals_control

PAGE = Path(__file__).resolve().parents[3] / "docs" / "flags.md"


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``: the argument group; ``--lora-backend elora`` becomes a choice."""
    group = parser.add_argument_group("ELORA", "LoRA adapters and KV caches in one pool (elora-sglang)")
    for field in dataclasses.fields(config.EloraConfig):
        flag, text = config.flag_of(field.name), field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(flag, action="store_true", help=text)
        else:
            is_policy = field.name == "policy"
            choices = config.policy_names() if is_policy else field.metadata["choices"]
            group.add_argument(
                flag,
                type=config.policy_file if is_policy else type(field.default),
                default=None,
                choices=choices or None,
                help=f"{text} Default: {_default(field)}.",
            )
    for action in parser._actions:
        if action.dest == "lora_backend" and action.choices is not None:
            action.choices = [*action.choices, "elora"]


def _default(field: dataclasses.Field[Any]) -> str:
    """A field's default as the help and the page show it."""
    if field.default is False:
        return "off"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default) or "none"


def from_cli_args(result: Any, cls: type, args: argparse.Namespace) -> Any:
    """AFTER ``ServerArgs.from_cli_args``: attach the config; exits with one line on a bad combination."""
    from elora_sglang.integration.plugin import launch as engine
    from elora_sglang.integration.plugin import verify

    names = [config.destination_of(field.name) for field in dataclasses.fields(config.EloraConfig)]
    try:
        settings = config.from_keywords({name: getattr(args, name, None) for name in names})
    except ValueError as error:
        raise verify.Refused(str(error)) from error
    return engine.apply_settings(result, settings)


def page() -> str:
    """The text of ``docs/flags.md``."""
    lines = [
        "# Flags",
        "",
        "Generated from the tables in `elora_sglang/integration/` by",
        "`python -m elora_sglang.integration.plugin.flags --write`; do not edit.",
        "",
        "## ELORA's own",
        "",
        '`--elora` alone is enough. In Python: `sglang.Engine(model_path=…, elora=True, elora_policy="lru")`.',
        "",
        "| flag | default | what it does |",
        "|---|---|---|",
    ]
    for field in dataclasses.fields(config.EloraConfig):
        default = _default(field)
        default = default if default in ("off", "none") else f"`{default}`"
        lines.append(f"| `{config.flag_of(field.name)}` | {default} | {field.metadata['help']} |")
    lines += [
        "",
        "## SGLang's LoRA flags with `--elora`",
        "",
        "| flag | with `--elora` | effect |",
        "|---|---|---|",
    ]
    lines += [f"| `{row.flag}` | {row.verdict.value} | {row.effect} |" for row in flags_lora.LORA_FLAGS]
    lines += [
        "",
        "## Refused at start-up",
        "",
        "The server exits with one line that says so, and with a status other than 0.",
        "",
        "| not together with `--elora` | instead |",
        "|---|---|",
    ]
    lines += [f"| {row.flag} | {row.advice} |" for row in (*refusals.FLAGS, *refusals.MODELS)]
    lines += [
        "",
        "## Refused while serving",
        "",
        "With status 400 and this line; nothing else is disturbed.",
        "",
        "- `/update_weights_from_{disk,tensor,distributed,ipc}`, `/begin_weight_update`: "
        f"{refusals_control.WEIGHTS}.",
        f"- `/release_memory_occupation`, `/resume_memory_occupation`: {refusals_control.MEMORY}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """``--write`` or ``--check`` the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m elora_sglang.integration.plugin.flags", description=__doc__
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    if parser.parse_args(arguments).write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(
            f"{PAGE.name} is not current; run python -m elora_sglang.integration.plugin.flags --write",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
