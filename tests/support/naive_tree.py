"""A model of the dependency tree too simple to be wrong: no nodes, no splits, no counters, no heap.

It keeps, per branch (one version of one adapter), the set of token *prefixes* that are cached, page by page,
with the slots of the last page, who uses what, and when. Everything else is worked out from that on demand.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

Prefix = tuple[Hashable, tuple[int, ...]]  # namespace, tokens


@dataclass
class Page:
    """One cached page: its slots and the tick of its last use."""

    slots: tuple[int, ...]
    last: int


@dataclass(eq=False)
class Branch:
    """One version of an adapter with its pages, keyed by the whole prefix that ends with the page."""

    key: str | None
    size: int
    slots: tuple[int, ...] | None = None
    pinned: bool = False
    doomed: bool = False
    last: int = 0
    pages: dict[Prefix, Page] = field(default_factory=dict)
    locks: list[Prefix] = field(default_factory=list)

    def is_locked(self, prefix: Prefix) -> bool:
        """Whether a lock at or below this prefix holds it."""
        space, tokens = prefix
        return any(s == space and t[: len(tokens)] == tokens for s, t in self.locks)

    def leaves(self) -> set[Prefix]:
        """Cached prefixes that no cached page follows."""
        page = len(next(iter(self.pages.values())).slots) if self.pages else 1
        return self.pages.keys() - {(space, tokens[:-page]) for space, tokens in self.pages}


class NaiveTree:
    """The model. ``clock`` counts as the tree's tick does: one per match, insert and load."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.clock = 0
        self.live: dict[str | None, Branch] = {None: Branch(None, 0, ())}
        self.doomed: list[Branch] = []

    def branches(self) -> list[Branch]:
        """All branches that may hold slots."""
        return [*self.live.values(), *self.doomed]

    def prefixes(self, space: Hashable, tokens: tuple[int, ...]) -> list[Prefix]:
        """The prefixes of ``tokens`` that end with a page, shortest first."""
        return [(space, tokens[:end]) for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def matched(self, branch: Branch, space: Hashable, tokens: tuple[int, ...]) -> list[Prefix]:
        """The cached ones among them, up to the first that is missing."""
        found = []
        for prefix in self.prefixes(space, tokens):
            if prefix not in branch.pages:
                break
            found.append(prefix)
        return found

    def use(self, branch: Branch, prefixes: list[Prefix]) -> None:
        """Mark the branch and the prefixes as used now."""
        self.clock += 1
        branch.last = self.clock
        for prefix in prefixes:
            branch.pages[prefix].last = self.clock

    def insert(self, branch: Branch, space: Hashable, tokens: tuple[int, ...], slots: list[int]) -> int:
        """Cache the missing pages; returns how many tokens were cached before."""
        matched = self.matched(branch, space, tokens)
        self.use(branch, matched)
        for prefix in self.prefixes(space, tokens)[len(matched) :]:
            end = len(prefix[1])
            branch.pages[prefix] = Page(tuple(slots[end - self.page_size : end]), self.clock)
        return len(matched) * self.page_size

    def evictable(self, branch: Branch) -> list[Prefix]:
        """Prefixes that are not locked."""
        return [prefix for prefix in branch.pages if not branch.locks or not branch.is_locked(prefix)]

    def adapter_is_free(self, branch: Branch) -> bool:
        """Whether the adapter's own slots count as evictable."""
        return bool(branch.slots is not None and not branch.locks and not branch.pinned)

    def sizes(self) -> tuple[int, int]:
        """(evictable, protected) in slots."""
        evictable = protected = 0
        for branch in self.branches():
            free = len(self.evictable(branch)) * self.page_size
            evictable += free + (branch.size if self.adapter_is_free(branch) else 0)
            protected += len(branch.pages) * self.page_size - free
            protected += branch.size if branch.slots is not None and not self.adapter_is_free(branch) else 0
        return evictable, protected

    def oldest_leaf_tick(self) -> int | None:
        """Tick of the least recently used thing that eviction may take now, ``None`` if there is none."""
        ticks = []
        for branch in self.live.values():
            leaves = branch.leaves()
            ticks.extend(branch.pages[p].last for p in self.evictable(branch) if p in leaves)
            if branch.size and not branch.pages and self.adapter_is_free(branch):
                ticks.append(branch.last)
        return min(ticks, default=None)

    def take_slots(self, slots: list[int]) -> tuple[str, int]:
        """Remove whatever owned exactly these slots; returns (kind, tick of its last use).

        Raises ``AssertionError`` if they are not a removable tail of pages or a removable adapter.
        """
        for branch in self.branches():
            if branch.slots is not None and branch.size and list(branch.slots) == slots:
                assert not branch.pages and self.adapter_is_free(branch), f"adapter {branch.key} cannot leave"
                branch.slots = None
                return "adapter", branch.last
            owned = [prefix for prefix, page in branch.pages.items() if page.slots[0] in slots]
            if owned:
                owned.sort(key=lambda prefix: -len(prefix[1]))
                gone: list[int] = []
                last = branch.pages[owned[0]].last
                for prefix in owned:
                    assert prefix in branch.leaves(), f"{prefix} leaves before what comes after it"
                    assert not branch.is_locked(prefix), f"{prefix} is locked"
                    gone = [*branch.pages.pop(prefix).slots, *gone]
                assert gone == slots, f"slots {slots} are not one run of pages, {gone} are"
                return "kv", last
        raise AssertionError(f"nobody owned slots {slots}")
