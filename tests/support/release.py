"""Wheel and sdist, and whether they hold what they should and work where nothing else of ours is: ``make release``.

    python tests/support/release.py --out dist

The clean environment is a new venv with the wheel in it. Its dependencies are not downloaded again (sglang brings
11 GB): it sees this environment's packages through a folder of links that leaves out every trace of elora-sglang.
So an import, a data file or an entry point that works there comes from the wheel.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "elora_sglang"
#: Folders at the root that are packages of the wheel, by links in the package.
FOLDERS = ("patches", "kernels", "eval")
#: For people who read the repository; no code reads them.
LEFT_OUT = ("eval/results/", "eval/JOURNAL.md", "patches/README.md")
#: Name, module and attribute, as pip writes them into entry_points.txt.
ENTRY_POINTS = {
    "elora-eval = elora_sglang.eval.cli:main",
    "elora = elora_sglang.integration.plugin:register",
    "elora_cpu = elora_sglang.platform:activate",
}
#: Imports every module named on stdin and prints what does not work.
IMPORT_ALL = """
import importlib, sys
for name in sys.stdin.read().split():
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


class ReleaseError(Exception):
    """A command of the release failed; the message ends with its output."""


def run(*command: str | Path, cwd: Path, stdin: str = "") -> str:
    """Output of a command that must succeed, in an environment without Python's own variables.

    Raises:
        ReleaseError: it ended with another status than 0.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin, capture_output=True, text=True, timeout=600, cwd=cwd, env=environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise ReleaseError(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout.strip()


@dataclass(frozen=True)
class Built:
    """What one build left: the sdist, the wheel made from it, and the wheel made straight from the checkout."""

    sdist: Path
    wheel: Path
    direct: Path


def build(checkout: Path, out: Path) -> Built:
    """Build in ``checkout``, which is left dirty. Without build isolation: setuptools is an extra of ``dev``."""
    found = []
    for kind, flags in {"sdist": [], "direct": ["--wheel"]}.items():
        run(
            sys.executable, "-m", "build", "--no-isolation", *flags, "--outdir", out / kind, ".", cwd=checkout
        )  # fmt: skip
        found += sorted((out / kind).iterdir(), key=lambda path: path.suffix)
    sdist, wheel, direct = found  # .gz comes before .whl
    return Built(sdist, wheel, direct)


def files(wheel: Path) -> dict[str, zipfile.ZipInfo]:
    """Files of a wheel besides its metadata, by path."""
    entries = zipfile.ZipFile(wheel).infolist()
    return {entry.filename: entry for entry in entries if ".dist-info/" not in entry.filename}


def module(path: str) -> str:
    """``a/b/__init__.py`` is ``a.b``."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def expected(checkout: Path) -> set[str]:
    """Paths in the wheel of every source of a checkout, whatever else it holds."""
    sources = [path.relative_to(checkout) for path in (checkout / NAME).rglob("*.py")]
    for folder in FOLDERS:
        sources += [NAME / path.relative_to(checkout) for path in (checkout / folder).rglob("*.py")]
    return {str(path) for path in sources}


def content_faults(wheel: Path, checkout: Path) -> list[str]:
    """What a wheel lacks or holds too much: one import name, all code, and no data that no code names."""
    held = files(wheel)
    found = [f"a second import name: {name}" for name in sorted({p.split("/")[0] for p in held} - {NAME})]
    found += [f"left out: {path}" for path in sorted(expected(checkout) - set(held))]
    found += [f"not in the checkout: {path}" for path in sorted(held) if not _is_known(path, checkout)]
    found += [] if f"{NAME}/py.typed" in held else ["left out: py.typed"]
    with zipfile.ZipFile(wheel) as archive:
        trees = [ast.parse(archive.read(path)) for path in held if path.endswith(".py")]
        lines = set(archive.read(_metadata(archive, "entry_points.txt")).decode().splitlines())
    words = {node.value for t in trees for node in ast.walk(t) if isinstance(node, ast.Constant)}
    rooms = {str(Path(path).parent) for path in held if path.endswith(".py")}
    for path in sorted(held):
        if path.endswith((".py", "/py.typed")):
            continue
        here, folder = path.removeprefix(f"{NAME}/"), Path(path).parent
        named = Path(path).name in words or (folder.name in words and str(folder) not in rooms)
        if here.startswith(LEFT_OUT):
            found.append(f"for readers of the repository only: {here}")
        elif not named:
            found.append(f"no module names this file, or its folder of data: {here}")
    return found + [f"no entry point {line!r}" for line in sorted(ENTRY_POINTS - lines)]


def _is_known(path: str, checkout: Path) -> bool:
    return (checkout / path).is_file()  # through the links, too


def sdist_faults(sdist: Path) -> list[str]:
    """Files of an sdist that nobody builds from."""
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    return [
        f"in the sdist: {path}"
        for path in sorted(inside)
        if path.startswith("tests") or path.removeprefix(f"{NAME}/").startswith(LEFT_OUT)
    ]


def _metadata(archive: zipfile.ZipFile, name: str) -> str:
    return next(path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))


def same(one: Path, other: Path) -> bool:
    """Whether two wheels hold the same files, byte for byte."""
    return {p: e.CRC for p, e in files(one).items()} == {p: e.CRC for p, e in files(other).items()}


def clean_environment(folder: Path, wheel: Path) -> Path:
    """A new venv with the wheel in it, and links to this environment's packages behind it; its Python."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    links = folder / "dependencies"
    links.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = "elora_sglang" in entry.name.replace("-", "_")
        if not ours and entry.suffix != ".pth" and entry.name != "__pycache__":
            (links / entry.name).symlink_to(entry)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    (site / "dependencies.pth").write_text(f"{links}\n")
    return python


def check_installed(python: Path, wheel: Path, folder: Path) -> list[str]:
    """Lines on what works in a clean environment.

    Raises:
        ReleaseError: something does not.
    """
    where = Path(run(python, "-c", f"import {NAME}; print({NAME}.__file__)", cwd=folder))
    if python.parents[1] not in where.parents:
        raise ReleaseError(f"import {NAME} finds {where}, not the wheel")
    names = sorted(module(path) for path in files(wheel) if path.endswith(".py") and "__main__" not in path)
    said = run(python, "-c", IMPORT_ALL, cwd=folder, stdin=" ".join(names))
    broken = "\n".join(line for line in said.splitlines() if line.startswith(f"{NAME}."))
    if broken:
        raise ReleaseError(f"modules that cannot be imported:\n{broken}")
    doctor = run(python, "-m", NAME, "doctor", cwd=folder).splitlines()
    usage = run(python.with_name("elora-eval"), "--help", cwd=folder).splitlines()
    return [
        f"{len(names)} modules import from {where.parent.name} of the wheel",
        f"doctor: {doctor[-1]}",
        f"elora-eval --help: {usage[0]}",
    ]


def summary(wheel: Path) -> list[str]:
    """Bytes by kind and by room, largest first."""
    held = files(wheel)
    kinds, rooms = Counter[str](), Counter[str]()
    for path, entry in held.items():
        parts = path.split("/")
        kinds[Path(path).suffix] += entry.file_size
        rooms[parts[1] if len(parts) > 2 else "."] += entry.file_size
    total = sum(kinds.values())
    return [f"{len(held)} files, {total:,} bytes"] + [
        f"  {size:>9,}  {size / total:4.0%}  {name}"
        for name, size in [*kinds.most_common(), *rooms.most_common()]
    ]


def unannounced(wheel: Path, checkout: Path) -> list[str]:
    """A fault where CHANGELOG.md has no dated section for the wheel's version."""
    version = wheel.name.split("-")[1]
    dated = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    changes = (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
    return [] if re.search(dated, changes, re.M) else [f"CHANGELOG.md has no dated section for {version}"]


def main() -> int:
    """Build what is committed, check it, and move it to ``--out``; nothing is moved when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for wheel and sdist")
    out: Path = parser.parse_args().out.absolute()
    with tempfile.TemporaryDirectory(prefix="elora-release-") as name:
        work = Path(name)
        checkout = work / "checkout"
        checkout.mkdir()
        if dirty := run("git", "status", "--porcelain", "--untracked-files=no", cwd=ROOT):
            print(f"not in this release, because not committed:\n{dirty}")
        run("git", "archive", "--format=tar", "--output", work / "checkout.tar", "HEAD", cwd=ROOT)
        run("tar", "-xf", work / "checkout.tar", cwd=checkout)
        built = build(checkout, work)
        faults = content_faults(built.wheel, checkout) + sdist_faults(built.sdist)
        faults += (
            [] if same(built.wheel, built.direct) else ["the sdist makes another wheel than the checkout"]
        )
        faults += unannounced(built.wheel, checkout)
        if faults:
            raise ReleaseError("\n".join(faults))
        print("\n".join(summary(built.wheel)))
        print("\n".join(check_installed(clean_environment(work, built.wheel), built.wheel, work)))
        out.mkdir(parents=True, exist_ok=True)
        for path in (built.wheel, built.sdist):
            size = (out / path.name).write_bytes(path.read_bytes())
            print(f"{out / path.name}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ReleaseError as error:
        sys.exit(f"release: {error}")
