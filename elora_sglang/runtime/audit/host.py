"""The auditor's eye on the host tier: owners of host slots, both tiers' prefixes, and the bytes of the copies."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from elora_sglang.core.tree.node import Node
from elora_sglang.runtime.audit.witnesses import Witnesses
from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.pool.views import UnifiedPool

_UNKNOWN = -2

#: How far KV may differ that was computed twice, by bytes per value.
ROUNDING = {2: 0.1, 4: 1e-3}


@dataclass
class HostAudit:
    """Audits the host tier of one cache.

    Keeps its own book of which adapter the KV in every host slot was computed under, and a checksum of every
    complete copy from the first time it was seen: a copy that changes later is a fault even while the device
    holds nothing to compare it with.
    """

    witnesses: Witnesses
    copies_compared: int = 0
    _sums: dict[int, tuple[tuple[int, int], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        host = self.witnesses.host
        size = 0 if host is None else host.num_slots
        self.ledger = torch.full((size,), _UNKNOWN, dtype=torch.int32)
        # Which device slot a host slot was copied from or to, and how often that one had been written by then.
        self._twin = torch.full((size,), -1, dtype=torch.int64)
        self._twin_version = torch.zeros(size, dtype=torch.int64)
        self._version = torch.zeros(self.witnesses.device_rows, dtype=torch.int64)
        self._saves = torch.zeros(size, dtype=torch.int64)

    def computed(self, device: torch.Tensor) -> None:
        """KV was computed into these device slots."""
        self._version[device] += 1

    def copied(self, device: torch.Tensor, host: torch.Tensor, *, loaded: bool) -> None:
        """These slots are being copied, to the device if ``loaded``: they hold the same bytes from now on."""
        if loaded:
            self._version[device] += 1
        else:
            self._saves[host] += 1
        self._twin[host], self._twin_version[host] = device, self._version[device]

    def _same_source(self, node: Node) -> bool:
        """Whether a copy connects the node's slots on both tiers; not when a request computed its KV again."""
        device, host = node.payload.cpu(), node.host_payload
        known = (self._twin[host] == device) & (self._twin_version[host] == self._version[device])
        return bool(known.all())

    def audit(self) -> Iterable[tuple[str, str]]:
        """All faults found now as (kind, text). Mutates the checksums and the counter."""
        yield from self._prefixes()
        if self.witnesses.host is not None:
            yield from self._owners(self.witnesses.host)
            yield from self._copies(self.witnesses.host)

    def _prefixes(self) -> Iterable[tuple[str, str]]:
        tree = self.witnesses.tree
        for node in tree.walk():
            parent = node.parent
            if parent is None or parent is tree.root:
                continue
            if node.resident and not parent.resident and (tree.policy.dependency or parent.kind == "kv"):
                yield "device-prefix", f"node {node.id} is on the device, its parent {parent.id} is not"
            if node.host and not parent.host:
                yield "host-prefix", f"node {node.id} is on the host, its parent {parent.id} is not"
            if node.kind == "kv" and not node.resident and not node.host:
                yield "nowhere", f"node {node.id} is in the tree and on neither tier"

    def _owners(self, host: HostPool) -> Iterable[tuple[str, str]]:
        owners = torch.zeros(host.num_slots, dtype=torch.int16)
        for node in self.witnesses.tree.walk():
            if node.host_payload is not None and node.size:
                owners.index_add_(0, node.host_payload, torch.ones(node.size, dtype=torch.int16))
        used = torch.zeros(host.num_slots, dtype=torch.bool)
        used[host.used_slots()] = True
        for kind, bad in (
            ("host-slot-shared", owners > 1),
            ("host-slot-lost", used & (owners == 0)),
            ("host-slot-free", ~used & (owners > 0)),
        ):
            if bad.any():
                yield kind, f"{int(bad.sum())} host slots, for example {bad.nonzero().flatten()[:6].tolist()}"
        if host.available + int(used.sum()) != host.num_slots:
            yield (
                "host-sizes",
                f"{host.available} free and {int(used.sum())} used of {host.num_slots} host slots",
            )

    def _copies(self, host: HostPool) -> Iterable[tuple[str, str]]:
        tree, weights = self.witnesses.tree, self.witnesses.weights
        sums: dict[int, tuple[tuple[int, int], int]] = {}
        for node in tree.walk():
            if not node.size or not node.clean or tree.is_doomed(node):
                continue
            self.copies_compared += 1
            if node.kind == "adapter":
                found = weights.store.host_bytes(node.key)
                if node.resident and not torch.equal(found, weights.read_bytes(node.key)):
                    yield "copy-differs", f"adapter {node.key}: host and device bytes differ"
            else:
                found = _bytes(host, node.host_payload)
                if node.resident and not self._agree(node, found, _bytes(weights.pool, node.payload)):
                    yield "copy-differs", f"node {node.id}: host and device bytes differ"
            # One copy is known by where it lies and how often that was written.
            place = torch.cat((node.host_payload, self._saves[node.host_payload]))
            copy = (node.size, zlib.crc32(place.numpy().tobytes()))
            sums[node.id] = (copy, zlib.crc32(found.numpy().tobytes()))
            before = self._sums.get(node.id)
            if before is not None and before[0] == copy and before != sums[node.id]:
                yield "copy-changed", f"node {node.id}: its host copy is not what it was"
        self._sums = sums

    def _agree(self, node: Node, host: torch.Tensor, device: torch.Tensor) -> bool:
        if torch.equal(host, device):
            return True
        if self._same_source(node):
            return False
        # KV that was computed twice, in batches of other shapes, agrees up to rounding.
        kv = self.witnesses.allocator.get_kvcache()
        if kv is None or kv.dtype.itemsize < 2:
            return kv is not None
        ours, theirs = host.view(kv.dtype).float(), device.view(kv.dtype).float()
        allowed = ROUNDING[kv.dtype.itemsize]
        return bool(torch.allclose(ours, theirs, rtol=allowed, atol=allowed))


def _bytes(pool: UnifiedPool, slots: torch.Tensor) -> torch.Tensor:
    """All bytes in these slots of a pool, layer by layer: uint8 on the CPU."""
    rows = [
        pool.byte_rows(layer, stream)[slots.to(pool.device)].cpu().flatten()
        for layer in range(pool.num_layers)
        for stream in (0, 1)
    ]
    return torch.cat(rows)
