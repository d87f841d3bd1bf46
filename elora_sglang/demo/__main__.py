"""``python -m elora_sglang.demo OUT_DIR``: write the demo base model and its adapters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from elora_sglang.demo.build import DemoError, build


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build, and say where things are. 0, or 1 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m elora_sglang.demo",
        description="Write a small Llama base model and LoRA adapters for it (about a minute; once).",
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="folder to write, or to leave alone when complete"
    )
    parser.add_argument("--adapters", type=int, default=16, help="how many adapters (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    args = parser.parse_args(argv)
    try:
        manifest = build(
            args.out, count=args.adapters, seed=args.seed, say=lambda line: print(line, flush=True)
        )
    except (DemoError, ValueError, OSError) as error:
        print(f"elora demo: {error}", file=sys.stderr)
        return 1
    print(f"demo: model {args.out / manifest['model']}, {len(manifest['adapters'])} adapters beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
