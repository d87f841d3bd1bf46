"""``elora`` in ``/server_info``: sizes of both tiers now, what was decided, and what was done.

Sizes are in slots. Every word has one meaning; ``decided`` and ``done`` share none.

======================================  ================================================================================
policy                                  the policy's name
evictable_slots, protected_slots        held by the tree: could leave now; locked, pinned or being copied
free_slots                              device slots that nobody has
invalid_kv_slots                        KV whose adapter is not resident (policies without dependency)
resident_adapters                       ids of the adapters with device slots
counts                                  nodes of the tree, by kind and tier
host_slots, host_free_slots             size of the host pool; what is free of it
host_used_by_tree                       host slots that nodes have
transfers_in_flight                     copies and reads that have not ended
loaded_bytes, saved_bytes, ...          the transfer engine's totals: bytes, seconds, bandwidths, ``link_gbps``
audits, audit_faults, ...               the auditor's, with ``--elora-audit-interval``
decided                                 decisions since start, counted when the manager takes them
  queue_loads, idle_loads               loads for a waiting request; ahead of any
  admission_loads                       loads for a request that is being admitted
  backups, pressure_saves               copies to the host ahead of need; of what is being evicted
  swap_outs                             nodes that were evicted before room was asked for
  reads                                 adapters to be read from their files
  demotions, drops                      nodes evicted that stay on the host; that are lost
  guard_breaks                          nodes evicted although a waiting request counts on them
  host_evictions                        nodes evicted from the host
  failed                                copies and reads that ended without success
done                                    what was carried out since start; see
                                        :class:`~elora_sglang.runtime.swap_driver.CacheStats`
======================================  ================================================================================

A decision may fail before it is done: what finds no slots, for example, is counted under ``decided`` alone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elora_sglang.integration.cache.radix_cache import EloraRadixCache


def of(cache: EloraRadixCache) -> dict[str, Any]:
    """The state of one rank's cache. Changes nothing."""
    tree, tier = cache.tree, cache.tier
    found = {
        "policy": cache.manager.policy_name,
        "evictable_slots": tree.evictable_size,
        "protected_slots": tree.protected_size,
        "free_slots": int(cache.token_to_kv_pool_allocator.available_size()),
        "invalid_kv_slots": tree.invalid_kv_size,
        "resident_adapters": sorted(n.key for n in tree.adapters() if n.resident and n.key is not None),
        "counts": tree.counts(),
        "host_slots": 0,
        "decided": cache.manager.counters(),
        "done": asdict(cache.stats),
    }
    if tier is not None:
        found |= {
            "host_slots": tier.host.num_slots,
            "host_free_slots": tier.host.available,
            "host_used_by_tree": tree.host_size,
            "transfers_in_flight": len(tree.transfers),
            **tier.state(),
        }
    return found | (cache.auditor.counters() if cache.auditor is not None else {})
