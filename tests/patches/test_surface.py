"""The surface is complete and current, and what is new in our source is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import live

from elora_sglang.patches.base import discover, manifest
from elora_sglang.patches.surface import place, record, start
from elora_sglang.patches.surface.__main__ import all_records
from elora_sglang.patches.surface.changes import binds
from elora_sglang.patches.surface.code import Class, Code
from elora_sglang.patches.surface.shape import describe

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
REQUEST = "sglang.srt.managers.schedule_batch.Req"


def test_the_file_is_current_and_the_check_takes_less_than_ten_seconds() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "elora_sglang.patches.surface", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=live.ROOT, env=live.clean_env())
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, told) == (0, [])
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import")
    }
    assert not {name for name in imported if name.partition(".")[0] in ("sglang", "torch")}


def test_every_import_of_sglang_is_an_entry() -> None:
    """By another way than the program's: lines that begin with an import, as text."""
    entries = record.stored().entries
    missing = []
    for path in place.ours().rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split("#")[0].replace(",", " ").split()
            if (
                words[:1] == ["from"]
                and len(words) > 3
                and words[1].startswith("sglang")
                and "(" not in words
            ):
                names = [w for n, w in enumerate(words[3:], 3) if w != "as" and words[n - 1] != "as"]
                missing += [f"{words[1]}.{name}" for name in names if f"{words[1]}.{name}" not in entries]
    assert missing == []


def test_every_record_is_an_entry_with_the_fingerprint_of_targets_json() -> None:
    entries = record.stored().entries
    for patch in discover():
        entry = entries[patch.target]
        assert entry.uses("hook", "register", "replace", "write"), patch.name
        if entry.uses("hook"):
            assert entry.shape.sha256 == manifest()[patch.target].sha256, patch.name


def test_reading_source_gives_the_fingerprints_that_python_gives() -> None:
    """``targets.json`` is made by importing and ``inspect``, the surface by reading: they must say the same."""
    code = Code({"sglang": place.installed()})
    for target, expected in manifest().items():
        seen = describe(code, target)
        assert seen is not None, target
        if seen.kind == "attribute":
            continue  # its fingerprint is that of the function that it holds
        assert seen.sha256 == expected.sha256, target
        bound = seen.kind == "classmethod"  # inspect leaves out what is bound
        ours = seen.signature.replace("(cls, ", "(").replace("(cls)", "()") if bound else seen.signature
        assert ours == expected.signature, target


def test_the_defect_of_0_5_22_is_in_it() -> None:
    """``RowParallelLinearWithLoRA has no attribute 'lora_offsets'`` is how a server died there."""
    entry = record.stored().entries["sglang.srt.lora.layers.RowParallelLinearWithLoRA.lora_offsets"]
    assert entry.uses("read")
    assert entry.parts == ("elora",)
    assert "elora_sglang/integration/weights/shards.py" in entry.users


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our package, in which new uses of SGLang are planted."""
    target = tmp_path_factory.mktemp("ours") / "elora_sglang"
    names = shutil.ignore_patterns("__pycache__", "*.json", "*.md", "*.jinja", "results")
    shutil.copytree(place.ours(), target, ignore=names)
    return target


def attribute_that_nobody_reads(path: str) -> str:
    cls = Code({"sglang": place.installed()}).find(path)
    assert isinstance(cls, Class)
    entries = record.stored().entries
    values = sorted(m.name for m in cls.own.values() if m.kind == "attribute")
    return next(name for name in values if f"{path}.{name}" not in entries)


def test_new_uses_of_sglang_are_found(ours: Path) -> None:
    read, followed = attribute_that_nobody_reads(SCHEDULER), attribute_that_nobody_reads(REQUEST)
    hooks = ours / "integration" / "scheduler" / "hooks.py"
    hooks.write_text(
        hooks.read_text()
        + f"""

def planted(scheduler: Scheduler) -> object:
    from sglang.srt.utils.common import get_device_name

    last = [req.{followed} for req in reversed(scheduler.waiting_queue)]
    return (getattr(scheduler, "{read}"), get_device_name(device_id=0), last)
"""
    )
    admission = ours / "integration" / "scheduler" / "admission.py"
    text = admission.read_text()
    marker = "    def preempt_to_schedule("
    assert text.count(marker) == 1
    overriding = (
        "    def add_dllm_staging_req(self, req: Req) -> AddReqResult:\n        return AddReqResult.OTHER\n\n"
    )
    admission.write_text(text.replace(marker, overriding + marker))

    stored = record.stored()
    built = record.build(place.code_of(place.installed(), ours), all_records(), stored.sglang)
    lines = record.differences(stored, built)
    new = {line.partition(": not in surface.json")[0] for line in lines if ": not in surface.json" in line}
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    assert new >= {
        f"{SCHEDULER}.{read}",
        "sglang.srt.utils.common.get_device_name",
        f"{adder}.add_dllm_staging_req",
        f"{REQUEST}.{followed}",
    }
    entry = built.entries["sglang.srt.utils.common.get_device_name"]
    assert (entry.calls, entry.users) == (
        ("(0, device_id=)",),
        ("elora_sglang/integration/scheduler/hooks.py",),
    )
    assert built.entries[f"{adder}.add_dllm_staging_req"].how == ("override",)


def test_the_check_at_start_costs_little() -> None:
    spent = []
    for _ in range(3):
        start.faults.cache_clear()
        before = time.process_time()
        assert start.faults() == ()
        spent.append(time.process_time() - before)
    assert min(spent) < 0.3


@pytest.mark.parametrize(
    ("signature", "call", "fits"),
    [
        ("(self, a)", "(2)", True),
        ("(self, a, b)", "(2)", False),
        ("(self, a, b=...)", "(2)", True),
        ("(self, a)", "(2, b=)", False),
        ("(self, a, **more)", "(2, b=)", True),
        ("(self, *, a)", "(2)", False),
        ("(self, *, a)", "(1, a=)", True),
        ("(self, a)", "(2, a=)", False),
        ("(self, a)", "(3)", False),
        ("(self, *rest)", "(3)", True),
        ("(self, a, b)", "(1, *)", True),
        ("(self, a, /)", "(1, **)", True),
    ],
)
def test_whether_a_call_fits_a_signature(signature: str, call: str, fits: bool) -> None:
    assert binds(signature, call) is fits


def test_the_file_reads_back_as_it_was_written() -> None:
    stored = record.stored()
    assert record.loads(record.dumps(stored)) == stored
