"""Session hints in requests."""

from elora_sglang.patches.base import Kind, Patch, Process

PATCH = Patch(
    name="session_hints",
    target="sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
    kind=Kind.AFTER,
    hook="elora_sglang.integration.cache.session_hints.check_request",
    why="a malformed session hint in custom_params is a 400 that says so, not a hint that is lost",
    upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/managers/io_struct.py",
    remove_when="never: the hints are ELORA's own",
    process=Process.TOKENIZER,
)
