"""Names of loaded adapters, their current versions, and who still uses which version."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry

from elora_sglang.runtime.adapters.names import unknown_adapter


class VersionedRegistry(LoRARegistry):
    """SGLang's registry, with versions: a name can move to another version while the old one is in use.

    Lives in the tokenizer process; every method that changes state does so without giving up the event
    loop in between, so a request either holds a version or never saw it. ``lora_id`` names a version.
    """

    def __init__(self, refs: Iterable[LoRARef] = ()) -> None:
        super().__init__()
        self._users: dict[str, int] = {}
        self._idle: dict[str, asyncio.Event] = {}
        for ref in refs:
            self.put(ref)

    @property
    def names(self) -> Collection[str]:
        """Names of the loaded adapters: a copy, safe to use from any thread."""
        return list(self._registry)

    def get(self, name: str) -> LoRARef | None:
        """The current version under ``name``."""
        return self._registry.get(name)

    def put(self, ref: LoRARef) -> LoRARef | None:
        """Make ``ref`` the current version of its name; returns the one it replaces. Mutates."""
        if ref.lora_id in self._users:
            raise ValueError(f"elora: version {ref.lora_id} is already registered")
        before = self._registry.get(ref.lora_name)
        self._registry[ref.lora_name] = ref
        self._users[ref.lora_id] = 0
        return before

    def take(self, name: str) -> LoRARef:
        """Remove the name; requests that hold its version keep it. Raises NameFault (404) when unknown."""
        ref = self._registry.pop(name, None)
        if ref is None:
            raise unknown_adapter(name, self.names, "lora_name")
        return ref

    def users(self, lora_id: str) -> int:
        """Requests that hold this version."""
        return self._users.get(lora_id, 0)

    async def drained(self, lora_id: str) -> None:
        """Wait until no request holds a version whose name was taken or replaced, then forget it."""
        if self.users(lora_id):
            await self._idle.setdefault(lora_id, asyncio.Event()).wait()
        self._idle.pop(lora_id, None)
        self._users.pop(lora_id, None)

    # -- what SGLang calls ------------------------------------------------------------------------

    async def acquire(self, lora_name: str | list[str | None]) -> str | list[str | None]:
        """Version id of each name, held until ``release``; all or none. Raises NameFault (404)."""
        names = [lora_name] if isinstance(lora_name, str) else lora_name
        ids = [None if name is None else self._current(name) for name in names]
        for lora_id in ids:
            if lora_id is not None:
                self._users[lora_id] += 1
        return ids if isinstance(lora_name, list) else self._current(lora_name)

    async def release(self, lora_id: str | list[str | None] | None) -> None:
        """End one hold per id. ``None``: the base model, or a request that never got a version."""
        for one in lora_id if isinstance(lora_id, list) else [lora_id]:
            if one is not None:
                self._users[one] -= 1
                if self._users[one] == 0 and one in self._idle:
                    self._idle[one].set()

    async def get_unregistered_loras(self, lora_name: set[str | None]) -> list[str]:
        """Always empty: an unknown name raises NameFault (404). Stock would reload it here."""
        for name in sorted(name for name in lora_name if name is not None):
            self._current(name)
        return []

    async def register(self, lora_ref: LoRARef) -> None:
        self.put(lora_ref)

    async def unregister(self, lora_name: str) -> str:
        return str(self.take(lora_name).lora_id)

    async def wait_for_unload(self, lora_id: str) -> None:
        await self.drained(lora_id)

    def _current(self, name: str) -> str:
        ref = self._registry.get(name)
        if ref is None:
            raise unknown_adapter(name, self.names)
        return str(ref.lora_id)
