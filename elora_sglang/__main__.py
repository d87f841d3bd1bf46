"""``python -m elora_sglang COMMAND``."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the package and return its exit status."""
    from elora_sglang import doctor

    parser = argparse.ArgumentParser(prog="python -m elora_sglang", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor.add_command(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
