"""``patches/README.md`` and ``patches/targets.json``, made from the records.

``python -m elora_sglang.patches.table --check`` compares both with the records and the installed SGLang,
``--write`` writes the table, ``--refresh`` also reads every target again and stores its fingerprint. Read the
difference of each target before you refresh. ``--count`` prints how many records there are.
"""

from __future__ import annotations

import argparse
import sys

from elora_sglang.patches.base import (
    FOLDER,
    MANIFEST,
    Patch,
    discover,
    manifest,
    serving,
    touched,
    write_manifest,
)

PAGE = FOLDER / "README.md"

_HEAD = """# Patches

Every place where ELORA touches SGLang. Nothing on disk is patched: the records in this folder are applied in
memory by SGLang's own plugin registries, and with `--elora` each is verified in place or the server refuses to
start. Without `--elora` only the records of *always* are applied. Those of *client* never touch a server: they are
for programs that import `elora_sglang.frontend`, and checked by that import.

A class is replaced by a subclass of ours where SGLang builds it by name (*replace*): the scheduler, the tokenizer
manager, the LoRA manager and its pool, the Ollama API. Each member that such a class overrides is in `targets.json`,
too: its parameters are compared at start, and another plugin that replaces one is noticed. Functions are hooked only
where no subclass reaches.

The *client* records are many because they cannot be subclasses. A program is made by `@sgl.function`, and a backend
by its constructor, often before `import elora_sglang.frontend` runs; `run`, `gen` and their kin are functions that
programs have imported by name. A class put in the place of SGLang's would miss every object that exists already.
So each method is wrapped where it is, and `uninstall()` takes all of them back.

Generated from the records; do not edit. After adding a record or upgrading SGLang:

```
python -m elora_sglang.patches.table --refresh   # read every target again, then write this page
python -m elora_sglang.patches.table --count     # how many records there are
python -m elora_sglang doctor                    # every record against the installed SGLang
```

To add one: a file here that defines `PATCH` or `PATCHES`, a hook in `elora_sglang/integration/`, `--refresh`, and
a test in `tests/patches/`. Many files, because each holds the records of one part of SGLang, and a file is found by
being here.

| patch | target | kind | where | when | why | until |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The text of ``patches/README.md``."""
    return _HEAD + "".join(_row(patch) for patch in discover())


def _row(patch: Patch) -> str:
    target = patch.target.removeprefix("sglang.srt.")
    if patch.key:
        target += f'("{patch.key}")'
    cells = (
        f"`{patch.name}`",
        f"[`{target}`]({patch.upstream})",
        patch.kind.value,
        patch.process.value,
        patch.when.value,
        patch.why,
        patch.remove_when,
    )
    return "| " + " | ".join(cells) + " |\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elora_sglang.patches.table", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--refresh", action="store_true")
    mode.add_argument(
        "--count", action="store_true", help="print the number of records, and of those that serve"
    )
    chosen = parser.parse_args(arguments)
    if chosen.count:
        records = discover()
        print(f"{len(serving(records))} serving records with --elora, {len(records)} in all")
        return 0
    if chosen.refresh:
        write_manifest(discover())
    if chosen.refresh or chosen.write:
        PAGE.write_text(page())
        return 0
    stale = [] if PAGE.exists() and PAGE.read_text() == page() else [PAGE.name]
    stale += [MANIFEST.name] if set(manifest()) != {name for p in discover() for name in touched(p)} else []
    if stale:
        print(
            f"{', '.join(stale)}: not current; run python -m elora_sglang.patches.table --refresh",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
