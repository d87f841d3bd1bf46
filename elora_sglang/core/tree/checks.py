"""The invariants of the tree, checked the slow way: one walk that trusts no counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.candidates import SMALL
from elora_sglang.core.tree.node import Node
from elora_sglang.core.tree.parts import Parts

PayloadSlots = Callable[[Any], Iterable[int]]


def check_parts(tree: Parts, payload_slots: PayloadSlots | None = None) -> None:
    """Raise :class:`InvariantError` at the first broken rule; changes nothing. O(tokens in the tree).

    I1 structure (both tiers prefix-closed, keys, whole pages), I2 sizes, I3 one owner per device slot and per host
    slot (only with ``payload_slots``, which lists the slots of a payload), I4 locks and copies in flight, and the
    eviction candidates.
    """
    nodes = list(tree.structure.walk())
    _check_structure(tree, nodes)
    _check_locks(nodes)
    _check_transfers(tree, nodes)
    _check_sizes(tree, nodes)
    _check_candidates(tree, nodes)
    if payload_slots is not None:
        device = [(node.id, node.size, node.payload) for node in nodes]
        device += [(victim.node_id, victim.size, victim.payload) for victim in tree.doomed.victims]
        _check_owners(device, payload_slots)
        host = [(node.id, node.size, node.host_payload) for node in nodes]
        host += [(victim.node_id, victim.size, victim.payload) for victim in tree.doomed.host_victims]
        _check_owners(host, payload_slots)


def _above(kv: Node) -> Node:
    assert kv.adapter is not None
    return kv.adapter


def _fail(rule: str, what: str) -> NoReturn:
    raise InvariantError(f"{rule}: {what}")


def _check_structure(tree: Parts, nodes: list[Node]) -> None:
    if len({node.id for node in nodes}) != len(nodes):
        _fail("I1", "a node is reachable twice, or two share an id")
    root, base = tree.structure.root, tree.structure.base
    if not base.resident or base.size or root.children.get(None) is not base:
        _fail("I1", "the base model's node must be in the tree, resident and empty")
    for node in nodes:
        for key, child in node.children.items():
            if child.parent is not node or child.key != key:
                _fail("I1", f"{child!r} does not belong where it hangs")
        counted = (node.resident_children, node.host_children)
        below = node.children.values()
        if node is not root and counted != (sum(c.resident for c in below), sum(c.host for c in below)):
            _fail("I1", f"{node!r} counts {counted} children on device and host")
        if node.kind == "root":
            if node is not root or node.parent is not None:
                _fail("I1", f"{node!r} is a second root")
        elif node.kind == "adapter":
            _check_adapter(tree, node)
        else:
            _check_kv(tree, node)


def _check_adapter(tree: Parts, node: Node) -> None:
    if node.parent is not tree.structure.root or node.adapter is not node:
        _fail("I1", f"{node!r} must hang below the root")
    if (node.id in tree.structure.doomed) != node.doomed:
        _fail("I1", f"{node!r} and the list of doomed adapters disagree")
    if node.doomed and not node.locks and not node.children and node.transfer is None:
        _fail("I1", f"{node!r} is doomed and held by nothing, it must be gone")
    if node is not tree.structure.base:
        _check_payloads(node)


def _check_payloads(node: Node) -> None:
    # Between the start of a copy and the moment the runtime named the slots, there is no payload yet.
    for has, payload in ((node.resident, node.payload), (node.host, node.host_payload)):
        if (payload is not None and not has) or (payload is None and has and node.transfer is None):
            _fail("I1", f"{node!r} has the payload {payload!r}")


def _check_kv(tree: Parts, node: Node) -> None:
    parent = node.parent
    assert parent is not None  # it was reached through its parent's children, which name it
    if parent.kind == "root":
        _fail("I1", f"{node!r} hangs below the root")
    if not node.resident and not node.host:
        _fail("I1", f"{node!r} is in the tree but on no tier")
    if node.resident and not parent.resident and (tree.ranking.dependency or parent.kind == "kv"):
        _fail("I1", f"{node!r} is resident, {parent!r} above it is not")
    if node.host and not parent.host:
        _fail("I1", f"{node!r} is on the host, {parent!r} above it is not")
    _check_payloads(node)
    if node.adapter is not parent.adapter:
        _fail("I1", f"{node!r} names another adapter than its parent")
    if node.size != len(node.tokens) or not node.size or node.size % tree.structure.page_size:
        _fail("I1", f"{node!r} is not whole pages of its {len(node.tokens)} tokens")
    has_namespace = parent.kind == "adapter" and isinstance(node.key, tuple)
    if (node.key[1] if has_namespace else node.key) != tree.structure.key(node.tokens, 0, None):
        _fail("I1", f"{node!r} has another key than its tokens")


def _check_locks(nodes: list[Node]) -> None:
    for node in nodes:
        below = sum(child.locks for child in node.children.values())
        if node.locks < 0:
            _fail("I4", f"{node!r} has a negative lock count")
        if node.kind != "root" and node.locks < below:
            _fail("I4", f"{node!r} has fewer locks than its children, {below}")


def _check_transfers(tree: Parts, nodes: list[Node]) -> None:
    for node in nodes:
        if node.transfer is not None and node not in tree.transfers.by_id[node.transfer].nodes:
            _fail("I4", f"{node!r} is not part of its transfer")
    for transfer in tree.transfers.by_id.values():
        if transfer.anchor is not None and not transfer.anchor.locks:
            _fail("I4", f"transfer {transfer.id} holds {transfer.anchor!r}, which is not locked")
        for node in transfer.nodes:
            if node.parent is None or node.transfer != transfer.id:
                _fail("I4", f"{node!r} left while transfer {transfer.id} was bringing its bytes")


def _check_sizes(tree: Parts, nodes: list[Node]) -> None:
    resident = [node for node in nodes if node.resident]
    evictable = sum(node.size for node in resident if not node.locks and not node.pinned)
    waiting = sum(victim.size for victim in tree.doomed.victims)
    found = {
        "size of uncollected victims": (tree.doomed.size, waiting),
        "evictable_size": (tree.residency.evictable_size, evictable),
        "protected_size": (tree.residency.protected_size, sum(node.size for node in resident) - evictable),
        "host_size": (tree.residency.host_size, sum(node.size for node in nodes if node.host)),
        "adapter_size": (tree.residency.adapter_size, sum(n.size for n in resident if n.kind == "adapter")),
        "invalid_kv_size": (
            tree.residency.invalid_kv_size,
            sum(n.size for n in resident if n.kind == "kv" and not _above(n).resident),
        ),
        "pinned_size": (tree.locks.pinned_size, sum(node.size for node in nodes if node.pinned)),
        "number of KV nodes": (tree.structure.kv_count, sum(node.kind == "kv" for node in nodes)),
    }
    for name, (counted, added_up) in found.items():
        if counted != added_up:
            _fail("I2", f"{name} is {counted}, the nodes add up to {added_up}")


def _check_candidates(tree: Parts, nodes: list[Node]) -> None:
    for heap in (tree.order.kv, tree.order.adapters, tree.order.host):
        entries = heap.entries()
        current = {id for key, id, node in entries if heap._get(node) == key}
        for node in nodes:
            if heap is not tree.order.host and (node.kind == "kv") != (heap is tree.order.kv):
                continue
            queued = heap._get(node)
            if queued is not None and node.id not in current:
                _fail("candidates", f"{node!r} believes it is queued, but has no entry")
            if heap._may(node) and queued is None:
                _fail("candidates", f"{node!r} could be evicted, but has no entry")
            if not tree.ranking.exact or queued is None:
                continue
            if heap._may(node) and queued > heap._key(node):
                _fail("candidates", f"{node!r} is queued at {queued}, above {heap._key(node)}")
        # Compaction leaves two a node; offers may add one for each node until the next one.
        bound = 3 * tree.structure.nodes + SMALL
        if len(entries) > bound:
            _fail("candidates", f"{len(entries)} entries for {tree.structure.nodes} nodes, at most {bound}")


def _check_owners(owned: list[tuple[int, int, Any]], payload_slots: PayloadSlots) -> None:
    owners: dict[int, int] = {}
    for id, size, payload in owned:
        if payload is None:
            continue
        slots = [int(slot) for slot in payload_slots(payload)]
        if len(slots) != size:
            _fail("I3", f"node {id} has {size} slots, its payload {len(slots)}")
        for slot in slots:
            if slot in owners:
                _fail("I3", f"slot {slot} belongs to node {owners[slot]} and to node {id}")
            owners[slot] = id
