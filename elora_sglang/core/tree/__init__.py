"""The dependency tree: root → adapter → KV, on two tiers of slots.

:class:`~.tree.DependencyTree` is the interface, and passes every call on to a part. Each part has state of its own, and
only it writes that. A part calls those above it in this table, never those below; :mod:`.parts` puts them together.

================  =====================================  =======================================================
part              owns                                   what comes here
================  =====================================  =======================================================
``structure``     nodes, keys, parents and children      walk of tokens, new nodes, splits, what leaves for good
``order``         candidates for leaving each tier       ``reprioritize``; who becomes a candidate, and when
``residency``     who has slots on which tier, sizes     entering and leaving a tier
``doomed``        unloaded branches' uncollected slots   ``drop_branch``, ``collect_doomed``
``locks``         locks, pins                            ``lock``, ``unlock``, ``set_pinned``
``guards``        what waiting requests need             ``guard``, ``unguard``, ``guarded_size``
``transfers``     copies in flight                       ``begin_load``, ``begin_save``, ``begin_read``,
                                                         ``end_transfer``
``eviction``      nothing                                ``evict``, ``evict_host``
``access``        tick, time, counts of use              ``match``, ``insert``, ``find``, ``touch``, ``count_use``
================  =====================================  =======================================================

Beside them: :mod:`.node` (a node, and what calls return), :mod:`.candidates` (a lazy heap), :mod:`.checks` (all
invariants, the slow way), :mod:`.ranking` and :mod:`.payloads` (what the tree asks of a policy and of the runtime:
policies import the tree, never the other way).

Many files, because each part has state of its own: a file that could reach another part's state would.
"""
