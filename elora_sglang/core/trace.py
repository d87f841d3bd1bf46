"""Record a manager's events and answers, one JSON line each, and replay them on fresh managers.

    python -m elora_sglang.core.trace FILE

feeds the recorded events to two fresh managers and compares every answer of both with the recorded one; exit
status 1 and one line at the first difference. Payloads are not recorded: no decision depends on them.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import wraps
from typing import Any, NamedTuple

from elora_sglang.core.actions import Free, FreeHost, Item, Load, Read, Save
from elora_sglang.core.admission import Ask, Entry, Holding
from elora_sglang.core.costs import Costs
from elora_sglang.core.hints import Hints
from elora_sglang.core.manager import EVENTS, CacheManager, SwapSettings
from elora_sglang.core.tree.node import Insert, Match, Node

VERSION = 2


class SizeFreePayloads:
    """Payload operations for managers without bytes: everything is ``None``."""

    def slice(self, payload: Any, start: int, stop: int) -> None:
        """No payload."""
        return None

    def split(self, payload: Any, at: int) -> tuple[None, None]:
        """No payload on either side."""
        return None, None


class Recorder:
    """Writes every event of ``manager`` to ``sink``, one line of JSON at a time, the settings first.

    Replaces the manager's event methods on the instance; events that events call are not recorded.
    """

    def __init__(self, manager: CacheManager, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._depth = 0
        sink(json.dumps(_header(manager)))
        for name in EVENTS:
            setattr(manager, name, self._recording(name, getattr(manager, name)))

    def _recording(self, name: str, event: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(event)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return event(*args, **kwargs)
            # Before the call: it may change what its arguments say.
            said = [name, [_encode(arg) for arg in args], {key: _encode(arg) for key, arg in kwargs.items()}]
            self._depth += 1
            try:
                result = event(*args, **kwargs)
            finally:
                self._depth -= 1
            self._sink(json.dumps([*said, _encode_result(result)], separators=(",", ":")))
            return result

        return recorded


def _header(manager: CacheManager) -> dict[str, Any]:
    settings = asdict(manager.settings)
    settings["switched_off"] = sorted(manager.settings.switched_off)
    return {
        "version": VERSION,
        "page_size": manager.page_size,
        "device_slots": manager.device_slots,
        "policy": manager.policy_name,
        "settings": settings,
        "costs": asdict(manager.costs),
    }


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Node):
        return {"node": value.id}
    if isinstance(value, array):
        return {"tokens": base64.b64encode(array("i", value).tobytes()).decode()}
    if isinstance(value, Costs):
        return {"costs": asdict(value)}
    if isinstance(value, Hints):
        return {"hints": asdict(value)}
    if isinstance(value, Ask):
        return {"ask": list(value)}
    if isinstance(value, Holding):
        return {"holding": [value.rid, value.adapter, value.own, value.node.id]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_encode(one) for one in value]}
    return {"payload": None}


def _encode_result(result: Any) -> Any:
    if isinstance(result, Match):
        return [result.node.id, result.length, result.host_node.id, result.host_length]
    if isinstance(result, Insert):
        return [result.node.id, result.matched]
    if isinstance(result, Node):
        return result.id
    if isinstance(result, Entry):
        return ["entry", *result]
    if isinstance(result, Load):
        return ["load", result.transfer, result.why, result.rid, [_item(item) for item in result.items]]
    if isinstance(result, Save):
        return ["save", result.transfer, [_item(item) for item in result.items]]
    if isinstance(result, Read):
        return ["read", result.transfer, result.key, result.size]
    if isinstance(result, Free):
        return ["free", [[v.node_id, v.size, v.fate, v.transfer] for v in result.victims]]
    if isinstance(result, FreeHost):
        return ["free_host", [[v.node_id, v.size, v.gone] for v in result.victims]]
    if isinstance(result, list):
        return [_encode_result(one) for one in result]
    return result


def _item(item: Item) -> list[Any]:
    return [item.node_id, item.kind, item.size]


class ReplayResult(NamedTuple):
    """How many events were replayed, and the first difference in words (``None``: there is none)."""

    events: int
    mismatch: str | None


class _Player:
    def __init__(self, header: dict[str, Any]) -> None:
        if header.get("version") != VERSION:
            raise ValueError(f"trace version {header.get('version')!r} cannot be replayed, only {VERSION}")
        settings = {**header["settings"], "switched_off": frozenset(header["settings"]["switched_off"])}
        self.manager = CacheManager(
            header["page_size"],
            header["device_slots"],
            header["policy"],
            SizeFreePayloads(),
            SwapSettings(**settings),
            Costs(**header["costs"]),
        )
        self._nodes: dict[int, Node] = {}

    def play(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name not in EVENTS:
            raise ValueError(f"unknown event {name!r}")
        event = getattr(self.manager, name)
        result = event(*(self._decode(a) for a in args), **{k: self._decode(a) for k, a in kwargs.items()})
        self._remember(result)
        return _encode_result(result)

    def _remember(self, result: Any) -> None:
        if isinstance(result, Node):
            self._nodes[result.id] = result
        elif isinstance(result, Match | Insert):
            for part in result:
                self._remember(part)

    def _node(self, id: int) -> Node:
        if id not in self._nodes:
            self._nodes = {node.id: node for node in self.manager.tree.walk()} | self._nodes
        return self._nodes[id]

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "node":
            return self._node(inner)
        if kind == "tokens":
            found = array("i")
            found.frombytes(base64.b64decode(inner))
            return array("q", found)
        if kind == "costs":
            return Costs(**inner)
        if kind == "hints":
            return Hints(**inner)
        if kind == "ask":
            return Ask(*inner)
        if kind == "holding":
            rid, adapter, own, node = inner
            return Holding(rid, adapter, own, self._node(node))
        if kind in ("list", "tuple"):
            decoded = [self._decode(one) for one in inner]
            return decoded if kind == "list" else tuple(decoded)
        return None


def replay(lines: Iterable[str], players: int = 2) -> ReplayResult:
    """Feed recorded ``lines`` to fresh managers and compare their answers with the recorded ones.

    Raises:
        ValueError: the lines are no trace, or of another version.
    """
    source = iter(lines)
    first = next(source, None)
    if first is None:
        raise ValueError("the trace is empty")
    managers = [_Player(json.loads(first)) for _ in range(players)]
    events = 0
    for events, line in enumerate(source, 1):
        name, args, kwargs, recorded = json.loads(line)
        for number, player in enumerate(managers):
            answer = json.loads(json.dumps(player.play(name, args, kwargs)))
            if answer != recorded:
                return ReplayResult(
                    events, f"event {events} ({name}): manager {number} answers {answer}, recorded {recorded}"
                )
    return ReplayResult(events, None)


def main(argv: list[str]) -> int:
    """Replay one file; exit status 1 at a difference, 2 for anything that is no trace."""
    if len(argv) != 1:
        print("usage: python -m elora_sglang.core.trace FILE", file=sys.stderr)
        return 2
    try:
        with open(argv[0], encoding="utf-8") as lines:
            result = replay(lines)
    except (OSError, ValueError, KeyError) as error:
        print(f"{argv[0]}: {error}", file=sys.stderr)
        return 2
    print(result.mismatch or f"{result.events} events: both managers decide as recorded")
    return int(result.mismatch is not None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
