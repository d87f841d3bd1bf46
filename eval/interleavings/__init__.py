"""Every order of events around copies in flight, to a depth: a model checker for ``core``.

``python -m elora_sglang.eval explore`` runs it; docs/interleavings.md says what it shows. The real manager, tree,
admission and executor run over pools of a dozen slots, whose copies end when the search says so. After each event all
invariants are checked the slow way, bytes included. From each state everything is let end, which must leave both pools
empty.

=================  ====================================================================================
``scenes``         what there is: adapters, prompts, pool sizes, policy, and the events that go before
``memory``         both pools with bytes, and copies in flight by the rules of the transfer engine
``world``          one scheduler without a model: the events that may happen now, and what each does
``audit``          the invariants, without trust in the tree
``canonical``      one name for all states that differ only in names; ``frozen`` helps it with policies
``snapshot``       a state to go on from several times
``search``         breadth first, states re-created by replay, the shortest way to a broken rule
=================  ====================================================================================
"""
