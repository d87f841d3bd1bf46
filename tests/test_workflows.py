"""What `.github` asks for is there: targets, folders of tests, modules, commands. So it cannot rot."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.release import ROOT

from elora_sglang import doctor

GITHUB = ROOT / ".github"
ACTIONS = GITHUB / "actions"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FORM_PARTS = {"textarea", "input", "dropdown", "checkboxes", "markdown"}
#: Folders of tests that no job runs by name.
WITHOUT_TESTS = {"support"}


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def workflow() -> dict[Any, Any]:
    return load(GITHUB / "workflows" / "ci.yml")


def steps() -> Iterator[dict[str, Any]]:
    for job in workflow()["jobs"].values():
        yield from job["steps"]
    for path in ACTIONS.glob("*/action.yml"):
        yield from load(path)["runs"]["steps"]


def rows(job: dict[str, Any]) -> list[dict[str, str]]:
    return job.get("strategy", {}).get("matrix", {}).get("include", [])


def commands() -> list[str]:
    """Every ``make`` of the workflow, with the matrix's values in place of variables."""
    found = []
    for job in workflow()["jobs"].values():
        for row in rows(job) or [{}]:
            for step in job["steps"]:
                text = step.get("run", "")
                for name, value in step.get("env", {}).items():
                    if matched := re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", str(value)):
                        text = text.replace(f"${name}", row[matched[1]])
                found += re.findall(r"^\s*(make [^>|;&\n]*)", text.replace("$newest", "9.9.9"), re.M)
    for path in ACTIONS.glob("*/action.yml"):
        for step in load(path)["runs"]["steps"]:
            found += re.findall(r"^make [^\n]*", step.get("run", ""), re.M)
    return sorted({command.strip() for command in found})


def dry_run(command: str) -> str:
    """What make would do; nothing is installed or run."""
    done = subprocess.run(
        ["bash", "-c", command.replace("make ", "make --dry-run ", 1)],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def named_folders(command: str) -> list[str]:
    return re.findall(r"\btests/[\w./*-]+", command)


def runs_as_a_module(name: str) -> bool:
    """Whether ``python -m NAME`` finds something to run."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return spec is not None
    return importlib.util.find_spec(f"{name}.__main__") is not None


def test_the_commands_are_found() -> None:
    targets = {next(word for word in command.split()[1:] if word[0] != "-") for command in commands()}
    assert targets == {"check", "test", "test-nightly", "release", "surface-diff", "venv"}


@pytest.mark.parametrize("command", commands())
def test_a_command_is_a_target_and_what_it_names_exists(command: str) -> None:
    done = dry_run(command)
    modules = re.findall(r"-m (elora_sglang[\w.]*)", done)
    assert not [name for name in modules if not runs_as_a_module(name)]
    assert not [name for name in re.findall(r"\btests/[\w./*-]+", done) if not list(ROOT.glob(name))]


def test_a_target_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="No rule to make target"):
        dry_run("make a-target-that-nobody-wrote")


def test_every_folder_of_tests_is_run_by_some_job() -> None:
    run = {path for command in commands() for name in named_folders(command) for path in ROOT.glob(name)}
    folders = {path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert {path.name for path in folders - run} == WITHOUT_TESTS
    assert set((ROOT / "tests").glob("test_*.py")) <= run


def test_only_the_job_that_writes_issues_may_write() -> None:
    assert workflow()["permissions"] == {"contents": "read"}
    may = {name: job["permissions"] for name, job in workflow()["jobs"].items() if "permissions" in job}
    assert may == {"nightly-surface": {"contents": "read", "issues": "write"}}


def test_every_job_ends_and_old_ones_are_cancelled() -> None:
    assert all(0 < job["timeout-minutes"] <= 120 for job in workflow()["jobs"].values())
    assert workflow()["concurrency"]["cancel-in-progress"]


def test_actions_are_pinned_by_their_major_version_or_ours() -> None:
    used = {step["uses"] for step in steps() if "uses" in step}
    assert used
    for name in used:
        if name.startswith("./"):
            assert (ROOT / name / "action.yml").is_file()
        else:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", name), name


def test_no_expression_is_written_into_a_shell() -> None:
    """A title or a branch's name in ``${{ }}`` would be run; such values come by variables."""
    assert not [step["run"] for step in steps() if "${{" in step.get("run", "")]


@pytest.mark.parametrize("step", [step["run"] for step in steps() if "run" in step])
def test_the_shell_of_a_step_parses(step: str) -> None:
    done = subprocess.run(["bash", "-n"], input=step, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    assert {part["type"] for part in form["body"]} <= FORM_PARTS
    names = [part["id"] for part in form["body"]]
    assert len(names) == len(set(names))
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_what_a_reporter_is_asked_to_run_is_there() -> None:
    parser = argparse.ArgumentParser()
    doctor.add_command(parser.add_subparsers())
    for name in ("bug.yml", "adapter.yml"):
        asked = re.findall(
            r"`python -m elora_sglang ([^`]+)`", (GITHUB / "ISSUE_TEMPLATE" / name).read_text()
        )
        assert asked
        for arguments in asked:
            assert parser.parse_args(arguments.split()).json


def hooks() -> dict[str, dict[str, Any]]:
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_before_a_commit_the_same_check_runs_as_in_ci() -> None:
    assert hooks()["check"]["entry"] == "make check"
    assert "make check" in commands()
    assert re.findall(r"^make .*", (ROOT / ".ci" / "run").read_text(), re.M) == ["make check", "make test"]


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ("Subject\n\nBecause it was wrong.\n", True),
        ("Merge branch 'a'\n", True),
        ("Subject\n", False),
        ("Subject\nno empty line\n", False),
        ("Subject\n\n# Please enter the commit message for your changes.\n", False),
        ("S" * 81 + "\n\nBecause.\n", False),
    ],
)
def test_a_commit_says_why(message: str, accepted: bool) -> None:
    # As pre-commit's pygrep does with --multiline.
    found = re.search(hooks()["why"]["entry"], message, re.MULTILINE | re.DOTALL)
    assert (found is not None) == accepted
