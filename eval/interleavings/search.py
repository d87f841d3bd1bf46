"""Breadth first through all states; the first broken rule found is one with the shortest way to it.

A state is remembered as 16 bytes and the way back, so memory stays small. It is made again by replaying its events
once, and from a snapshot for each event that may follow. One whose name differs when it is made again has broken I6.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from elora_sglang.eval.interleavings import audit, canonical, snapshot
from elora_sglang.eval.interleavings.scenes import Event, Scene
from elora_sglang.eval.interleavings.world import World


@dataclass
class Found:
    """A broken rule, the shortest sequence of events that leads to it, and how everything was let end after that."""

    path: list[Event]
    error: str
    ending: list[Event] = field(default_factory=list)


@dataclass
class Explored:
    """What was seen.

    Attributes:
        states, transitions: different states, and events tried in them.
        depth: events up to which all states were seen.
        complete: whether there is nothing beyond.
        longest: a way to one of the last states.
        levels: how many states are first reached after 0, 1, 2, ... events.
    """

    states: int
    transitions: int
    depth: int
    complete: bool
    seconds: float
    levels: list[int]
    longest: list[Event]
    found: Found | None = None


class Explorer:
    """The states of one scene.

    Args:
        scene: what there is.
        ending: whether to try, from each new state, that everything ends.
    """

    def __init__(self, scene: Scene, *, ending: bool = True) -> None:
        self.scene, self._ending = scene, ending
        self._seen: dict[bytes, int] = {}
        self._parents, self._events = array("q"), array("q")
        self._kinds: dict[Event, int] = {}
        self._by_kind: list[Event] = []
        self.transitions = 0

    # -- states -----------------------------------------------------------------------------------

    def path(self, state: int) -> list[Event]:
        """The events that lead to a state."""
        path = []
        while state:
            path.append(self._by_kind[self._events[state]])
            state = self._parents[state]
        path.reverse()
        return path

    def replay(self, path: list[Event]) -> World:
        """The world after these events."""
        world = World(self.scene)
        for event in path:
            world.apply(event)
        return world

    def _add(self, name: bytes, parent: int, event: Event | None) -> int:
        number = self._seen[name] = len(self._parents)
        if event is None:
            kind = -1
        else:
            kind = self._kinds.setdefault(event, len(self._kinds))
            if kind == len(self._by_kind):
                self._by_kind.append(event)
        self._parents.append(parent)
        self._events.append(kind)
        return number

    # -- the search -------------------------------------------------------------------------------

    def run(
        self, depth: int, seconds: float = float("inf"), clock: Callable[[], float] = time.perf_counter
    ) -> Explored:
        """See all states up to ``depth`` events; stop at the first broken rule, or after so many seconds."""
        started = clock()
        found = self._begin()
        levels, begin, level = [len(self._parents)], 0, 0
        while found is None and begin < len(self._parents) and level < depth:
            end = len(self._parents)
            for state in range(begin, end):
                if clock() - started > seconds:
                    return self._explored(level, False, clock() - started, levels, None)
                found = self._expand(state)
                if found is not None:
                    break
            else:
                level += 1
                begin = end
                levels.append(len(self._parents) - end)
        done = found is None and begin == len(self._parents)
        return self._explored(level, done, clock() - started, levels, found)

    def _begin(self) -> Found | None:
        try:
            world = World(self.scene)
        except Exception as error:
            return Found(list(self.scene.before), f"before the search: {_line(error)}")
        return self._visit(world, [], None, -1)

    def _explored(
        self, depth: int, done: bool, seconds: float, levels: list[int], found: Found | None
    ) -> Explored:
        longest = found.path if found is not None else self.path(len(self._parents) - 1)
        return Explored(len(self._parents), self.transitions, depth, done, seconds, levels, longest, found)

    def _expand(self, state: int) -> Found | None:
        path = self.path(state)
        world = self.replay(path)
        if self._seen.get(canonical.name(world)) != state:
            return Found(path, "I6: the same events led to another state than before")
        taken = snapshot.take(world)
        for event in world.events():
            world = snapshot.make(taken)
            self.transitions += 1
            found = self._visit(world, path, event, state)
            if found is not None:
                return found
        return None

    def _visit(self, world: World, path: list[Event], event: Event | None, parent: int) -> Found | None:
        """Let one more event happen; check where it leads, and remember that if it is new."""
        path = [*path, event] if event is not None else path
        try:
            if event is not None:
                world.apply(event)
            name = canonical.name(world)
            if name in self._seen:
                return None
            audit.check(world)
        except Exception as error:  # whatever the core raises is a finding
            return Found(path, _line(error))
        self._add(name, parent, event)
        return self._end(world, path) if self._ending else None

    def _end(self, world: World, path: list[Event]) -> Found | None:
        """Try that everything ends; uses the world up."""
        ending: list[Event] = []
        try:
            for event in audit.ending(world):
                ending.append(event)
                world.apply(event)
            audit.check_empty(world)
        except Exception as error:
            return Found(path, _line(error), ending)
        return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def record(scene: Scene, path: list[Event]) -> str:
    """The manager's events and answers along a path, then until everything ended: a trace of ``core/trace.py``."""
    lines: list[str] = []
    world = World(scene, sink=lines.append)
    for event in path:
        world.apply(event)
    for event in audit.ending(world):
        world.apply(event)
    return "\n".join(lines) + "\n"


def told(found: Found) -> Iterator[str]:
    """The events that lead to a broken rule in words, one line each."""
    for event in found.path:
        yield f"  {_words(event)}"
    if found.ending:
        yield "  and then, for everything to end:"
        for event in found.ending:
            yield f"    {_words(event)}"


def _words(event: Event) -> str:
    name, *args = event
    if name == "tick":
        which, ok = args
        ended = "no copy" if which is None else "all copies" if which == "all" else f"copy {which}"
        return f"tick: {ended} ended{'' if ok else ', failed'}"
    shown = [
        " ".join(map(str, arg)) if isinstance(arg, tuple) else str(arg) for arg in args if arg is not None
    ]
    who = "base model: " if name == "ask" and args[0] is None else ""
    return f"{name} {who}{', '.join(shown)}".rstrip()
