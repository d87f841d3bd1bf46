"""Where an SGLang is: a folder, a wheel, a version to download, or the installed one. Imports none of them."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import elora_sglang
from elora_sglang.patches.surface.code import Code
from elora_sglang.patches.surface.uses import SGLANG

_VERSION = re.compile(r"\d+(\.\w+)+")


class NotFound(Exception):
    """There is no SGLang at this place; the message is one line."""


def installed() -> Path:
    """Folder of the package that ``import sglang`` would import. Raises NotFound."""
    spec = importlib.util.find_spec(SGLANG)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise NotFound("sglang is not installed")
    return Path(folders[0])


def installed_version() -> str:
    """Version of the installed SGLang; ``none`` when there is none."""
    try:
        return metadata.version(SGLANG)
    except metadata.PackageNotFoundError:
        return "none"


def ours() -> Path:
    """Folder of our package."""
    return Path(elora_sglang.__file__).resolve().parent


def code_of(sglang: Path, own: Path | None = None) -> Code:
    """Both packages, to be read."""
    return Code({SGLANG: sglang, "elora_sglang": own or ours()})


def version_in(folder: Path) -> str:
    """The version that an SGLang folder states beside it or in it; ``unknown`` when it states none."""
    found = sorted(folder.parent.glob(f"{SGLANG}-*.dist-info"))
    if found:
        return found[-1].name.removeprefix(f"{SGLANG}-").removesuffix(".dist-info")
    for name in ("_version.py", "version.py"):
        path = folder / name
        match = (
            re.search(r"^(?:__version__|version)\b[^=]*=\s*['\"]([^'\"]+)", path.read_text(), re.M)
            if path.is_file()
            else None
        )
        if match:
            return match[1]
    return "unknown"


@contextlib.contextmanager
def opened(place: str) -> Iterator[Path]:
    """The SGLang package folder of a folder, a wheel or a version, as long as the block runs.

    A folder is the package itself or what holds it. A version is downloaded by pip, without its dependencies.
    Raises NotFound.
    """
    path = Path(place)
    if path.is_dir():
        yield _package(path)
        return
    with tempfile.TemporaryDirectory(prefix="elora-surface-") as folder:
        wheel = path if path.suffix == ".whl" and path.is_file() else _download(place, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", "/METADATA"))]
            archive.extractall(Path(folder) / "unpacked", names)
        yield _package(Path(folder) / "unpacked")


def _package(path: Path) -> Path:
    for folder in (path, path / SGLANG, path / "python" / SGLANG):
        if (folder / "srt").is_dir():
            return folder
    raise NotFound(f"{path} holds no sglang: neither srt/ nor sglang/srt/")


def _download(version: str, folder: Path) -> Path:
    if not _VERSION.fullmatch(version):
        raise NotFound(f"{version} is no folder, no wheel and no version")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "-d", str(folder), f"{SGLANG}=={version}"], capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise NotFound(f"pip cannot download sglang {version}: {reason}")
    return wheels[0]
