"""Nodes, keys and the walk of the dependency tree; no sizes, no eviction (those are :mod:`.tree`)."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.tree.node import Kind, Node, Transfer

_NO_TOKENS: array[int] = array("q")
_FEW = 16


class PayloadOps(Protocol):
    """What the tree asks of payloads. One payload stands for ``size`` slots in token order."""

    def slice(self, payload: Any, start: int, stop: int) -> Any:
        """The payload of tokens ``[start, stop)``; owns its memory, does not mutate ``payload``."""
        ...

    def split(self, payload: Any, at: int) -> tuple[Any, Any]:
        """The payloads of tokens ``[0, at)`` and ``[at, size)``."""
        ...


def shared_prefix(edge: array[int], tokens: array[int], start: int, limit: int, page: int = 1) -> int:
    """How many of ``edge``'s first ``limit`` tokens equal ``tokens[start:]``, in whole pages.

    Gallops in doubling windows, then halves the window that differs, by slices that C compares; the last few
    tokens one by one, because a slice costs as much as several of them. Both arrays have typecode ``"q"``.
    """
    low, step = 0, 64
    while low < limit:
        high = min(low + step, limit)
        if edge[low:high] != tokens[start + low : start + high]:
            break
        low, step = high, 2 * step
    else:
        return limit - limit % page
    while high - low > max(page, _FEW):
        middle = (low + high) // 2
        if edge[low:middle] == tokens[start + low : start + middle]:
            low = middle
        else:
            high = middle
    while edge[low] == tokens[start + low]:
        low += 1
    return low - low % page


class TreeStructure:
    """Root, adapters and KV nodes, and how token keys lead through them.

    Args:
        page_size: tokens per page; keys, matches and splits are whole pages.
        policy: told of splits.
        payloads: splits and slices payloads.

    Attributes:
        tick: counts operations; the time of recency.
        now: seconds, written by whoever drives the tree; read by policies.
        transfers: copies in flight by id.

    Raises:
        ValueError: ``page_size`` below 1.
    """

    def __init__(self, page_size: int, policy: Policy, payloads: PayloadOps) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.policy = policy
        self.payloads = payloads
        self.tick = 0
        self.now = 0.0
        self.transfers: dict[int, Transfer] = {}
        self._guarded: dict[int, dict[int, Node]] = {}
        self._next_id = 0
        self._kv_count = 0
        self._doomed: dict[int, Node] = {}
        self.root = self._node("root", None, None, 0)
        self.base = self._node("adapter", None, self.root, 0)
        self.base.resident = self.base.host = True
        self.root.children[None] = self.base
        self.root.resident_children = self.root.host_children = 1

    def _node(
        self, kind: Kind, key: Any, parent: Node | None, size: int, tokens: array[int] = _NO_TOKENS
    ) -> Node:
        adapter = None if parent is None else parent.adapter
        node = Node(self._next_id, kind, key, tokens=tokens, size=size, parent=parent, adapter=adapter)
        self._next_id += 1
        return node

    # -- reading ----------------------------------------------------------------------------------

    def adapter(self, key: str | None) -> Node | None:
        """The adapter registered under ``key`` (``None``: the base model), if any. Never a doomed one."""
        return self.root.children.get(key)

    def adapters(self) -> list[Node]:
        """All registered adapters in order of registration, the base model first; no doomed ones."""
        return list(self.root.children.values())

    def adapter_of(self, node: Node) -> Node:
        """The adapter above ``node`` (itself for an adapter)."""
        if node.adapter is None:
            raise InvariantError("the root has no adapter")
        return node.adapter

    def is_doomed(self, node: Node) -> bool:
        """Whether the branch of ``node`` was unloaded; nothing can be matched or inserted there any more."""
        return node.adapter is not None and node.adapter.doomed

    def path(self, node: Node) -> list[Node]:
        """KV nodes from the adapter (exclusive) down to ``node`` (inclusive)."""
        nodes = []
        while node.kind == "kv":
            nodes.append(node)
            node = node.parent  # type: ignore[assignment]  # KV always has a parent
        nodes.reverse()
        return nodes

    def walk(self, start: Node | None = None) -> Iterator[Node]:
        """``start`` and all below it, parents first; by default the whole tree, doomed branches included.

        The tree must not change meanwhile.
        """
        stack = [start] if start is not None else [*self._doomed.values(), self.root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children.values()))

    def kv_nodes(self) -> Iterator[Node]:
        """All KV nodes, those of doomed branches included; the tree must not change meanwhile."""
        return (node for node in self.walk() if node.kind == "kv")

    @property
    def nodes(self) -> int:
        """Number of nodes: KV and adapters, resident or not, doomed ones included; without the root."""
        return self._kv_count + len(self.root.children) + len(self._doomed)

    def counts(self) -> dict[str, int]:
        """Number of nodes by kind and state. O(adapters)."""
        adapters = self.adapters()
        return {
            "kv": self._kv_count,
            "adapters": len(adapters) - 1,
            "adapters_resident": sum(node.resident for node in adapters) - 1,
            "adapters_on_host": sum(node.host for node in adapters) - 1,
            "adapters_pinned": sum(node.pinned for node in adapters),
            "adapters_doomed": len(self._doomed),
        }

    def render(self, tokens: int = 8) -> str:
        """The tree as indented lines, with the first ``tokens`` tokens of every KV node."""
        lines, depth = [], {self.root.id: 0}
        for node in self.walk():
            depth[node.id] = 0 if node.parent is None else depth.get(node.parent.id, 0) + 1
            shown = f" {list(node.tokens[:tokens])}" if node.kind == "kv" else ""
            lines.append("  " * depth[node.id] + repr(node) + shown)
        return "\n".join(lines)

    # -- keys and the walk ------------------------------------------------------------------------

    def split_at(self, adapter: Node, tokens: array[int], namespace: Hashable, at: int) -> Node:
        """Make a node end after ``tokens[:at]``, which must be in memory; a structural change only.

        Eviction can then take what comes behind without what comes before. Returns that node.
        """
        self._require_adapter(adapter)
        if self._descend(adapter, tokens, self._pages(tokens, at), namespace, cut=False)[1] != at:
            raise InvariantError(
                f"cannot split below {adapter!r}: its first {at} tokens are not all in memory"
            )
        return self._descend(adapter, tokens, at, namespace, touch=False)[0]

    def _require_adapter(self, node: Node) -> None:
        if node.kind != "adapter" or node.parent is None or node.doomed:
            state = "unloaded" if node.kind == "adapter" else "not an adapter"
            raise InvariantError(f"{node!r} is {state}")

    def _require_present(self, node: Node) -> None:
        if node.parent is None:
            raise InvariantError(
                f"{node!r} " + ("cannot be locked" if node is self.root else "has left the tree")
            )

    def _pages(self, tokens: array[int], limit: int | None) -> int:
        if type(tokens) is not array or tokens.typecode != "q":
            raise TypeError(f'tokens must be an array of typecode "q", got {type(tokens).__name__}')
        n = len(tokens) if limit is None else min(len(tokens), limit)
        return n - n % self.page_size

    def _key(self, tokens: array[int], position: int, namespace: Hashable) -> Hashable:
        page = self.page_size
        key: Hashable = tokens[position] if page == 1 else tokens[position : position + page].tobytes()
        return key if position or namespace is None else (namespace, key)

    def _descend(
        self,
        node: Node,
        tokens: array[int],
        n: int,
        namespace: Hashable,
        *,
        cut: bool = True,
        touch: bool = True,
    ) -> tuple[Node, int]:
        # The hot loop. `cut`: split where the walk ends inside a node; `touch`: mark the path as used now.
        page, position = self.page_size, 0
        touch = touch and cut
        tick = self.tick
        while True:
            if touch:
                node.last_tick = tick
            if position >= n:
                return node, position
            key: Hashable = tokens[position] if page == 1 else tokens[position : position + page].tobytes()
            if namespace is not None and not position:
                key = (namespace, key)
            child = node.children.get(key)
            if child is None:
                return node, position
            end = position + child.size
            if end <= n and tokens[position:end] == child.tokens:
                node, position = child, end
                continue
            common = shared_prefix(child.tokens, tokens, position, min(child.size, n - position), page)
            position += common
            if not cut:
                return child, position
            node, n = self._split(child, common), position

    def _split(self, lower: Node, at: int) -> Node:
        parent = lower.parent
        assert parent is not None
        upper = self._node("kv", lower.key, parent, at, lower.tokens[:at])
        if lower.resident:
            upper.payload, lower.payload = self.payloads.split(lower.payload, at)
            upper.resident, upper.resident_children = True, 1
        if lower.host:
            upper.host_payload, lower.host_payload = self.payloads.split(lower.host_payload, at)
            upper.host, upper.host_children = True, 1
        upper.locks, upper.visits, upper.last_tick = lower.locks, lower.visits, lower.last_tick
        upper.last_use, upper.transfer, upper.guard = lower.last_use, lower.transfer, lower.guard
        if lower.transfer is not None:
            nodes = self.transfers[lower.transfer].nodes
            nodes.insert(nodes.index(lower), upper)
        if parent.transfer is not None:
            outlived = self.transfers[parent.transfer].outlived
            if lower.id in outlived:
                outlived.remove(lower.id)
                outlived.add(upper.id)
        if lower.guard:
            for guarded in self._guarded.values():
                if lower.id in guarded:
                    guarded[upper.id] = upper
        lower.tokens, lower.size, lower.parent = lower.tokens[at:], lower.size - at, upper
        lower.key = self._key(lower.tokens, 0, None)
        upper.children[lower.key] = lower
        parent.children[upper.key] = upper
        self._kv_count += 1
        self.policy.on_split(upper, lower)
        return upper

    def _detach(self, node: Node) -> None:
        # KV and dropped adapters only, off both tiers, so that old heap entries are seen to be stale.
        assert node.parent is not None and not node.resident and not node.host
        if node.doomed:
            del self._doomed[node.id]
        else:
            del node.parent.children[node.key]
        node.parent = None
        self._kv_count -= node.kind == "kv"
