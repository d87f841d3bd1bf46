"""Changes planted in a copy of SGLang, one at a time: each is named, with the right verdict."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support.sglang_copy import Plant, SGLangCopy

from elora_sglang.patches.surface import __main__ as command
from elora_sglang.patches.surface import record

ENTRIES = record.stored().entries

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_POLICY = "sglang.srt.managers.schedule_policy"
_CACHE = "sglang.srt.mem_cache.base_prefix_cache"


def first(*uses: str, kind: str, without: tuple[str, ...] = ()) -> str:
    """The first entry that ``--elora`` uses in all of these ways."""
    return next(
        path
        for path, entry in ENTRIES.items()
        if set(uses) <= {*entry.how}
        and entry.shape.kind == kind
        and "elora" in entry.parts
        and not {*without} & {*entry.how}
        and not path.endswith("__init__")
    )


def last(path: str) -> str:
    return path.rpartition(".")[2]


def renamed(path: str) -> Callable[[Plant], None]:
    return lambda plant: plant.edit(path, rf"(def|class) {last(path)}\b", r"\1 renamed_by_a_release")


def parameter(path: str, pattern: str, new: str) -> Callable[[Plant], None]:
    return lambda plant: plant.edit(path, pattern, new)


OVERRIDDEN = first("override", kind="method")
SUPER_CALLED = first("override", "super", kind="method")
READ_PROPERTY = "sglang.srt.mem_cache.prefill_budget.PrefillBudget.remaining_total"
ROW_LAYER = "sglang.srt.lora.layers.RowParallelLinearWithLoRA"
REQUEST = "sglang.srt.managers.schedule_batch.Req"

#: What is planted: the change, the name that must be reported, what is said of it, and whether it breaks us.
PLANTED: dict[str, tuple[Callable[[Plant], None], str, str, bool]] = {
    "an overridden method renamed": (renamed(OVERRIDDEN), OVERRIDDEN, "gone", True),
    "an overridden method of the cache renamed": (
        renamed(f"{_CACHE}.BasePrefixCache.evict"),
        f"{_CACHE}.BasePrefixCache.evict",
        "gone",
        True,
    ),
    "a new required argument of a hooked method": (
        parameter(f"{_SCHEDULER}.run_batch", r"batch: ScheduleBatch,", "batch: ScheduleBatch, urgency: int,"),
        f"{_SCHEDULER}.run_batch",
        "new required argument urgency",
        True,
    ),
    "a new required argument of a function that we call": (
        parameter("sglang.srt.layers.utils.get_layer_id", r"\(weight_name\)", "(weight_name, kind)"),
        "sglang.srt.layers.utils.get_layer_id",
        "new required argument kind",
        True,
    ),
    "a new optional argument of a method that we override": (
        parameter(
            f"{_CACHE}.BasePrefixCache.evict", r"params: EvictParams", "params: EvictParams, why: str = ''"
        ),
        f"{_CACHE}.BasePrefixCache.evict",
        "signature changed",
        True,
    ),
    "an argument renamed that we give by name": (
        parameter(
            "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response",
            r"err_type",
            "kind_of_error",
        ),
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response",
        "signature changed",
        True,
    ),
    "an argument renamed that we give by position": (
        parameter("sglang.srt.layers.utils.get_layer_id", r"\(weight_name\)", "(name)"),
        "sglang.srt.layers.utils.get_layer_id",
        "signature changed",
        False,
    ),
    "the arguments of an overridden method in another order": (
        parameter(
            f"{_POLICY}.PrefillAdder.add_one_req",
            r"req: Req,(\s+)has_chunked_req: bool,",
            r"has_chunked_req: bool,\1req: Req,",
        ),
        f"{_POLICY}.PrefillAdder.add_one_req",
        "signature changed",
        True,
    ),
    "an instance attribute gone": (
        lambda plant: plant.edit(ROW_LAYER, r"self\.lora_offsets = ", "self.offsets = "),
        f"{ROW_LAYER}.lora_offsets",
        "gone",
        True,
    ),
    "an attribute of the request gone": (
        lambda plant: plant.replace("sglang.srt.managers.schedule_batch", "self.lora_id", "self.adapter_id"),
        f"{REQUEST}.lora_id",
        "gone",
        True,
    ),
    "a field of a dataclass gone": (
        lambda plant: plant.edit(f"{_CACHE}.MatchPrefixParams", r"\breq:", "request:"),
        f"{_CACHE}.MatchPrefixParams.req",
        "gone",
        True,
    ),
    "a server argument gone": (
        lambda plant: plant.replace(
            "sglang.srt.arg_groups.fields.lora", "lora_target_modules:", "lora_targets:"
        ),
        "sglang.srt.server_args.ServerArgs.lora_target_modules",
        "gone",
        True,
    ),
    "an enum member gone": (
        lambda plant: plant.replace("sglang.srt.platforms.device_mixin", "    OOT =", "    OUTSIDE ="),
        "sglang.srt.platforms.device_mixin.PlatformEnum.OOT",
        "gone",
        True,
    ),
    "a class moved to another module": (
        lambda plant: plant.move(
            f"{_CACHE}.EvictResult", "sglang.srt.mem_cache.eviction_result", keep_importable=False
        ),
        f"{_CACHE}.EvictResult",
        "moved",
        True,
    ),
    "a hooked function defined elsewhere and only imported here": (
        lambda plant: plant.move(
            "sglang.srt.arg_groups.lora_hook.check_lora_server_args",
            "sglang.srt.arg_groups.lora_checks",
            keep_importable=True,
        ),
        "sglang.srt.arg_groups.lora_hook.check_lora_server_args",
        "moved",
        True,
    ),
    "a module gone": (
        lambda plant: plant.remove("sglang.srt.mem_cache.cache_init_params"),
        "sglang.srt.mem_cache.cache_init_params.CacheInitParams",
        "gone",
        True,
    ),
    "a base class changed": (
        lambda plant: plant.edit(
            f"{_POLICY}.PrefillAdder", r"class PrefillAdder:", "class PrefillAdder(Budget):"
        ),
        f"{_POLICY}.PrefillAdder",
        "base changed",
        False,
    ),
    "a new abstract method of a class that we subclass": (
        lambda plant: plant.edit(
            f"{_CACHE}.BasePrefixCache.evict",
            r"\A.*\Z",
            "    @abstractmethod\n    def warm(self) -> None: ...\n\n" + r"\g<0>",
        ),
        f"{_CACHE}.BasePrefixCache",
        "new abstract method",
        True,
    ),
    "a registry renamed": (
        lambda plant: plant.replace("sglang.srt.mem_cache.registry", "_RADIX_CACHE_REGISTRY", "_CACHES"),
        "sglang.srt.mem_cache.registry._RADIX_CACHE_REGISTRY",
        "gone",
        True,
    ),
    "a function made a method": (
        lambda plant: plant.into_class("sglang.srt.lora.utils.get_target_module_name"),
        "sglang.srt.lora.utils.get_target_module_name",
        "gone",
        True,
    ),
    "a default removed that we leave out": (
        lambda plant: plant.edit(
            "sglang.srt.platforms.interface.PlatformCapabilities",
            r"supports_triton: bool = \w+",
            "supports_triton: bool",
        ),
        "sglang.srt.platforms.interface.PlatformCapabilities",
        "default removed of supports_triton",
        True,
    ),
    "a default of a hooked method removed": (
        parameter(f"{_SCHEDULER}._add_request_to_queue", r"is_retracted: bool = False", "is_retracted: bool"),
        f"{_SCHEDULER}._add_request_to_queue",
        "default removed of is_retracted",
        True,
    ),
    "a property made a method": (
        lambda plant: plant.edit(READ_PROPERTY, r"@property\n\s+", ""),
        READ_PROPERTY,
        "kind changed",
        True,
    ),
    "an overridden method made a property": (
        lambda plant: plant.edit(
            f"{_CACHE}.BasePrefixCache.evictable_size", r"\A(\s*)def", r"\1@property\n\1def"
        ),
        f"{_CACHE}.BasePrefixCache.evictable_size",
        "kind changed",
        True,
    ),
    "a class method made an instance's": (
        lambda plant: plant.edit(
            "sglang.srt.plugins.hook_registry.HookRegistry.register", r"@classmethod\n\s+", ""
        ),
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        "kind changed",
        True,
    ),
    "other source of what we call by super()": (
        lambda plant: plant.edit(SUPER_CALLED, r"\Z", "\n        self.quite_new = 1\n"),
        SUPER_CALLED,
        "source changed",
        False,
    ),
    "another type of an attribute": (
        lambda plant: plant.edit(
            "sglang.srt.model_executor.forward_batch_info.ForwardBatch.extend_seq_lens_cpu",
            r"Optional\[List\[int\]\]",
            "Optional[torch.Tensor]",
        ),
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.extend_seq_lens_cpu",
        "type changed",
        False,
    ),
    "another value of a constant": (
        lambda plant: plant.replace(_POLICY, '"4096"', '"1024"'),
        f"{_POLICY}.CLIP_MAX_NEW_TOKENS",
        "value changed",
        False,
    ),
}


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> SGLangCopy:
    return SGLangCopy(tmp_path_factory.mktemp("surface"))


def test_a_copy_has_no_change(sglang: SGLangCopy) -> None:
    found = sglang.compare()
    assert (found.changes, found.absent, found.unchanged) == ((), (), len(ENTRIES))


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_named(sglang: SGLangCopy, planted: str) -> None:
    change, name, what, breaks = PLANTED[planted]
    with sglang.planted() as plant:
        change(plant)
        found = sglang.compare()
    named = {(c.name, c.what, c.breaks) for c in found.changes if c.name == name}
    assert any(w.startswith(what) and b is breaks for _, w, b in named), [c.line for c in found.changes]
    assert all(change.users for change in found.changes)


def test_at_least_twenty_kinds_are_planted() -> None:
    assert len(PLANTED) >= 20
    assert {what.split(" ")[0] for _, _, what, _ in PLANTED.values()} >= {
        "gone", "moved", "new", "signature", "base", "kind", "source", "type", "value", "default",
    }  # fmt: skip


def unrelated(plant: Plant) -> None:
    """A release's daily work, none of which concerns us."""
    plant.edit(f"{_SCHEDULER}.run_batch", r"\A", "    def quite_new(self, a, b):\n        return a + b\n\n")
    plant.edit(f"{_POLICY}.CLIP_MAX_NEW_TOKENS", r"\A", "def also_new(x):\n    return x\n\n\nNEW_LIMIT = 3\n")
    plant.edit(f"{_CACHE}.EvictParams", r"\Z", "\n    quite_new_field: int = 0\n")
    plant.edit("sglang.srt.lora.lora_manager.LoRAManager.__init__", r"\A", "    # A comment above.\n")
    plant.edit("sglang.srt.layers.utils.get_layer_id", r"\Z", "\n\n# The end.\n")


def test_unrelated_changes_break_nothing(sglang: SGLangCopy) -> None:
    with sglang.planted() as plant:
        unrelated(plant)
        found = sglang.compare()
    assert found.breaking == ()
    # A class has one more optional field: we make one of these, so it is shown, as something to look at.
    assert {change.name for change in found.changes} <= {f"{_CACHE}.EvictParams"}


def test_a_class_that_stays_importable_breaks_nothing(sglang: SGLangCopy) -> None:
    with sglang.planted() as plant:
        plant.move(f"{_CACHE}.EvictResult", "sglang.srt.mem_cache.eviction_result", keep_importable=True)
        found = sglang.compare()
    assert found.changes == ()


def test_a_moved_class_is_found_where_it_is(sglang: SGLangCopy) -> None:
    with sglang.planted() as plant:
        plant.move(f"{_CACHE}.EvictResult", "sglang.srt.mem_cache.eviction_result", keep_importable=False)
        found = sglang.compare()
    assert [(change.name, change.detail) for change in found.changes] == [
        (f"{_CACHE}.EvictResult", "now sglang.srt.mem_cache.eviction_result.EvictResult")
    ]


def test_the_command_names_our_files_and_its_status_says_whether_it_breaks(
    sglang: SGLangCopy, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = str(sglang.original), str(sglang.package)
    with sglang.planted() as plant:
        plant.edit(ROW_LAYER, r"self\.lora_offsets = ", "self.offsets = ")
        assert command.main(["--diff", old, new]) == 1
        text = capsys.readouterr().out
        assert command.main(["--diff", old, new, "--json"]) == 1
        data = json.loads(capsys.readouterr().out)
    assert f"{ROW_LAYER}.lora_offsets: gone" in text
    assert "elora_sglang/integration/weights/shards.py" in text
    assert text.rstrip().splitlines()[-1] == f"breaks: 1, look at: 1, unchanged: {len(ENTRIES) - 2}"
    assert data["breaks"] == 1
    assert [(c["name"], c["verdict"]) for c in data["changes"]] == [
        (f"{ROW_LAYER}.lora_offsets", "breaks"),
        (f"{ROW_LAYER}.set_lora_info", "look at"),  # which made the attribute, and is hooked
    ]


def test_a_place_without_sglang_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--diff", "nowhere", "here"]) == 2
    assert capsys.readouterr().err == "elora: nowhere is no folder, no wheel and no version\n"
