"""The scores that ``docs/policies.md`` works out by hand are the policy's."""

from __future__ import annotations

from support.doc_pages import ROOT
from support.policy_bench import Bench

from elora_sglang.core.costs import Costs

MACHINE = Costs(
    slot_bytes=2**17,
    load_bytes_s=2**30,
    save_bytes_s=2**30,
    disk_bytes_s=2**30,
    latency_s=0.0,
    prefill_token_s=2**-10,
    prefill_token2_s=0.0,
)


def test_four_nodes_by_hand() -> None:
    bench = Bench("elora", device=1000, costs=MACHINE)
    bench.at(300.0)
    r = bench.kv(0, 128)
    bench.use(r, times=3)
    bench.save(r)
    bench.at(600.0)
    q = bench.kv(1, 128)
    bench.save(q)
    s = bench.adapter("s", 512, host=True)
    bench.use(s, times=7)
    bench.at(900.0)
    p = bench.kv(2, 128)
    text = (ROOT / "docs" / "policies.md").read_text()
    rows = {"P": (p, 0, 3, -27), "Q": (q, 0, 2, -30), "R": (r, 2, 1, -30), "S": (s, 3, 2, -30)}
    for name, (node, uses, last, saved) in rows.items():
        score = uses + last + saved
        assert bench.policy.priority(node) == score, name
        assert f"| {name} | {uses} | {last} | {saved} | {score} |" in text
    assert bench.order() == [q.id, r.id, s.id, p.id]
