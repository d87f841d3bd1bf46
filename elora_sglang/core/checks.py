"""The invariants of the tree, checked the slow way: one walk that trusts no counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.node import Node

if TYPE_CHECKING:
    from elora_sglang.core.tree import DependencyTree

PayloadSlots = Callable[[Any], Iterable[int]]


def check_tree(tree: DependencyTree, payload_slots: PayloadSlots | None = None) -> None:
    """Raise :class:`InvariantError` at the first broken rule; changes nothing. O(tokens in the tree).

    I1 structure (residency of everything above KV, keys, whole pages), I2 sizes, I3 one owner per slot (only
    with ``payload_slots``, which lists the slots of a payload), I4 locks, and the eviction candidates.
    """
    nodes = list(tree.walk())
    _check_structure(tree, nodes)
    _check_locks(nodes)
    _check_sizes(tree, nodes)
    _check_candidates(tree, nodes)
    if payload_slots is not None:
        _check_owners(tree, nodes, payload_slots)


def _require(holds: bool, rule: str, what: str) -> None:
    if not holds:
        raise InvariantError(f"{rule}: {what}")


def _check_structure(tree: DependencyTree, nodes: list[Node]) -> None:
    _require(
        len({node.id for node in nodes}) == len(nodes), "I1", "a node is reachable twice, or two share an id"
    )
    _require(
        tree.base.resident and tree.base.size == 0, "I1", "the base model's node must be resident and empty"
    )
    _require(tree.adapter(None) is tree.base, "I1", "the base model's node left the tree")
    for node in nodes:
        for key, child in node.children.items():
            _require(
                child.parent is node and child.key == key, "I1", f"{child!r} does not belong where it hangs"
            )
        if node.kind == "root":
            _require(node is tree.root and node.parent is None, "I1", f"{node!r} is a second root")
        elif node.kind == "adapter":
            _require(
                node.parent is tree.root and node.adapter is node, "I1", f"{node!r} must hang below the root"
            )
            _require((node.id in tree._doomed) == node.doomed, "I1", f"{node!r} and the doomed list disagree")
            _require(
                not node.doomed or node.locks > 0, "I1", f"{node!r} is doomed and unlocked, it must be gone"
            )
            _require(
                node.resident == (node.payload is not None) or node is tree.base, "I1", f"{node!r}: payload"
            )
        else:
            _check_kv(tree, node)


def _check_kv(tree: DependencyTree, node: Node) -> None:
    parent = node.parent
    assert parent is not None  # it was reached through its parent's children, which name it
    _require(parent.kind != "root", "I1", f"{node!r} hangs below the root")
    _require(node.resident and node.payload is not None, "I1", f"{node!r} is in the tree but not resident")
    _require(parent.resident, "I1", f"{node!r} is resident, {parent!r} above it is not")
    _require(node.adapter is parent.adapter, "I1", f"{node!r} names another adapter than its parent")
    size, page = node.size, tree.page_size
    _require(
        size == len(node.tokens) > 0 and size % page == 0, "I1", f"{node!r} is not whole pages of its tokens"
    )
    key = tree._key(node.tokens, 0, None)
    has_namespace = parent.kind == "adapter" and isinstance(node.key, tuple)
    _require(
        (node.key[1] if has_namespace else node.key) == key, "I1", f"{node!r} has another key than its tokens"
    )


def _check_locks(nodes: list[Node]) -> None:
    for node in nodes:
        below = sum(child.locks for child in node.children.values())
        _require(node.locks >= 0, "I4", f"{node!r} has a negative lock count")
        _require(
            node.kind == "root" or node.locks >= below,
            "I4",
            f"{node!r} has fewer locks than its children, {below}",
        )


def _check_sizes(tree: DependencyTree, nodes: list[Node]) -> None:
    resident = [node for node in nodes if node.resident]
    evictable = sum(node.size for node in resident if not node.locks and not node.pinned)
    protected = sum(node.size for node in resident) - evictable
    waiting = sum(victim.size for victim in tree._orphans)
    _require(
        tree._orphan_size == waiting, "I2", f"{waiting} slots wait for collection, not {tree._orphan_size}"
    )
    _require(
        tree.evictable_size == evictable + waiting,
        "I2",
        f"evictable_size is {tree.evictable_size}, the nodes add up to {evictable} and {waiting} wait",
    )
    _require(
        tree.protected_size == protected,
        "I2",
        f"protected_size is {tree.protected_size}, the nodes add up to {protected}",
    )
    kv = sum(node.kind == "kv" for node in nodes)
    _require(tree.counts()["kv"] == kv, "I2", f"counts {tree.counts()['kv']} KV nodes, has {kv}")
    pinned = sum(node.size for node in nodes if node.pinned)
    _require(
        tree.pinned_size() == pinned,
        "I2",
        f"pinned_size is {tree.pinned_size()}, the nodes add up to {pinned}",
    )


def _check_candidates(tree: DependencyTree, nodes: list[Node]) -> None:
    entries = tree._candidates.entries()
    lowest: dict[int, float] = {}
    for priority, id, node in entries:
        if node.queued == priority:
            lowest[id] = priority
    for node in nodes:
        if node.queued is not None:
            _require(node.id in lowest, "candidates", f"{node!r} believes it is queued, but has no entry")
        if node.is_candidate and not node.doomed:
            _require(node.id in lowest, "candidates", f"{node!r} could be evicted, but has no entry")
            _require(
                lowest[node.id] <= tree.policy.priority(node),
                "candidates",
                f"{node!r} is queued at {lowest[node.id]}, above its priority {tree.policy.priority(node)}",
            )
    bound = 2 * tree.nodes + 64
    _require(
        len(entries) <= bound, "candidates", f"{len(entries)} entries for {tree.nodes} nodes, at most {bound}"
    )


def _check_owners(tree: DependencyTree, nodes: list[Node], payload_slots: PayloadSlots) -> None:
    owners: dict[int, int] = {}
    payloads = [
        (node.id, node.size, node.payload) for node in nodes if node.resident and node.payload is not None
    ]
    payloads += [(victim.node_id, victim.size, victim.payload) for victim in tree._orphans]
    for id, size, payload in payloads:
        slots = [int(slot) for slot in payload_slots(payload)]
        _require(len(slots) == size, "I3", f"node {id} has {size} slots, its payload {len(slots)}")
        for slot in slots:
            owner = owners.setdefault(slot, id)
            _require(owner == id, "I3", f"slot {slot} belongs to node {owner} and to node {id}")
    # A payload that names a slot twice has one owner, but the pool would hand the slot out twice.
    total = sum(size for _, size, _ in payloads)
    _require(len(owners) == total, "I3", f"{total} slots are claimed, only {len(owners)} are different ones")
