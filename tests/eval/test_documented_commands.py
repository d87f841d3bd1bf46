"""Every measuring command line in the documents is understood by its command."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from elora_sglang.eval.cli import build_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "eval").glob("*.md")])
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
#: "… live" is how tables go on after a first "python -m elora_sglang.eval workload".
COMMAND = re.compile(r"(?:python -m (elora_sglang\.eval[.\w]*)|elora-eval\b|^… (?=[a-z]+\b))(.*)")
#: What a shell would not pass on, a drawing's next column, and what stands for more of the same.
END = re.compile(r"(?:[>|&#;…]|\s{3,}\S).*")
#: A word that stands for what the reader has.
PLACEHOLDER = re.compile(r"[A-Z]+")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command line in a document's code blocks and spans."""
    lines = re.sub(r" *\\\n *", " ", "".join(FENCE.findall(text))).splitlines()
    lines += [span.replace("\n", " ") for span in SPAN.findall(FENCE.sub("", text))]
    found = (COMMAND.search(line) for line in lines)
    return [
        (one[1] or "elora_sglang.eval", shlex.split(END.sub("", one[2], count=1))) for one in found if one
    ]


def fault(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What the command says against its arguments, or None."""
    capsys.readouterr()
    if module != "elora_sglang.eval":  # a script with a parser of its own
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        unknown = [word for word in words if word.startswith("--") and word not in known]
        return f"it has no {unknown[0]}" if unknown else None
    if len(words) <= 1 or any(PLACEHOLDER.fullmatch(word) for word in words):  # it is only named
        (named,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
        if not words or words[0] not in named.choices:
            return f"there is no command {words[0]}" if words else None
        flags = named.choices[words[0]]._option_string_actions
        unknown = [word for word in words if word.startswith("--") and word not in flags]
        return f"it has no {unknown[0]}" if unknown else None
    try:
        build_parser().parse_args(words)
    except SystemExit as refusal:
        return str(refusal.code)
    return None


def test_every_command_line_in_the_documents_parses(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(path, *command) for path in DOCUMENTS for command in commands(path.read_text())]
    assert len(found) > 12, "the documents name the commands"
    faults = []
    for path, module, words in found:
        if (wrong := fault(module, words, capsys)) is not None:
            faults.append(f"{path.name}: python -m {module} {shlex.join(words)}: {wrong}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python -m elora_sglang.eval live --no-such-flag", "--no-such-flag"),
        ("`python -m elora_sglang.eval lively`", "no command lively"),
        ("`elora-eval live --rates fast,2`", "--rates"),
        ("python -m elora_sglang.eval live \\\n  --workload poetry", "poetry"),
        ("`… fly --rates LIST`", "no command fly"),
        ("`… live --rate LIST`", "it has no --rate"),
        ("python -m elora_sglang.eval.gpu.loop_bench --no-such-flag x", "it has no --no-such-flag"),
    ],
)
def test_a_wrong_line_is_found(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    ((module, arguments),) = commands(line if line.startswith("`") else f"Run\n\n```\n{line}\n```\n")
    assert words in (fault(module, arguments, capsys) or "")


def test_redirections_and_spans_are_not_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    text = "`python -m elora_sglang.eval\nsimulate --json > RUN.json` and `--series`, or `elora-eval report RUN.json …`"
    assert commands(text) == [
        ("elora_sglang.eval", ["simulate", "--json"]),
        ("elora_sglang.eval", ["report", "RUN.json"]),
    ]
