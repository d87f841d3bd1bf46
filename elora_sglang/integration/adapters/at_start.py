"""Adapters of ``--lora-paths``: checked and versioned in the launcher, before any process is started."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.lora.lora_registry import LoRARef

from elora_sglang.integration.plugin.verify import Refused
from elora_sglang.runtime.adapters.check import BaseModelShape, check
from elora_sglang.runtime.adapters.files import AdapterError, read_folder, resolve_path
from elora_sglang.runtime.adapters.names import check_new_name
from elora_sglang.runtime.adapters.versions import version_id


def version_start_adapters(original: Any, server_args: Any) -> None:
    """AROUND ``check_lora_server_args``: gives every adapter the id of its content.

    The ids depend on the order and the content only, so every node of a launch makes the same ones.

    Raises:
        Refused: an adapter is broken; the line is the one that ``/load_lora_adapter`` would answer.
    """
    original(server_args)
    view = resolving_view(server_args)
    if not view.enable_lora or not view.lora_paths:
        return
    try:
        refs = _versioned(list(view.lora_paths), view, model_config_of(server_args))
    except AdapterError as error:
        raise Refused(str(error)) from error
    declare_resolution(server_args, "elora: adapter versions", lora_paths=refs)


def _versioned(refs: list[LoRARef], view: Any, model_config: Any) -> list[LoRARef]:
    base = BaseModelShape.from_config(model_config.hf_text_config)
    seen: set[str] = set()
    versioned = []
    for number, ref in enumerate(refs):
        name = ref.lora_name
        wrong = "is given twice" if name in seen else check_new_name(name, view.served_model_name)
        if wrong is not None:
            raise AdapterError(f"--lora-paths {name!r}", f"this adapter name {wrong}", "Choose another name.")
        seen.add(name)
        path = resolve_path(ref.lora_path)
        checked = check(
            read_folder(path),
            base,
            target_modules=view.lora_target_modules,
            dtype=model_config.dtype,
        )
        versioned.append(
            LoRARef(
                lora_id=version_id(checked.version, number),
                lora_name=name,
                lora_path=path,
                pinned=bool(ref.pinned),
            )
        )
    return versioned
