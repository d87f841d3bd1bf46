"""An auditor that does not trust the tree.

It rebuilds who owns every slot of the pool from SGLang's allocator, the request rows and the LoRA
pool, keeps its own ledger of which adapter a slot's KV was computed under, reads the adapters' bytes
out of the pool and compares them with the adapter *files*. What the tree says is only one of the
witnesses: a slot that the tree claims and somebody else claims too is a fault of either.

Costs a walk over the whole pool, so it runs every ``--elora-audit-interval`` scheduler ticks (0: off).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from elora_sglang.core.tree.node import Node
from elora_sglang.runtime.audit.host import HostAudit
from elora_sglang.runtime.audit.witnesses import Witnesses

_UNKNOWN = -2
_BASE = -1


@dataclass(frozen=True)
class Fault:
    """One broken rule. ``kind`` is stable (tests and metrics use it), ``text`` is for people."""

    kind: str
    text: str


class AuditError(AssertionError):
    """The pool is not what it must be; the server stops rather than serve from it."""


@dataclass
class Auditor:
    """Audits the pools of one prefix cache and counts what it did.

    Args:
        witnesses: what is read; none of them is changed.
        interval: audit on every ``interval``-th scheduler tick.
        check_bytes: also compare resident adapters' bytes with their files (the expensive part).
    """

    witnesses: Witnesses
    interval: int = 1
    check_bytes: bool = True
    audits: int = 0
    faults: int = 0
    adapters_compared: int = 0
    _ticks: int = 0
    _ids: dict[str, int] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _expected: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ledger = torch.full((self.witnesses.device_rows,), _UNKNOWN, dtype=torch.int32)
        self.host = HostAudit(self.witnesses)

    # -- the ledger -------------------------------------------------------------------------------

    def record(self, slots: torch.Tensor, lora_id: str | None) -> None:
        """Note that the KV in ``slots`` was computed under ``lora_id`` (``None``: base). Mutates the ledger."""
        slots = slots.cpu().long()
        self._ledger[slots] = self._number(lora_id)
        self.host.computed(slots)

    def saved(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """The slots ``device`` are being copied to ``host``. Mutates the host's ledger."""
        device = device.cpu().long()
        self.host.ledger[host] = self._ledger[device]
        self.host.copied(device, host, loaded=False)

    def loaded(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """The host slots are being copied to ``device``. Mutates the ledger."""
        device = device.cpu().long()
        self._ledger[device] = self.host.ledger[host]
        self.host.copied(device, host, loaded=True)

    def _number(self, lora_id: str | None) -> int:
        if lora_id is None:
            return _BASE
        if lora_id not in self._ids:
            self._ids[lora_id] = len(self._names)
            self._names.append(lora_id)
        return self._ids[lora_id]

    def _name(self, number: int) -> str:
        return "base" if number == _BASE else "unknown" if number == _UNKNOWN else self._names[number]

    def due(self) -> bool:
        """Count one scheduler tick; whether an audit is due on it. Mutates the tick count only."""
        self._ticks += 1
        return self._ticks % self.interval == 0

    def counters(self) -> dict[str, int]:
        """What was audited so far, for ``/server_info``."""
        return {
            "audits": self.audits,
            "audit_faults": self.faults,
            "audit_adapters_compared": self.adapters_compared,
            "audit_copies_compared": self.host.copies_compared,
        }

    # -- the audit --------------------------------------------------------------------------------

    def audit(self, requests: Iterable[Any]) -> list[Fault]:
        """All faults found now. ``requests``: those that may hold a KV row. Mutates ledger and counters."""
        running = _distinct_with_rows(requests)
        faults = [
            *self._ownership(running),
            *self._requests(running),
            *self._adapters(),
            *self._kv_without_adapter(running),
            *(Fault(kind, text) for kind, text in self.host.audit()),
        ]
        self._expected = {
            uid: b for uid, b in self._expected.items() if uid in self.witnesses.weights.resident
        }
        self.audits += 1
        self.faults += len(faults)
        return faults

    def require_clean(self, requests: Iterable[Any]) -> None:
        """Raise :class:`AuditError` naming the first faults, if there are any."""
        if faults := self.audit(requests):
            lines = "; ".join(f"{fault.kind}: {fault.text}" for fault in faults[:5])
            raise AuditError(f"elora audit found {len(faults)} fault(s): {lines}")

    def _private_slots(self, req: Any) -> torch.Tensor:
        """Slots that the request itself owns: from its tree-owned prefix to the end of its last page."""
        page = self.witnesses.page_size
        end = -(-req.kv.kv_allocated_len // page) * page
        row = self.witnesses.rows.req_to_token[req.kv.req_pool_idx]
        start = req.kv.cache_protected_len
        slots = row[start : req.kv.kv_allocated_len].cpu().long()
        if page > 1 and len(slots) and end > req.kv.kv_allocated_len:
            # The tail of the last page is allocated but has no row entry yet.
            last = int(slots[-1])
            slots = torch.cat((slots, torch.arange(last + 1, last // page * page + page)))
        return slots

    def _ownership(self, running: list[Any]) -> Iterable[Fault]:
        allocator, page = self.witnesses.allocator, self.witnesses.page_size
        owners = torch.zeros(self.witnesses.device_rows, dtype=torch.int16)

        def claim(slots: torch.Tensor) -> None:
            owners.index_add_(0, slots, torch.ones(len(slots), dtype=torch.int16))

        free = allocator.get_all_free_pages().cpu().long()
        claim((free[:, None] * page + torch.arange(page)).flatten() if page > 1 else free)
        for slots in self.witnesses.weights.resident.values():
            claim(slots.cpu().long())
        for node in self.witnesses.tree.kv_nodes():
            if node.resident:
                claim(node.payload.cpu().long())
        for req in running:
            slots = self._private_slots(req)
            claim(slots)
            self.record(slots, req.lora_id)
        owned = owners[page:]  # page 0 is SGLang's dummy page
        for kind, bad in (("slot-shared", owned > 1), ("slot-lost", owned == 0)):
            if bad.any():
                sample = (bad.nonzero().flatten()[:6] + page).tolist()
                yield Fault(kind, f"{int(bad.sum())} slots, for example {sample}")

    def _requests(self, running: list[Any]) -> Iterable[Fault]:
        resident, rows = self.witnesses.weights.resident, self.witnesses.rows
        for req in running:
            if req.lora_id is not None and req.lora_id not in resident:
                yield Fault("adapter-missing", f"request {req.rid} runs without its adapter {req.lora_id}")
            if req.lock is None:
                continue
            row = rows.req_to_token[req.kv.req_pool_idx]
            mine = row[: req.kv.cache_protected_len].cpu().long()
            tree = self._path_slots(req.lock.node)[: len(mine)]
            if not torch.equal(mine, tree):
                yield Fault("row-differs", f"request {req.rid}: its prefix slots are not the tree's")

    def _path_slots(self, node: Node) -> torch.Tensor:
        """KV slots from the adapter (exclusive) down to ``node``, as the tree has them."""
        payloads = [one.payload for one in self.witnesses.tree.path(node)]
        return torch.cat(payloads).cpu().long() if payloads else torch.empty(0, dtype=torch.int64)

    def _adapters(self) -> Iterable[Fault]:
        weights, tree = self.witnesses.weights, self.witnesses.tree
        claimed = {n.key: n for n in tree.adapters() if n.resident and n.key is not None}
        for lora_id, slots in weights.resident.items():
            node = claimed.pop(lora_id, None)
            if node is None and not tree.has_doomed(lora_id):
                yield Fault("adapter-unclaimed", f"{lora_id} holds slots but has no resident node")
            elif node is not None and not torch.equal(node.payload.cpu().sort().values, slots.cpu()):
                yield Fault("adapter-moved", f"{lora_id}: tree and LoRA pool name different slots")
            arriving = node is not None and node.transfer in self.witnesses.arriving
            if (
                self.check_bytes and not arriving and not tree.has_doomed(lora_id)
            ):  # its file may be gone already
                self.adapters_compared += 1
                found, expected = weights.read_bytes(lora_id), self._file_bytes(lora_id)
                if not torch.equal(found, expected):
                    first = int((found != expected).nonzero()[0])
                    yield Fault("adapter-bytes", f"{lora_id}: byte {first} of {len(found)} is not its file's")
        for lora_id in claimed:
            yield Fault("adapter-unbacked", f"{lora_id} is resident in the tree but has no slots")

    def _file_bytes(self, lora_id: str) -> torch.Tensor:
        """What the adapter's bytes must be, read from its file once: an id stands for one content."""
        if lora_id not in self._expected:
            self._expected[lora_id] = self.witnesses.weights.expected_bytes(lora_id, from_files=True)
        return self._expected[lora_id]

    def _kv_without_adapter(self, running: list[Any]) -> Iterable[Fault]:
        resident, tree = self.witnesses.weights.resident, self.witnesses.tree
        for node in tree.kv_nodes():
            if not node.resident:
                continue
            computed_under = {int(n) for n in self._ledger[node.payload.cpu().long()].unique()}
            adapter = tree.adapter_of(node)
            expected = self._number(adapter.key)
            if computed_under - {expected, _UNKNOWN}:
                names = sorted(self._name(n) for n in computed_under)
                yield Fault("kv-misplaced", f"node {node.id} of {adapter.key} holds KV of {names}")
            for number in computed_under - {_BASE, _UNKNOWN}:
                if tree.policy.dependency and self._names[number] not in resident:
                    yield Fault("kv-invalid", f"node {node.id}: KV of {self._names[number]}, not resident")


def _distinct_with_rows(requests: Iterable[Any]) -> list[Any]:
    seen: dict[int, Any] = {}
    for req in requests:
        if req.kv.holds_kv:
            seen.setdefault(id(req), req)
    return list(seen.values())
