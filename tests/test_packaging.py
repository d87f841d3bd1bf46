"""The wheel: one import name, all code, no results; and it works where nothing else of ours is.

The checks themselves are in ``support/release.py``: ``make release`` runs the same.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from support import release
from support.release import FOLDERS, NAME, ROOT, Built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (NAME, *FOLDERS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return release.build(checkout, tmp_path_factory.mktemp("built"))


def test_the_wheel_holds_what_it_should_and_nothing_else(built: Built, checkout: Path) -> None:
    assert not release.content_faults(built.wheel, checkout)
    held = release.files(built.wheel)
    assert {f"{NAME}/patches/targets.json", f"{NAME}/demo/prompts.json", f"{NAME}/py.typed"} <= set(held)
    # 72 % of the first wheel were results, by bytes.
    code = sum(entry.file_size for path, entry in held.items() if path.endswith(".py"))
    assert code > 0.75 * sum(entry.file_size for entry in held.values())


def test_the_sdist_makes_the_same_wheel_and_holds_no_more(built: Built) -> None:
    assert release.same(built.wheel, built.direct)
    assert not release.sdist_faults(built.sdist)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("elsewhere/__init__.py", "a second import name: elsewhere"),
        (f"{NAME}/eval/results/run.json", "for readers of the repository only: eval/results/run.json"),
        (f"{NAME}/eval/JOURNAL.md", "for readers of the repository only: eval/JOURNAL.md"),
        (f"{NAME}/demo/notes.json", "no module names this file, or its folder of data: demo/notes.json"),
        (f"{NAME}/stray.py", f"not in the checkout: {NAME}/stray.py"),
    ],
)
def test_what_does_not_belong_into_a_wheel_is_found(
    path: str, fault: str, built: Built, checkout: Path, tmp_path: Path
) -> None:
    wheel = Path(shutil.copy(built.wheel, tmp_path))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(path, "")
    assert fault in release.content_faults(wheel, checkout)
    assert not release.same(wheel, built.direct)


@pytest.mark.parametrize("path", [f"{NAME}/core/manager.py", f"{NAME}/py.typed"])
def test_what_a_wheel_lacks_is_found(path: str, built: Built, checkout: Path, tmp_path: Path) -> None:
    wheel = tmp_path / built.wheel.name
    with zipfile.ZipFile(built.wheel) as full, zipfile.ZipFile(wheel, "w") as archive:
        for name in full.namelist():
            if name != path:
                archive.writestr(name, full.read(name))
    assert [f for f in release.content_faults(wheel, checkout) if f.startswith("left out: ")]


def test_a_release_is_in_the_changelog(built: Built, checkout: Path, tmp_path: Path) -> None:
    assert not release.unannounced(built.wheel, checkout)
    shutil.copy(checkout / "CHANGELOG.md", tmp_path)
    assert release.unannounced(Path("elora_sglang-99.0-py3-none-any.whl"), tmp_path)


def test_the_installed_wheel_works_in_a_clean_environment(built: Built, tmp_path: Path) -> None:
    python = release.clean_environment(tmp_path, built.wheel)
    lines = release.check_installed(python, built.wheel, tmp_path)
    assert lines[1] == "doctor: ready: --elora will start here"
    code = (
        "from elora_sglang.patches.base import discover, manifest\n"
        "print(len({p.target for p in discover()} - set(manifest())))"
    )
    assert release.run(python, "-c", code, cwd=tmp_path) == "0"


def test_a_module_that_cannot_be_imported_stops_the_release(built: Built, tmp_path: Path) -> None:
    python = release.clean_environment(tmp_path, built.wheel)
    (package,) = (tmp_path / "venv").rglob(f"{NAME}/core")
    (package / "costs.py").write_text("import a_package_that_nobody_declared\n")
    with pytest.raises(release.ReleaseError, match=r"costs: ModuleNotFoundError: .*a_package_that_nobody"):
        release.check_installed(python, built.wheel, tmp_path)


def test_the_root_hides_no_package(tmp_path: Path) -> None:
    code = "import kernels; print(kernels.__file__)"
    from_root = release.run(sys.executable, "-c", code, cwd=ROOT)
    assert from_root == release.run(sys.executable, "-c", code, cwd=tmp_path)
    assert "site-packages" in from_root
    for folder in FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_links_in_the_package_are_relative() -> None:
    for folder in FOLDERS:
        link = ROOT / NAME / folder
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{folder}"
