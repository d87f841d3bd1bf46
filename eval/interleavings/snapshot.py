"""A world that can be made again any number of times, without replaying what led to it.

Pickled in memory, for the time that one state is expanded. The core keeps a few functions that see its objects (keys of
heaps); they are taken apart and put together around the new objects.
"""

from __future__ import annotations

import io
import pickle
from types import CellType, FunctionType
from typing import Any

from elora_sglang.core.tree.candidates import Candidates
from elora_sglang.eval.interleavings.world import World

#: The code of every function met so far, by itself: it never leaves the process.
_FUNCTIONS: dict[int, FunctionType] = {}


class _Pickler(pickle.Pickler):
    """Takes apart what ``pickle`` does not: inner functions, and heaps that read a node's attribute directly."""

    def reducer_override(self, obj: Any) -> Any:
        """See :meth:`pickle.Pickler.reducer_override`."""
        kind = type(obj)
        if kind is FunctionType and obj.__closure__ is not None:
            known = id(obj.__code__)
            _FUNCTIONS[known] = obj
            cells = tuple(cell.cell_contents for cell in obj.__closure__)
            return _new_function, (known, len(cells)), cells, None, None, _fill_cells
        if kind is Candidates:
            state = {name: getattr(obj, name) for name in ("_key", "_may", "_heap")}
            return (
                Candidates.__new__,
                (Candidates,),
                (obj._get.__self__.__name__, state),
                None,
                None,
                _fill_heap,
            )
        return NotImplemented


def _new_function(known: int, cells: int) -> FunctionType:
    like = _FUNCTIONS[known]
    empty = tuple(CellType() for _ in range(cells))
    return FunctionType(like.__code__, like.__globals__, like.__name__, like.__defaults__, empty)


def _fill_cells(function: FunctionType, cells: tuple[Any, ...]) -> None:
    assert function.__closure__ is not None
    for cell, content in zip(function.__closure__, cells, strict=True):
        cell.cell_contents = content


def _fill_heap(heap: Candidates, state: tuple[Any, dict[str, Any]]) -> None:
    slot, attributes = state
    heap._get, heap._set = _accessors(slot)
    for name, value in attributes.items():
        setattr(heap, name, value)


def _accessors(slot: str) -> tuple[Any, Any]:
    from elora_sglang.core.tree.node import Node

    descriptor = Node.__dict__[slot]
    return descriptor.__get__, descriptor.__set__


def take(world: World) -> bytes:
    """The world as bytes; it can go on."""
    target = io.BytesIO()
    _Pickler(target, pickle.HIGHEST_PROTOCOL).dump(world)
    return target.getvalue()


def make(snapshot: bytes) -> World:
    """A new world that is where the old one was."""
    world: World = pickle.loads(snapshot)
    return world
