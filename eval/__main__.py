"""Entry point of ``python -m elora_sglang.eval``."""

from elora_sglang.eval.cli import main

raise SystemExit(main())
