"""Adapters load, are replaced and unload while serving, and how requests name them: the tokenizer process."""

from elora_sglang.patches.base import Kind, Patch, Process

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/"
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
_OPENAI = "sglang.srt.entrypoints.openai"
_OLLAMA = "sglang.srt.entrypoints.ollama.serving.OllamaServing"
_LIFECYCLE = "elora_sglang.integration.adapters.tokenizer_side"
_NAMES = "elora_sglang.integration.adapters.names_hooks"

_CONTROL_METHODS = {
    "load_lora_adapter": "loading over a name replaces it; a broken adapter is refused with file and fault",
    "load_lora_adapter_from_tensors": "the same for tensors in the request; nothing but tensors is unpickled",
    "unload_lora_adapter": "unloading waits for the adapter's own requests and blocks nobody else",
}

_NAME_RULES = "SGLang rejects unknown model names and serves adapters by their bare names"

PATCHES = (
    Patch(
        name="adapter_start_versions",
        target="sglang.srt.arg_groups.lora_hook.check_lora_server_args",
        kind=Kind.AROUND,
        hook="elora_sglang.integration.adapters.at_start.version_start_adapters",
        why="adapters of --lora-paths are checked before anything starts, and identified by their content",
        upstream="https://github.com/sgl-project/sglang/issues/25351",
        remove_when="SGLang identifies adapters by content",
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_registry",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.init_lora",
        kind=Kind.AFTER,
        hook=f"{_LIFECYCLE}.install",
        why="names point to versions, and an unloaded name stays so; stock reloads it on the next request",
        upstream=_SOURCE + "managers/tokenizer_manager.py",
        remove_when="SGLang's registry has versions and unloading is final",
        process=Process.TOKENIZER,
    ),
    *(
        Patch(
            name=f"adapter_{method}",
            target=f"{_CONTROL}.{method}",
            kind=Kind.AROUND,
            hook=f"{_LIFECYCLE}.{method}",
            why=why,
            upstream=_SOURCE + "managers/tokenizer_control_mixin.py",
            remove_when="SGLang's registry has versions and unloading is final",
            process=Process.TOKENIZER,
        )
        for method, why in _CONTROL_METHODS.items()
    ),
    Patch(
        name="adapter_names_openai",
        target=f"{_OPENAI}.serving_base.OpenAIServingBase._resolve_lora_path",
        kind=Kind.AROUND,
        hook=f"{_NAMES}.resolve_lora_path",
        why="a bare adapter name selects the adapter; stock answers from the base model, silently",
        upstream=_SOURCE + "entrypoints/openai/serving_base.py",
        remove_when=_NAME_RULES,
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_names_openai_errors",
        target=f"{_OPENAI}.serving_base.OpenAIServingBase.handle_request",
        kind=Kind.AROUND,
        hook=f"{_NAMES}.handle_request",
        why="unknown names are a 404 in OpenAI's shape, also where the API knows no adapters",
        upstream=_SOURCE + "entrypoints/openai/serving_base.py",
        remove_when=_NAME_RULES,
        process=Process.TOKENIZER,
    ),
    Patch(
        name="adapter_id_from_client",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora",
        kind=Kind.BEFORE,
        process=Process.TOKENIZER,
        hook="elora_sglang.integration.adapters.names_hooks.forget_client_id",
        why="a client may put an internal adapter id into its request, past every rule about names",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/managers/io_struct.py",
        remove_when="SGLang stops taking lora_id from clients",
    ),
    Patch(
        name="adapter_names_responses",
        target=f"{_OPENAI}.serving_responses.OpenAIServingResponses._validate_model",
        kind=Kind.AROUND,
        hook=f"{_NAMES}.validate_responses_model",
        why="/v1/responses accepts an adapter's name and answers from the base model; here it is an error",
        upstream=_SOURCE + "entrypoints/openai/serving_responses.py",
        remove_when="/v1/responses serves adapters",
        process=Process.TOKENIZER,
    ),
    *(
        Patch(
            name=f"adapter_names_per_prompt_{kind.lower()}",
            target=f"sglang.srt.managers.io_struct.{kind}ReqInput.normalize_batch_and_arguments",
            kind=Kind.AROUND,
            hook=f"{_NAMES}.normalize_request",
            why="lora_path as a list for one prompt ends stock's scheduler process; here it is one name or a 400",
            upstream=_SOURCE + "managers/io_struct.py",
            remove_when="SGLang checks the length of lora_path against the prompts",
            process=Process.TOKENIZER,
        )
        for kind in ("Generate", "Embedding")
    ),
    *(
        Patch(
            name=f"adapter_names_ollama_{route}",
            target=f"{_OLLAMA}.handle_{route}",
            kind=Kind.AROUND,
            hook=f"{_NAMES}.handle_ollama",
            why="the Ollama API ignores the model name and answers from the base model",
            upstream=_SOURCE + "entrypoints/ollama/serving.py",
            remove_when="the Ollama API serves adapters",
            process=Process.TOKENIZER,
        )
        for route in ("chat", "generate")
    ),
)
