"""``lora_path`` in SGLang's frontend language; installed in client processes by ``elora_sglang.frontend``."""

from elora_sglang.patches.base import Kind, Patch, Process, When

_FILES = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/lang/"


def _around(name: str, target: str, hook: str, why: str) -> Patch:
    """A client-side record; ``target`` is below ``sglang.lang``, ``hook`` below ``elora_sglang.frontend``."""
    module = next(m for m in _MODULES if target.startswith(m + "."))
    return Patch(
        name=f"frontend_{name}",
        target=f"sglang.lang.{target}",
        kind=Kind.AROUND,
        hook=f"elora_sglang.frontend.{hook}",
        why=why,
        upstream=f"{_FILES}{module.replace('.', '/')}.py",
        remove_when="SGLang's frontend language knows adapters",
        process=Process.CLIENT,
        when=When.FRONTEND,
    )


_MODULES = ("api", "ir", "interpreter", "backend.runtime_endpoint", "backend.openai")
_EXECUTOR = "interpreter.StreamExecutor"
_ENDPOINT = "backend.runtime_endpoint.RuntimeEndpoint"
_OPENAI = "backend.openai.OpenAI"

PATCHES = (
    _around("gen", "api.gen", "expressions.with_lora_path", "takes lora_path"),
    _around("gen_int", "api.gen_int", "expressions.with_lora_path", "takes lora_path"),
    _around("gen_string", "api.gen_string", "expressions.with_lora_path", "takes lora_path"),
    _around("select", "api.select", "expressions.with_lora_path", "takes lora_path"),
    _around("bind", "ir.SglFunction.bind", "programs.bind", "takes lora_path as the program's default"),
    _around("run_batch", "ir.SglFunction.run_batch", "programs.run_batch", "takes lora_path for all rows"),
    _around("trace", "ir.SglFunction.trace", "programs.trace", "lora_path is no argument of the function"),
    _around(
        "run_program",
        "interpreter.run_program",
        "programs.run_program",
        "takes the default of run() or a row",
    ),
    _around(
        "run_program_batch",
        "interpreter.run_program_batch",
        "programs.run_program_batch",
        "checks all rows before the first runs",
    ),
    _around(
        "cache_program",
        "interpreter.cache_program",
        "prefixes.cache_program",
        "the common prefix is computed with the adapters that will use it",
    ),
    _around("submit", f"{_EXECUTOR}.submit", "executor.submit", "refuses where the program asks, not later"),
    _around("execute_gen", f"{_EXECUTOR}._execute_gen", "executor.execute", "remembers what gen asked for"),
    _around(
        "execute_select",
        f"{_EXECUTOR}._execute_select",
        "executor.execute",
        "remembers what select asked for",
    ),
    _around("fork", f"{_EXECUTOR}.fork", "executor.fork", "forks know the adapter used last"),
    _around(
        "join",
        f"{_EXECUTOR}._execute_concatenate_and_append_kv_cache",
        "executor.join",
        "KV of different adapters is not concatenated; the text is",
    ),
    _around("endpoint", f"{_ENDPOINT}.__init__", "backends.with_default", "takes lora_path for all programs"),
    _around(
        "endpoint_payload",
        f"{_ENDPOINT}._add_images",
        "backends.add_lora_path",
        "every /generate request of a program passes here: generate, stream, select, commit",
    ),
    _around(
        "endpoint_prefix",
        f"{_ENDPOINT}.cache_prefix",
        "prefixes.cache_prefix",
        "the one /generate request that knows no program",
    ),
    _around("openai", f"{_OPENAI}.__init__", "backends.with_default", "takes lora_path for all programs"),
    _around("openai_generate", f"{_OPENAI}.generate", "backends.openai_generate", "model is BASE:ADAPTER"),
    _around("openai_stream", f"{_OPENAI}.generate_stream", "backends.openai_call", "model is BASE:ADAPTER"),
    _around("openai_select", f"{_OPENAI}.select", "backends.openai_call", "model is BASE:ADAPTER"),
    _around(
        "openai_role_end",
        f"{_OPENAI}.role_end_generate",
        "backends.openai_role_end",
        "the delayed request of API speculation goes to the adapter of its gens",
    ),
)
