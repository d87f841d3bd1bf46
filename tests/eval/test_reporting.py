"""The shared reporting habit and the command dispatcher."""

from __future__ import annotations

import argparse
import json

import pytest

from elora_sglang.eval.cli import build_parser
from elora_sglang.eval.support import reporting
from elora_sglang.eval.support.provenance import command


def _finish(argv: list[str], *, ok: bool) -> int:
    parser = argparse.ArgumentParser()
    reporting.add_arguments(parser)
    aims = [reporting.Aim("speed", 2.0, 1.0, ok)]
    table = reporting.Table("t", ["name", "ms"], [["row", 1.5]], "speeds")
    return reporting.finish(parser.parse_args(argv), [table], aims, {"seed": 3})


def test_json_is_one_object_with_aims_beside_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert _finish(["--json"], ok=False) == 0
    parsed = json.loads(capsys.readouterr().out)
    run = parsed.pop("run")
    assert {"date", "command", "hardware", "versions"} <= set(run) and run["versions"]["sglang"]
    table = {"title": "t", "header": ["name", "ms"], "rows": [["row", 1.5]], "name": "speeds"}
    aim = {"name": "speed", "value": 2.0, "aim": 1.0, "ok": False}
    assert parsed == {"aims": [aim], "tables": [table], "seed": 3}


def test_table_shows_rows_and_missed_aims(capsys: pytest.CaptureFixture[str]) -> None:
    assert _finish([], ok=False) == 0
    shown = capsys.readouterr().out
    assert ["row", "1.5"] in [line.split() for line in shown.splitlines()]
    assert "MISSED  speed: 2 (aim: 1.0)" in shown


def test_a_table_aligns_names_left_and_figures_right_and_changes_no_cell() -> None:
    shown = reporting.Table("t", ["name", "ms"], [["a", "1.50"], ["longer", 12], ["none", ""]]).text()
    assert [line for line in shown.splitlines() if "-" not in line] == [
        "t", "", "name      ms", "a       1.50", "longer    12", "none",
    ]  # fmt: skip
    assert reporting.Table("nothing", ["results"], []).text().startswith("nothing\n\nresults")


def test_aims_say_on_which_side_of_the_limit_they_are_met() -> None:
    assert reporting.Aim.at_most("x", 0.5, 0.54) == reporting.Aim("x", 0.5, "<= 0.54", True)
    assert reporting.Aim.at_least("x", 0.5, 1.8) == reporting.Aim("x", 0.5, ">= 1.8", False)


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_strict_turns_a_missed_aim_into_the_exit_status(ok: bool, status: int) -> None:
    assert _finish(["--strict"], ok=ok) == status


@pytest.mark.parametrize("key", ["aims", "run", "tables"])
def test_data_cannot_hide_the_aims_or_where_it_comes_from(key: str) -> None:
    args = argparse.Namespace(json=True, strict=False)
    with pytest.raises(ValueError, match=key):
        reporting.finish(args, [], [], {key: []})


def test_the_command_of_a_result_holds_no_path_of_this_machine() -> None:
    argv = ["/home/somebody/elora_sglang/eval/__main__.py", "live", "--compare", "stock,elora"]
    assert command(argv) == "python -m elora_sglang.eval live --compare stock,elora"
    assert command(["/usr/bin/elora-eval", "micro"]) == "elora-eval micro"
    argv = ["elora-eval", "reproduce", "--trace", "/data/a b.jsonl", "--state=/tmp/cells", "--set", "turns=6"]
    assert command(argv) == "elora-eval reproduce --trace 'a b.jsonl' --state=cells --set turns=6"


def test_commands_are_found_by_being_there() -> None:
    subcommands = build_parser()._subparsers
    assert subcommands is not None
    assert "micro" in subcommands._group_actions[0].choices  # type: ignore[operator]
