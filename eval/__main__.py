"""Entry point of ``python -m elora_sglang.eval``."""

from elora_sglang.eval.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
