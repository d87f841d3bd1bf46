"""Fixtures shared by all tests: the demo model and its adapters, made once under ``.demo/``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from support import golden_answers, live, seeds
from support.demo_paths import Demo

DEMO_DIR = Path(os.environ.get("ELORA_DEMO_DIR", live.ROOT / ".demo")).absolute()

settings.register_profile("fixed", derandomize=True)
if not seeds.fresh():
    settings.load_profile("fixed")

# These need Triton's interpreter, which is chosen when Triton is imported: `kernels/test_interpreter.py` runs
# them in a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/interpreted"]


def pytest_report_header() -> str:
    """The seed of this run, before anything can fail."""
    return f"seed {seeds.SEED}" + (" (fresh)" if seeds.fresh() else "")


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the demo model and adapters; built by its own process the first time (about a minute)."""
    log = tmp_path_factory.mktemp("demo") / "demo.log"
    status, output = live.run(
        [sys.executable, "-m", "elora_sglang.demo", str(DEMO_DIR)],
        log=log,
        timeout=900,
        env=live.clean_env(OMP_NUM_THREADS=str(os.cpu_count() or 1)),
    )
    if status != 0:
        pytest.fail(f"python -m elora_sglang.demo ended with {status}:\n{output[-4000:]}", pytrace=False)
    return DEMO_DIR


@pytest.fixture(scope="session")
def demo(demo_dir: Path) -> Demo:
    """The demo's paths by name."""
    manifest = json.loads((demo_dir / "manifest.json").read_text())
    return Demo(
        root=demo_dir,
        model=demo_dir / manifest["model"],
        adapters={entry["name"]: demo_dir / entry["path"] for entry in manifest["adapters"]},
        manifest=manifest,
    )


@pytest.fixture(scope="session")
def golden(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> golden_answers.Golden:
    """Prompts and what Transformers answers to them, for the live tests that compare tokens."""
    return golden_answers.make(demo, tmp_path_factory.mktemp("oracle"))
