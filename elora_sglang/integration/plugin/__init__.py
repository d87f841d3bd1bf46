"""How ELORA gets into SGLang: entry point, flags, refusals, hooks and their verification."""

from elora_sglang.integration.plugin.entry import register

__all__ = ["register"]
