"""Both pools of slots with what is in them, and copies that end when somebody says so.

The backend of ``core/executor.py``. What may run beside what is the table of ARCHITECTURE.md ("where two copies meet").
A slot that is freed or written while a copy in flight needs it is an error here, not a race that may go well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from elora_sglang.core.actions import Load, Read, Save
from elora_sglang.core.errors import InvariantError
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.tree.node import HostVictim, Node, Victim

Slots = tuple[int, ...]

#: Host slots are numbered from here, so that no slot of one tier passes for one of the other.
HOST = 1000

#: What a copy that failed leaves in its targets.
GARBAGE = "garbage"


class TuplePayloads:
    """Payload operations on tuples of slots."""

    def slice(self, payload: Slots, start: int, stop: int) -> Slots:
        """The slots of ``[start, stop)``."""
        return payload[start:stop]

    def split(self, payload: Slots, at: int) -> tuple[Slots, Slots]:
        """The first ``at`` slots, and the rest."""
        return payload[:at], payload[at:]


class BrokenFile(Exception):
    """An adapter's file cannot be read now."""


@dataclass
class Copy:
    """A copy in flight, from its start until the manager was told of its end.

    Attributes:
        kind: as of the transfers it carries.
        transfers: what it is to the manager; the saves of one plan are one copy.
        source, target: slot i goes to slot i; a read has no source.
        content: what a read brings.
        released: a save whose device slots were given away already.
        arrived: its bytes are there, and it will be reported as well.
    """

    kind: Literal["load", "save", "read"]
    transfers: list[int]
    source: Slots
    target: Slots
    content: tuple[object, ...] = ()
    released: bool = False
    arrived: bool = False


class Memory:
    """Device and host slots, their bytes, and the copies between them.

    Attributes:
        free_slots, free_host_slots: the next one is taken from the end.
        bytes: what a slot holds: the adapter's content and the tokens up to there, or a piece of an adapter.
        copies: in flight, in order of their start.
        jammed: the next copy cannot be started.
        file_broken: an adapter's file cannot be read while it is awaited.
        versions: which content an adapter's name stands for now.
    """

    def __init__(self, manager: CacheManager, device: int, host: int) -> None:
        self.manager = manager
        self.sizes = (device, host)
        self.versions: dict[str, int] = {}
        self.jammed = self.file_broken = False
        self.clear()

    def clear(self) -> None:
        """A flush: nothing is in flight, all slots are free."""
        device, host = self.sizes
        self.free_slots = list(range(device))
        self.free_host_slots = list(range(HOST, HOST + host))
        self.bytes: dict[int, object] = {}
        self.copies: list[Copy] = []

    # -- slots ------------------------------------------------------------------------------------

    def take(self, size: int) -> Slots:
        """Device slots; there must be so many."""
        return _take(self.free_slots, size)

    def give_back(self, slots: Iterable[int]) -> None:
        """Device slots that nobody has any more."""
        slots = list(slots)
        for copy in self.copies:
            if copy.kind == "load":
                _apart(slots, copy.target, f"device slots are freed while {copy} writes them")
            elif copy.kind == "save" and not copy.released:
                _apart(slots, copy.source, f"device slots are freed while {copy} reads them")
        _apart(slots, self.free_slots, "device slots are freed twice")
        self.free_slots.extend(slots)

    def give_back_host(self, slots: Iterable[int]) -> None:
        """Host slots that nobody has any more."""
        slots = list(slots)
        for copy in self.copies:
            if copy.kind == "load":
                _apart(slots, copy.source, f"host slots are freed while {copy} reads them")
            else:
                _apart(slots, copy.target, f"host slots are freed while {copy} writes them")
        _apart(slots, self.free_host_slots, "host slots are freed twice")
        self.free_host_slots.extend(slots)

    def write(self, slots: Slots, content: Sequence[object]) -> None:
        """A batch, or the reading of a file, writes device slots. Waits for released saves that read them."""
        for copy in list(self.copies):
            if copy.arrived:
                continue
            if copy.kind == "load":
                _apart(slots, copy.target, f"device slots are written while {copy} writes them")
            elif copy.kind == "save" and not set(slots).isdisjoint(copy.source):
                if not copy.released:
                    raise InvariantError(f"I4: device slots are written while {copy} reads them")
                self.arrive(copy)
        self.bytes.update(zip(slots, content, strict=True))

    def expect(self, slots: Slots, content: Sequence[object]) -> None:
        """A batch reads device slots, which must hold this."""
        found = [self.bytes.get(slot) for slot in slots]
        if found != list(content):
            raise InvariantError(f"bytes: a batch reads {found}, it needs {list(content)}")

    # -- copies -----------------------------------------------------------------------------------

    def arrive(self, copy: Copy) -> None:
        """The bytes are there now, after those of all copies that had to come first."""
        if copy.arrived:
            return
        self._await_others(copy)
        copy.arrived = True
        content = copy.content or tuple(self.bytes[slot] for slot in copy.source)
        self.bytes.update(zip(copy.target, content, strict=True))

    def fail(self, copy: Copy) -> None:
        """It ends without its bytes, when it could have had them. It is reported by who calls this."""
        self._await_others(copy)
        self.copies.remove(copy)
        self.bytes.update(dict.fromkeys(copy.target, GARBAGE))

    def _await_others(self, copy: Copy) -> None:
        for before in self.copies[: self.copies.index(copy)]:
            if not before.arrived and _comes_first(before, copy):
                self.arrive(before)

    def settle(self, node: Node) -> None:
        """The fence of a batch that reads ``node`` and all above it."""
        ids = set()
        while node.parent is not None:
            ids.add(node.transfer)
            node = node.parent
        for copy in list(self.copies):
            if copy.kind == "load" and not ids.isdisjoint(copy.transfers):
                self.arrive(copy)

    def _launch(self, copy: Copy) -> None:
        for other in self.copies:
            if other.arrived:
                continue
            _apart(copy.target, other.target, f"{copy} writes what {other} writes")
            if not set(copy.target).isdisjoint(other.source) and not other.released:
                raise InvariantError(f"I4: {copy} writes what {other} reads")
        self.copies.append(copy)

    def _jams(self) -> bool:
        jams, self.jammed = self.jammed, False
        return jams

    # -- the executor's backend -------------------------------------------------------------------

    def available(self) -> int:
        """Device slots that nobody has."""
        return len(self.free_slots)

    def spares(self, need: int) -> bool:
        """Running requests were promised nothing here."""
        return True

    def free(self, victims: Sequence[Victim]) -> list[int]:
        """Device slots of victims, after the copies of those that are saved have been started."""
        failed = []
        for victim in victims:
            if victim.fate == "saved":
                assert victim.transfer is not None
                if self._jams():
                    failed.append(victim.transfer)
                else:
                    target = self._host_slots(victim.size)
                    self.manager.saved(victim.transfer, [target])
                    self._launch(Copy("save", [victim.transfer], victim.payload, target, released=True))
            self.give_back(victim.payload or ())
        return failed

    def free_host(self, victims: Sequence[HostVictim]) -> None:
        """Host slots of victims."""
        for victim in victims:
            self.give_back_host(victim.payload or ())

    def _host_slots(self, size: int) -> Slots:
        if size > len(self.free_host_slots):
            raise InvariantError(f"I2: the manager promised {size} host slots that do not exist")
        return _take(self.free_host_slots, size)

    def load(self, action: Load) -> bool:
        """Device slots, and a copy into them."""
        if self._jams() or action.size > len(self.free_slots):
            return False
        parts = [self.take(item.size) for item in action.items]
        self.manager.loaded(action.transfer, parts)
        source = [slot for item in action.items for slot in item.host_payload]
        self._launch(Copy("load", [action.transfer], tuple(source), tuple(s for part in parts for s in part)))
        return True

    def place(self, action: Save) -> Copy | None:
        """Host slots for a copy that :meth:`start` starts."""
        if self._jams():
            return None
        parts = [self._host_slots(item.size) for item in action.items]
        self.manager.saved(action.transfer, parts)
        source = tuple(slot for item in action.items for slot in item.payload)
        return Copy("save", [action.transfer], source, tuple(s for part in parts for s in part))

    def start(self, placed: Sequence[Copy]) -> list[int]:
        """All of them as one copy."""
        transfers = [transfer for one in placed for transfer in one.transfers]
        if self._jams():
            return transfers
        source = tuple(slot for one in placed for slot in one.source)
        self._launch(Copy("save", transfers, source, tuple(slot for one in placed for slot in one.target)))
        return []

    def read(self, action: Read) -> bool:
        """An adapter's file into host slots."""
        if self._jams():
            return False
        target = self._host_slots(action.size)
        self.manager.saved(action.transfer, [target])
        self._launch(Copy("read", [action.transfer], (), target, self.adapter_bytes(action.key, action.size)))
        return True

    def read_to_device(self, node: Node) -> Slots | None:
        """An adapter's file into device slots, at once."""
        if node.size > len(self.free_slots):
            return None
        if self.file_broken:
            raise BrokenFile(node.key)
        slots = self.take(node.size)
        self.write(slots, self.adapter_bytes(node.key, node.size))
        return slots

    def adapter_bytes(self, key: str, size: int) -> tuple[object, ...]:
        """What the adapter's slots hold."""
        return tuple((key, self.versions[key], i) for i in range(size))


def _take(free: list[int], size: int) -> Slots:
    taken = tuple(reversed(free[len(free) - size :]))
    del free[len(free) - size :]
    return taken


def _apart(slots: Iterable[int], others: Iterable[int], what: str) -> None:
    both = set(slots) & set(others)
    if both:
        raise InvariantError(f"I4: {what}: {sorted(both)}")


def _comes_first(before: Copy, copy: Copy) -> bool:
    """Whether ``before``, which started earlier, arrives earlier: one stream a direction, and no race on a slot."""
    if "read" in (before.kind, copy.kind):
        return not set(before.target).isdisjoint(copy.source)
    return (
        before.kind == copy.kind
        or not set(before.target).isdisjoint(copy.source)
        or not set(before.source).isdisjoint(copy.target)
    )
