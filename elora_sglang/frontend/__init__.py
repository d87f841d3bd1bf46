"""``lora_path`` for SGLang frontend programs: ``import elora_sglang.frontend``, and

    sgl.gen("query", lora_path="sql")                       # or select, gen_int, gen_string
    program.run(question, lora_path="sql")                  # default of one run
    program.run_batch([{"question": q, "lora_path": "sql"}, ...])
    program.bind(lora_path="sql")
    sgl.RuntimeEndpoint(url, lora_path="sql")               # default of a backend; sgl.OpenAI as well

The nearest one wins; ``BASE`` names the base model where a default would choose an adapter. The import puts
the hooks in place; programs that never say ``lora_path`` send the same bytes as without it.
"""

from elora_sglang.frontend.adapters import BASE, LoraPath
from elora_sglang.frontend.hooks import install, is_installed, uninstall

__all__ = ["BASE", "LoraPath", "install", "is_installed", "uninstall"]

install()
