"""Write the demo to disk, once: base model, adapters and a manifest that says whether it is complete.

OUT/manifest.json        what is here; written last
OUT/base/                config.json, model.safetensors, tokenizer, chat template, generation_config.json
OUT/adapters/<name>/     adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elora_sglang.demo import adapters, model, text, tokenizer

FORMAT = 1  # raise it when the recipe changes: an older demo is then made again
THREADS = 1  # fixed: the number of threads changes the order of sums, and so the trained bits
SOURCES = (text, tokenizer, model, adapters)
LOCK = ".lock"


class DemoError(Exception):
    """The demo cannot be made; the message is one line for the user."""


def _recipe() -> str:
    digest = hashlib.sha256(str(FORMAT).encode())
    for module in SOURCES:
        assert module.__file__ is not None
        digest.update(ast.dump(ast.parse(Path(module.__file__).read_text())).encode())
    return digest.hexdigest()[:16]


#: Digest of the code that makes the demo, but for comments and layout: other code makes another demo.
RECIPE = _recipe()


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] in ("base", "adapters")
    }


def missing(out: Path, count: int, seed: int) -> str | None:
    """Why the demo in ``out`` must be made again, or None when it is complete and of this recipe."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
    except (OSError, ValueError):
        return "there is no readable manifest.json"
    for key, wanted in (("recipe", RECIPE), ("seed", seed), ("adapter_count", count)):
        if manifest.get(key) != wanted:
            return f"it was made with {key} {manifest.get(key)}, not {wanted}"
    present = _digests(out)
    for name, digest in manifest["files"].items():
        if present.get(name) != digest:
            return f"{name} is missing or changed"
    return None


def build(out: Path, *, count: int = 16, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the demo in ``out`` unless it is there; the manifest.

    Only one process builds at a time (a lock file in ``out``); the others wait and find it made. Raises
    DemoError when the process is not clean, a library is missing, or ``out`` holds something else.
    """
    if "sglang" in sys.modules:
        raise DemoError(
            "sglang is imported in this process, which corrupts Transformers models: "
            "run python -m elora_sglang.demo in a process of its own"
        )
    out = out.absolute()
    if (
        out.exists()
        and any(out.iterdir())
        and not (out / "manifest.json").exists()
        and not (out / LOCK).exists()
    ):
        raise DemoError(f"{out} is not empty and holds no demo: give an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        why = missing(out, count, seed)
        if why is None:
            return dict(json.loads((out / "manifest.json").read_text()))
        say(f"making the demo model and {count} adapters in {out} ({why})")
        fresh = out / ".partial"
        shutil.rmtree(fresh, ignore_errors=True)
        manifest = _make(fresh, count, seed, say)
        (out / "manifest.json").unlink(missing_ok=True)
        for part in ("base", "adapters", "manifest.json"):
            shutil.rmtree(out / part, ignore_errors=True)
            (fresh / part).rename(out / part)
        fresh.rmdir()
        return manifest


def _make(out: Path, count: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    chosen = adapters.specs(count)
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise DemoError(f"{error.name} is not installed: pip install 'elora-sglang[demo]'") from error
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")  # about the base model's name, which is not on any hub
    began = time.monotonic()

    def note(line: str) -> None:
        say(f"[{time.monotonic() - began:5.1f} s] {line}")

    base = out / "base"
    base.mkdir(parents=True)
    words = tokenizer.train(seed)
    tokenizer.save(words, base)
    note(f"tokenizer: {len(words)} ids")
    trained, loss = model.train(words, seed)
    model.save(trained, base)
    note(
        f"base model: {sum(p.numel() for p in trained.parameters()) / 1e6:.1f} M parameters, loss {loss:.3f}"
    )
    entries = []
    for spec in chosen:
        folder = out / "adapters" / spec.name
        if spec.trained_on is None:
            adapters.write_random(spec, base, folder, seed)
            note(f"adapter {spec.name}: rank {spec.rank}, written")
        else:
            loss = adapters.train(spec, base, words, folder, seed)
            note(f"adapter {spec.name}: rank {spec.rank}, trained with peft, loss {loss:.3f}")
        entries.append(
            {
                "name": spec.name,
                "path": f"adapters/{spec.name}",
                "rank": spec.rank,
                "alpha": spec.alpha,
                "modules": list(spec.modules),
                "rslora": spec.rslora,
                "dtype": spec.dtype,
                "trained": spec.trained_on is not None,
            }
        )
    manifest = {
        "model": "base",
        "adapters": entries,
        "adapter_count": count,
        "seed": seed,
        "recipe": RECIPE,
        "made_with": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "files": _digests(out),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    note("done")
    return manifest
