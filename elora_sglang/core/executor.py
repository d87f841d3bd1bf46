"""Carries out what the manager decides: one loop over its actions, for every runtime.

The manager says what is to happen; a :class:`Backend` knows how. The server's backend moves bytes
(``runtime/swap_driver.py``), the simulator's counts them (``eval/sim/unified.py``). Both are told of every action in
the same order, and both report back what could not be started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from elora_sglang.core.actions import Action, Free, FreeHost, Load, Read, Save
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.tree.node import HostVictim, Node, Victim


class Backend(Protocol):
    """What a runtime can do with slots and bytes. It decides nothing.

    A copy that was started is answered to the manager (``loaded``, ``saved``) before the call returns. One that could
    not be started is only reported: the executor takes it back.
    """

    def available(self) -> int:
        """Device slots that nobody has."""
        ...

    def spares(self, need: int) -> bool:
        """Whether a copy may take ``need`` device slots without touching what running requests were promised."""
        ...

    def free(self, victims: Sequence[Victim]) -> list[int]:
        """Give device slots back, after starting the copies of those with fate ``saved``.

        Returns:
            The transfers that could not be started.
        """
        ...

    def free_host(self, victims: Sequence[HostVictim]) -> None:
        """Give host slots back."""
        ...

    def load(self, action: Load) -> bool:
        """Start a copy to the device. False, with nothing changed, if that is not possible."""
        ...

    def place(self, action: Save) -> Any | None:
        """Give the nodes of a save their host slots; the copy itself is still to start. ``None``: not possible."""
        ...

    def start(self, placed: Sequence[Any]) -> list[int]:
        """Start the copies of what :meth:`place` returned, as one.

        Returns:
            The transfers that could not be started.
        """
        ...

    def read(self, action: Read) -> bool:
        """Begin to read an adapter's file into host slots. False if that is not possible."""
        ...

    def read_to_device(self, node: Node) -> Any | None:
        """Bring an adapter from its file to device slots, and wait for it.

        Returns:
            The slots' payload; ``None``, with nothing changed, if there is no room.
        """
        ...


class Executor:
    """Drives one backend by one manager. Every call may change both."""

    def __init__(self, manager: CacheManager, backend: Backend) -> None:
        self.manager, self.backend = manager, backend

    def run(self, actions: Iterable[Action]) -> int:
        """Carry out the actions in order; returns the device slots that were freed."""
        freed, todo, placed = 0, deque(actions), []
        while todo:
            action = todo.popleft()
            if isinstance(action, FreeHost):
                self.backend.free_host(action.victims)
                continue
            if isinstance(action, Save):
                one = self.backend.place(action)
                if one is None:
                    freed += self._take_back([action.transfer])
                else:
                    placed.append(one)
                continue
            freed += self._start(placed)  # what comes next on the link stays behind them
            placed = []
            if isinstance(action, Free):
                freed += sum(victim.size for victim in action.victims if victim.payload is not None)
                freed += self._take_back(self.backend.free(action.victims))
            elif isinstance(action, Read):
                if not self.backend.read(action):
                    freed += self._take_back([action.transfer])
            elif not self._launch(action):
                # Later loads may build on this one's nodes: they are taken back first.
                later = [other.transfer for other in todo if isinstance(other, Load)]
                todo = deque(other for other in todo if not isinstance(other, Load))
                freed += self._take_back([*reversed(later), action.transfer])
        return freed + self._start(placed)

    def load(self, action: Load) -> bool:
        """Start one load; False, with the load taken back, when that was not possible."""
        started = self._launch(action)
        if not started:
            self._take_back([action.transfer])
        return started

    def make_room(self, need: int) -> None:
        """Evict until ``need`` device slots are free, as far as anything may go."""
        shortfall = need - self.backend.available()
        if shortfall > 0:
            self.run(self.manager.evict(shortfall))

    def bring_in(self, node: Node) -> bool:
        """Bring an adapter to the device: from the host if it is there, else from its file.

        Evicts what it must. Returns False, with nothing changed but evictions, when even that makes no room.
        Raises what the backend raises for a file that is gone, broken or has other content.
        """
        if node.clean:
            load = self.manager.load_for(node)
            if load is not None and self.load(load):
                return True
        self.make_room(node.size)
        payload = self.backend.read_to_device(node)
        if payload is None:
            return False
        self.manager.make_resident(node, payload)
        return True

    def _launch(self, action: Load) -> bool:
        if not self.backend.spares(action.size):
            return False
        self.make_room(action.size)
        return self.backend.load(action)

    def _start(self, placed: Sequence[Any]) -> int:
        return self._take_back(self.backend.start(placed)) if placed else 0

    def _take_back(self, transfers: Iterable[int]) -> int:
        """These copies did not start: their nodes lose what they had gained."""
        return sum(self.run(self.manager.failed(transfer)) for transfer in transfers)
