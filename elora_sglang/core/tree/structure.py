"""Nodes, keys, and the walk of tokens through them. Knows no tiers, sizes, locks or policies."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.node import Kind, Node

_NO_TOKENS: array[int] = array("q")

#: So many tokens are compared one by one: a slice costs as much as several of them.
ONE_BY_ONE = 16


def shared_prefix(edge: array[int], tokens: array[int], start: int, limit: int, page: int = 1) -> int:
    """How many of ``edge``'s first ``limit`` tokens equal ``tokens[start:]``, in whole pages.

    Gallops in doubling windows, then halves the window that differs, by slices that C compares; the last few
    tokens one by one. Both arrays have typecode ``"q"``.
    """
    low, step = 0, 64
    while low < limit:
        high = min(low + step, limit)
        if edge[low:high] != tokens[start + low : start + high]:
            break
        low, step = high, 2 * step
    else:
        return limit - limit % page
    while high - low > max(page, ONE_BY_ONE):
        middle = (low + high) // 2
        if edge[low:middle] == tokens[start + low : start + middle]:
            low = middle
        else:
            high = middle
    while edge[low] == tokens[start + low]:
        low += 1
    return low - low % page


class Structure:
    """Root, adapters and KV nodes, and how token keys lead through them.

    Attributes:
        page_size: tokens per page; keys, walks and splits are whole pages.
        root: above all adapters.
        base: the base model's adapter node: key ``None``, size 0.
        kv_count: KV nodes in the tree, those of doomed branches included.
        doomed: unloaded adapters that are still in the tree, by id. They are no children of the root any more.

    Raises:
        ValueError: ``page_size`` below 1.
    """

    def __init__(self, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.kv_count = 0
        self.doomed: dict[int, Node] = {}
        self._next_id = 0
        self.root = self._create("root", None, None, 0, _NO_TOKENS)
        self.base = self.add_adapter(None, 0)

    # -- reading ----------------------------------------------------------------------------------

    @property
    def nodes(self) -> int:
        """Number of nodes: KV and adapters, resident or not, doomed ones included; without the root."""
        return self.kv_count + len(self.root.children) + len(self.doomed)

    @staticmethod
    def path(node: Node) -> list[Node]:
        """KV nodes from the adapter (exclusive) down to ``node`` (inclusive)."""
        nodes = []
        while node.kind == "kv":
            nodes.append(node)
            node = node.parent  # type: ignore[assignment]  # KV always has a parent
        nodes.reverse()
        return nodes

    def walk(self, start: Node | None = None) -> Iterator[Node]:
        """``start`` and all below it, parents first; by default the whole tree, doomed branches included."""
        stack = [start] if start is not None else [*self.doomed.values(), self.root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children.values()))

    def render(self, tokens: int) -> str:
        """The tree as indented lines, with the first ``tokens`` tokens of every KV node."""
        lines, depth = [], {self.root.id: 0}
        for node in self.walk():
            depth[node.id] = 0 if node.parent is None else depth.get(node.parent.id, 0) + 1
            shown = f" {list(node.tokens[:tokens])}" if node.kind == "kv" else ""
            lines.append("  " * depth[node.id] + repr(node) + shown)
        return "\n".join(lines)

    # -- refusing ---------------------------------------------------------------------------------

    @staticmethod
    def require_adapter(node: Node) -> None:
        """Raise ``InvariantError`` unless ``node`` is an adapter that is registered now."""
        if node.kind != "adapter" or node.parent is None or node.doomed:
            state = "unloaded" if node.kind == "adapter" else "not an adapter"
            raise InvariantError(f"{node!r} is {state}")

    def require_present(self, node: Node) -> None:
        """Raise ``InvariantError`` for the root, and for what has left the tree."""
        if node.parent is None:
            raise InvariantError(
                f"{node!r} " + ("cannot be locked" if node is self.root else "has left the tree")
            )

    def whole_pages(self, tokens: array[int], limit: int | None) -> int:
        """Tokens of ``tokens[:limit]`` in whole pages. Raises ``TypeError`` for keys of another type."""
        if type(tokens) is not array or tokens.typecode != "q":
            raise TypeError(f'tokens must be an array of typecode "q", got {type(tokens).__name__}')
        n = len(tokens) if limit is None else min(len(tokens), limit)
        return n - n % self.page_size

    # -- the walk ---------------------------------------------------------------------------------

    def key(self, tokens: array[int], position: int, namespace: Hashable) -> Hashable:
        """Key of the child whose tokens start at ``tokens[position]``: its first page."""
        page = self.page_size
        key: Hashable = tokens[position] if page == 1 else tokens[position : position + page].tobytes()
        return key if position or namespace is None else (namespace, key)

    def descend(
        self, node: Node, tokens: array[int], n: int, namespace: Hashable, tick: int | None = None
    ) -> tuple[Node, int, int]:
        """Follow ``tokens[:n]`` (whole pages) below adapter ``node``.

        Returns the last node that shares tokens, how many are shared in all, and, where the walk ends *inside*
        that node, how many of its own are: a match splits it there. 0: the walk ends where the node ends. With
        ``tick``, nodes that are walked to their end have it as their last.
        """
        page, position = self.page_size, 0
        while True:
            if tick is not None:
                node.last_tick = tick
            if position >= n:
                return node, position, 0
            key: Hashable = tokens[position] if page == 1 else tokens[position : position + page].tobytes()
            if namespace is not None and not position:
                key = (namespace, key)
            child = node.children.get(key)
            if child is None:
                return node, position, 0
            end = position + child.size
            if end <= n and tokens[position:end] == child.tokens:
                node, position = child, end
                continue
            inside = shared_prefix(child.tokens, tokens, position, min(child.size, n - position), page)
            return child, position + inside, inside

    # -- changing ---------------------------------------------------------------------------------

    def _create(self, kind: Kind, key: Any, parent: Node | None, size: int, tokens: array[int]) -> Node:
        adapter = None if parent is None else parent.adapter
        node = Node(self._next_id, kind, key, tokens=tokens, size=size, parent=parent, adapter=adapter)
        self._next_id += 1
        return node

    def add_adapter(self, key: str | None, size: int) -> Node:
        """A new adapter below the root, on no tier."""
        node = self._create("adapter", key, self.root, size, _NO_TOKENS)
        self.root.children[key] = node
        return node

    def add_kv(self, parent: Node, key: Hashable, tokens: array[int]) -> Node:
        """A new KV node below ``parent``, on no tier."""
        node = self._create("kv", key, parent, len(tokens), tokens)
        parent.children[key] = node
        self.kv_count += 1
        return node

    def split(self, lower: Node, at: int) -> Node:
        """A new node takes the first ``at`` tokens of KV ``lower``, its place below the parent and its state."""
        parent = lower.parent
        assert parent is not None
        upper = self._create("kv", lower.key, parent, at, lower.tokens[:at])
        upper.inherit(lower)
        lower.tokens, lower.size, lower.parent = lower.tokens[at:], lower.size - at, upper
        lower.key = self.key(lower.tokens, 0, None)
        upper.children[lower.key] = lower
        parent.children[upper.key] = upper
        self.kv_count += 1
        return upper

    def unlist(self, adapter: Node) -> None:
        """Unload: the key is free, the branch out of reach, but in the tree until :meth:`remove`."""
        del self.root.children[adapter.key]
        adapter.doomed = True
        self.doomed[adapter.id] = adapter

    def remove(self, node: Node) -> None:
        """Take KV or a doomed adapter, off both tiers and without children, out of the tree for good."""
        # Off both tiers, so that old entries among the candidates are seen to be out of date.
        assert node.parent is not None and not node.resident and not node.host
        if node.doomed:
            del self.doomed[node.id]
        else:
            del node.parent.children[node.key]
        node.parent = None
        self.kv_count -= node.kind == "kv"

    def clear(self) -> None:
        """Forget all but root and base; the nodes handed out before are void."""
        for node in list(self.walk()):
            node.void()
        self.base.parent, self.root.children = self.root, {None: self.base}
        self.doomed, self.kv_count = {}, 0
