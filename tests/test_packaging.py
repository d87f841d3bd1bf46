"""The wheel installs exactly one import name, and the folders at the root hide nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import live

FOLDERS = ("patches", "kernels", "eval")


def run(*command: str, cwd: Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, env=live.clean_env())
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("elora_sglang", *FOLDERS):
        shutil.copytree(
            live.ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (live.ROOT / name).exists():
            shutil.copy(live.ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel built from the checkout, and the one built from the sdist of the checkout."""
    found = {}
    for name, flags in {"wheel": ["--wheel"], "sdist": []}.items():
        out = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "build", "--no-isolation", *flags, "-o", str(out), ".", cwd=checkout)
        (found[name],) = out.glob("*.whl")
    return found


def modules(wheel: Path) -> set[str]:
    """Files in a wheel besides its metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_has_one_import_name(wheels: dict[str, Path]) -> None:
    assert {name.split("/")[0] for name in modules(wheels["wheel"])} == {"elora_sglang"}


def test_the_wheel_holds_every_module_of_the_tree(wheels: dict[str, Path]) -> None:
    package = live.ROOT / "elora_sglang"
    sources = [(p, p.relative_to(live.ROOT)) for p in package.rglob("*.py")]
    for folder in FOLDERS:
        sources += [
            (p, Path("elora_sglang") / p.relative_to(live.ROOT)) for p in (live.ROOT / folder).rglob("*.py")
        ]
    assert {str(path) for _, path in sources} <= modules(wheels["wheel"])
    assert "elora_sglang/patches/targets.json" in modules(wheels["wheel"])


def test_the_sdist_makes_the_same_wheel(wheels: dict[str, Path]) -> None:
    assert modules(wheels["sdist"]) == modules(wheels["wheel"])


def test_the_installed_wheel_reaches_the_three_folders(wheels: dict[str, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheels["wheel"]).extractall(site)  # what an installer does with a pure wheel
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import elora_sglang.kernels, elora_sglang.eval\n"
        "from elora_sglang.patches.base import discover, manifest\n"
        "assert {p.target for p in discover()} <= set(manifest())\n"
        "print(elora_sglang.__file__)"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path) == str(site / "elora_sglang" / "__init__.py")


def test_the_root_hides_no_package(tmp_path: Path) -> None:
    code = "import kernels; print(kernels.__file__)"
    from_root = run(sys.executable, "-c", code, cwd=live.ROOT)
    assert from_root == run(sys.executable, "-c", code, cwd=tmp_path)
    assert "site-packages" in from_root
    for folder in FOLDERS:
        assert not (live.ROOT / folder / "__init__.py").exists()


def test_the_links_in_the_package_are_relative() -> None:
    for folder in FOLDERS:
        link = live.ROOT / "elora_sglang" / folder
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{folder}"
