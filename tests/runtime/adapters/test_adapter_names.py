"""The rule of every spelling (docs/adapters.md), each with the case beside it that must not follow it."""

from __future__ import annotations

from typing import Any

import pytest

from elora_sglang.runtime.adapters.names import (
    NameFault,
    adapter_of_model,
    check_new_name,
    nearest,
    resolve,
    unknown_adapter,
)

SERVED = "models/base"
LOADED = ["sql", "sql-v2", "legal", "chat", "medical", "code", "a:b"]

SAME = [
    # model, lora_path -> lora_path
    ("", None, None),
    ("default", None, None),
    (SERVED, None, None),
    (SERVED, "sql", "sql"),
    ("default", ["sql", None, "chat"], ["sql", None, "chat"]),
    (SERVED, "", ""),
    (f"{SERVED}:sql", None, "sql"),
    (f"{SERVED}: sql ", None, "sql"),
    ("default:sql", None, "sql"),
    (f"{SERVED}:a:b", None, "a:b"),
    ("sql", None, "sql"),
    ("a:b", None, "a:b"),
    ("sql", "sql", "sql"),
    ("sql", "", "sql"),
    (f"{SERVED}:sql", "sql", "sql"),
    ("sql", ["sql", "sql"], ["sql", "sql"]),
]

FAULTS = [
    ("", "sqll", 404, "Unknown adapter 'sqll'"),
    (SERVED, ["sql", "nope"], 404, "Unknown adapter 'nope'"),
    (f"{SERVED}:nope", None, 404, "Unknown adapter 'nope'"),
    (f"{SERVED}:", None, 404, "Unknown adapter ''"),
    ("gpt-4", None, 404, "Unknown model 'gpt-4'"),
    ("other:sql", None, 404, "Unknown model 'other:sql'"),
    ("SQL", None, 404, "Unknown model 'SQL'"),
    ("gpt-4", "sql", 404, "Unknown model 'gpt-4'"),
    ("sql", "chat", 400, "model names the adapter 'sql' and lora_path names 'chat'"),
    (f"{SERVED}:sql", "chat", 400, "lora_path names 'chat'"),
    ("sql", ["sql", None], 400, "lora_path names None"),
    ("sql", ["sql", "chat"], 400, "lora_path names 'chat'"),
]


@pytest.mark.parametrize(("model", "lora_path", "meant"), SAME)
def test_spelling(model: str, lora_path: Any, meant: Any) -> None:
    assert resolve(model, lora_path, SERVED, LOADED) == meant


@pytest.mark.parametrize(("model", "lora_path", "status", "words"), FAULTS)
def test_wrong_spelling(model: str, lora_path: Any, status: int, words: str) -> None:
    with pytest.raises(NameFault) as caught:
        resolve(model, lora_path, SERVED, LOADED)
    assert caught.value.status_code == status and words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_five_nearest_are_named() -> None:
    assert nearest("sqll", LOADED)[:2] == ["sql", "sql-v2"]
    assert len(nearest("zzz", LOADED)) == 5
    text = str(unknown_adapter("sqll", LOADED))
    assert text.index("sql,") < text.index("sql-v2") and text.count(",") >= 4
    assert "no adapter is loaded" in str(unknown_adapter("sql", []))


def test_an_unloaded_name_is_no_model_any_more() -> None:
    assert adapter_of_model("sql", SERVED, ["sql"]) == "sql"
    with pytest.raises(NameFault):
        adapter_of_model("sql", SERVED, [])


@pytest.mark.parametrize("name", ["", " sql", "sql ", SERVED, "default", f"{SERVED}:sql", "default:x"])
def test_names_that_would_be_ambiguous(name: str) -> None:
    assert check_new_name(name, SERVED) is not None


@pytest.mark.parametrize("name", ["sql", "a:b", "folder/adapter", "models/base2"])
def test_names_that_are_fine(name: str) -> None:
    assert check_new_name(name, SERVED) is None
