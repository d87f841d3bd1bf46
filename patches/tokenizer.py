"""The tokenizer process, which is the launcher: adapters by name, and what cannot be done while serving."""

from elora_sglang.patches.base import Kind, Patch, Process

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/"
_OPENAI = "sglang.srt.entrypoints.openai"
_ADAPTERS = "elora_sglang.integration.adapters"
_NAME_RULES = "SGLang rejects unknown model names and serves adapters by their bare names"

PATCHES = (
    Patch(
        name="tokenizer_manager",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager",
        kind=Kind.REPLACE,
        hook=f"{_ADAPTERS}.tokenizer.EloraTokenizerManager",
        why="names point to versions of adapters, an unloaded name stays so, and what the pool forbids is refused",
        upstream=_SOURCE + "managers/tokenizer_manager.py",
        remove_when="SGLang's registry has versions, unloading is final, and a plugin may refuse a control request",
        process=Process.TOKENIZER,
    ),
    Patch(
        name="tokenizer_start",
        target="sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.adapters.tokenizer.at_tokenizer_start",
        why="notices a tokenizer manager of another class before the server answers",
        upstream=_SOURCE + "entrypoints/engine.py",
        remove_when="SGLang lets a plugin ask for failing hooks to be fatal",
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_start_versions",
        target="sglang.srt.arg_groups.lora_hook.check_lora_server_args",
        kind=Kind.AROUND,
        hook=f"{_ADAPTERS}.at_start.version_start_adapters",
        why="adapters of --lora-paths are checked before anything starts, and identified by their content",
        upstream="https://github.com/sgl-project/sglang/issues/25351",
        remove_when="SGLang identifies adapters by content",
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_names_openai",
        target=f"{_OPENAI}.serving_base.OpenAIServingBase._resolve_lora_path",
        kind=Kind.AROUND,
        hook=f"{_ADAPTERS}.names_hooks.resolve_lora_path",
        why="a bare adapter name selects the adapter; stock answers from the base model, silently",
        upstream=_SOURCE + "entrypoints/openai/serving_base.py",
        remove_when=_NAME_RULES,
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_names_openai_errors",
        target=f"{_OPENAI}.serving_base.OpenAIServingBase.handle_request",
        kind=Kind.AROUND,
        hook=f"{_ADAPTERS}.names_hooks.handle_request",
        why="unknown names are a 404 in OpenAI's shape, also where the API knows no adapters",
        upstream=_SOURCE + "entrypoints/openai/serving_base.py",
        remove_when=_NAME_RULES,
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_names_responses",
        target=f"{_OPENAI}.serving_responses.OpenAIServingResponses._validate_model",
        kind=Kind.AROUND,
        hook=f"{_ADAPTERS}.names_hooks.validate_responses_model",
        why="/v1/responses accepts an adapter's name and answers from the base model; here it is an error",
        upstream=_SOURCE + "entrypoints/openai/serving_responses.py",
        remove_when="/v1/responses serves adapters",
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_names_ollama",
        target="sglang.srt.entrypoints.ollama.serving.OllamaServing",
        kind=Kind.REPLACE,
        hook=f"{_ADAPTERS}.names_hooks.EloraOllamaServing",
        why="the Ollama API ignores the model name and answers from the base model",
        upstream=_SOURCE + "entrypoints/ollama/serving.py",
        remove_when="the Ollama API serves adapters",
        process=Process.TOKENIZER,
    ),
)
