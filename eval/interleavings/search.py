"""Breadth first through all states; the first broken rule found is one with the shortest way to it.

A state is remembered as 16 bytes and the way back, and made again by replaying its events: nothing of the core has to
be copied, memory stays small, and a state whose name differs when made again has broken I6.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elora_sglang.core.errors import InvariantError
from elora_sglang.eval.interleavings import audit, canonical
from elora_sglang.eval.interleavings.scenes import Event, Scene
from elora_sglang.eval.interleavings.world import World


@dataclass
class Found:
    """A broken rule, and the shortest sequence of events that leads to it."""

    path: list[Event]
    error: str


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
        found = self._visit([], -1)
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

    def _explored(
        self, depth: int, done: bool, seconds: float, levels: list[int], found: Found | None
    ) -> Explored:
        longest = found.path if found is not None else self.path(len(self._parents) - 1)
        return Explored(
            len(self._parents), self.transitions, depth, done, seconds, levels, longest, found
        )

    def _expand(self, state: int) -> Found | None:
        path = self.path(state)
        world: World | None = self.replay(path)
        assert world is not None
        if self._seen.get(canonical.name(world)) != state:
            return Found(path, "I6: the same events led to another state than before")
        for event in world.events():
            # The first event is tried in the world at hand, each other one in a new one.
            found = self._visit([*path, event], state, world)
            world = None
            if found is not None:
                return found
        return None

    def _visit(self, path: list[Event], parent: int, world: World | None = None) -> Found | None:
        """Make the last event happen; check where it leads, and remember that if it is new."""
        try:
            if world is None:
                world = self.replay(path)
            elif path:
                world.apply(path[-1])
            self.transitions += bool(path)
            name = canonical.name(world)
            if name in self._seen:
                return None
            audit.check(world)
            self._add(name, parent, path[-1] if path else None)
            if self._ending:
                audit.check_end(world)
        except Exception as error:  # whatever the core raises is a finding
            return Found(path, f"{type(error).__name__}: {error}")
        return None


def told(path: list[Event]) -> Iterator[str]:
    """Events in words, one line each."""
    for event in path:
        name, *args = event
        shown = [" ".join(map(str, arg)) if isinstance(arg, tuple) else str(arg) for arg in args]
        yield f"{name} {', '.join(shown)}".rstrip()
