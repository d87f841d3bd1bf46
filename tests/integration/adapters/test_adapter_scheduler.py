"""The scheduler side of the life cycle against a small manager and pool: what is installed, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from support.adapter_folders import CONFIG, Q_A, WEIGHTS_FILE, change_tensors, write_adapter

from elora_sglang.integration.adapters import scheduler_side as hooks
from elora_sglang.integration.adapters.tokenizer_side import STILL_RUNNING
from elora_sglang.integration.plugin.verify import Refused
from elora_sglang.runtime.adapters.files import read_folder
from elora_sglang.runtime.adapters.tensors import encode
from elora_sglang.runtime.adapters.versions import version_id


class Pool:
    """Slots by lora id; refuses the configs it is told to."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.refuses = ""

    def slots_needed(self, lora_id: str) -> int:
        return self.slots.get(lora_id, 100)

    def can_support(self, config: Any) -> None:
        if self.refuses:
            raise ValueError(self.refuses)


class Manager:
    """The parts of SGLang's LoRA manager that the hooks touch."""

    def __init__(self) -> None:
        self.base_hf_config = SimpleNamespace(get_text_config=lambda: CONFIG)
        self.configs: dict[str, Any] = {}
        self.loras: dict[str, Any] = {}
        self.lora_refs: dict[str, LoRARef] = {}
        self.num_pinned_loras = 0
        self.memory_pool = Pool()
        self.breaks = ""

    def load_lora_weights_from_tensors(self, ref: LoRARef, tensors: Any) -> None:
        self.loras[ref.lora_id] = tensors
        if self.breaks:
            raise KeyError(self.breaks)

    def unload_lora_adapter(self, ref: LoRARef) -> None:
        for table in (self.configs, self.loras, self.lora_refs):
            table.pop(ref.lora_id, None)

    def create_lora_update_result(self, success: bool, error_message: str = "") -> LoRAUpdateOutput:
        return LoRAUpdateOutput(success=success, error_message=error_message)

    @property
    def empty(self) -> bool:
        return not (self.configs or self.loras or self.lora_refs or self.num_pinned_loras)


def ref_of(folder: Path, number: int = 0, **fields: Any) -> LoRARef:
    lora_id = version_id(read_folder(folder).version(), number)
    return LoRARef(
        **{"lora_id": lora_id, "lora_name": "a", "lora_path": str(folder), "pinned": False, **fields}
    )


def install(manager: Manager, ref: LoRARef) -> LoRAUpdateOutput:
    return hooks.load_from_files(None, manager, ref)


def test_what_was_asked_for_is_installed(tmp_path: Path) -> None:
    manager, folder = Manager(), write_adapter(tmp_path, modules=("q_proj", "v_proj"))
    ref = ref_of(folder, pinned=True)
    assert install(manager, ref).success
    config = manager.configs[ref.lora_id]
    assert (config.path, config.r, config.target_modules) == (str(folder), 4, ["q_proj", "v_proj"])
    assert manager.loras[ref.lora_id].keys() == load_file(folder / WEIGHTS_FILE).keys()
    assert manager.lora_refs == {ref.lora_id: ref} and manager.num_pinned_loras == 1


def change_file(folder: Path) -> None:
    change_tensors(lambda t: t[Q_A].add_(1e-6))(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder, manager: change_file(folder), "changed while it was being loaded"),
        (lambda folder, manager: (folder / WEIGHTS_FILE).unlink(), "file is missing"),
        (lambda folder, manager: setattr(manager.memory_pool, "refuses", "not served"), "not served"),
        (lambda folder, manager: setattr(manager, "breaks", "v_proj"), "v_proj"),
    ],
)
def test_what_cannot_be_installed_leaves_nothing(
    spoil: Callable[[Path, Manager], Any], words: str, tmp_path: Path
) -> None:
    manager, folder = Manager(), write_adapter(tmp_path)
    ref = ref_of(folder)
    spoil(folder, manager)
    result = install(manager, ref)
    assert not result.success and words in result.error_message and manager.empty


def test_tensors_are_taken_as_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "get_parallel", lambda: SimpleNamespace(tp_rank=1))
    manager, files = Manager(), read_folder(write_adapter(tmp_path))
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
    request = LoadLoRAAdapterFromTensorsReqInput(
        lora_name="a",
        lora_id=version_id(files.version(), 3),
        config_dict=files.config,
        serialized_named_tensors=encode(files.tensors, 2),
    )
    assert hooks.load_from_tensors(None, worker, request).success
    assert list(manager.lora_refs) == [request.lora_id]
    request.lora_id, request.serialized_named_tensors = "0-4", [b"", b"\x80\x04pickle"]
    result = hooks.load_from_tensors(None, worker, request)
    assert not result.success and list(manager.lora_refs) == [version_id(files.version(), 3)]


def test_limits_of_the_pool() -> None:
    manager = Manager()

    def fault(slots: int, number: int, name: str, pinned: bool = False) -> str | None:
        ref = LoRARef(lora_id=str(number), lora_name=name, lora_path="p", pinned=pinned)
        manager.lora_refs[ref.lora_id] = ref
        manager.memory_pool.slots[ref.lora_id] = slots
        found = hooks.room_fault(manager, ref, pool_slots=1000, page_size=16)
        if found is not None:
            del manager.lora_refs[ref.lora_id]
        return found

    assert fault(982, 0, "a") is None
    assert "no room for a request" in str(fault(983, 1, "b"))
    assert fault(300, 2, "c", pinned=True) is None
    assert fault(200, 3, "d", pinned=True) is None
    assert "would take 516 of the pool's 1000 slots; at most 50%" in str(fault(16, 4, "e", pinned=True))
    assert fault(300, 5, "c", pinned=True) is None, "a new version of a pinned name replaces its share"
    assert fault(900, 6, "f") is None


def scheduler_with(manager: Manager, dropped: list[str], **queues: Any) -> Any:
    batch = SimpleNamespace(reqs=queues.pop("running", []))
    return SimpleNamespace(
        tp_size=1,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
        tree_cache=SimpleNamespace(adapters=SimpleNamespace(drop=dropped.append)),
        max_total_num_tokens=1000,
        page_size=1,
        waiting_queue=queues.pop("waiting", []),
        grammar_manager=SimpleNamespace(grammar_queue=queues.pop("grammar", [])),
        running_batch=batch,
        last_batch=queues.pop("last", None),
        chunked_req=queues.pop("chunked", None),
    )


def request_of(lora_id: str, finished: bool = False) -> Any:
    return SimpleNamespace(lora_id=lora_id, finished=lambda: finished)


def test_loading_what_does_not_fit_is_undone() -> None:
    manager = Manager()
    scheduler = scheduler_with(manager, [])

    def original(_: Any, request: Any) -> LoRAUpdateOutput:
        manager.lora_refs[request.lora_id] = request.to_ref()
        return LoRAUpdateOutput(success=True)

    request = LoadLoRAAdapterFromTensorsReqInput(
        lora_name="a", lora_id="x-0", config_dict={}, serialized_named_tensors=[]
    )
    assert hooks.load(original, scheduler, request).success and not manager.empty
    manager.memory_pool.slots["x-0"] = 1000
    result = hooks.load(original, scheduler, request)
    assert not result.success and "no room" in result.error_message and manager.empty
    no = LoRAUpdateOutput(success=False, error_message="no")
    assert hooks.load(lambda *_: no, scheduler, request).error_message == "no"


@pytest.mark.parametrize("here", [True, False])
def test_a_load_that_fails_on_another_rank_is_undone_here(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, and the other one says no: rank 0, which answers, must not say yes."""
    manager = Manager()
    scheduler = scheduler_with(manager, [])
    scheduler.tp_size, scheduler.tp_cpu_group = 2, "group"
    monkeypatch.setattr(hooks.torch.distributed, "all_reduce", lambda votes, op, group: votes.zero_())

    def original(_: Any, request: Any) -> LoRAUpdateOutput:
        if here:
            manager.lora_refs[request.lora_id] = request.to_ref()
        return LoRAUpdateOutput(success=here, error_message=None if here else "no")

    request = LoadLoRAAdapterFromTensorsReqInput(
        lora_name="a", lora_id="x-0", config_dict={}, serialized_named_tensors=[]
    )
    result = hooks.load(original, scheduler, request)
    assert not result.success and manager.empty
    assert ("another tensor-parallel rank" in result.error_message) == here


def test_adapters_of_the_command_line_have_the_same_limits() -> None:
    manager = Manager()
    manager.lora_refs["x-0"] = LoRARef(lora_id="x-0", lora_name="a", lora_path="p", pinned=True)
    hooks.check_start_adapters(None, scheduler_with(manager, []))
    manager.memory_pool.slots["x-0"] = 600
    with pytest.raises(Refused, match="at most 50% may be pinned"):
        hooks.check_start_adapters(None, scheduler_with(manager, []))


@pytest.mark.parametrize("place", ["waiting", "grammar", "running", "last", "chunked"])
def test_unload_drops_the_branch_once_nobody_runs(place: str) -> None:
    dropped: list[str] = []
    asked: list[Any] = []

    def original(_: Any, request: Any) -> LoRAUpdateOutput:
        asked.append(request)
        assert dropped, "the branch goes before the weights"
        return LoRAUpdateOutput(success=True)

    def unload(requests: list[Any]) -> LoRAUpdateOutput:
        found: Any = requests
        if place == "last":
            found = SimpleNamespace(reqs=requests)
        elif place == "chunked":
            found = requests[0]
        scheduler = scheduler_with(Manager(), dropped, **{place: found})
        return hooks.unload(original, scheduler, UnloadLoRAAdapterReqInput(lora_name="a", lora_id="x-0"))

    result = unload([request_of("x-0")])
    assert not result.success and STILL_RUNNING in result.error_message and not dropped and not asked
    assert unload([request_of("x-0", finished=True)]).success and dropped == ["x-0"]
    assert unload([request_of("y-1")]).success and dropped == ["x-0", "x-0"]
