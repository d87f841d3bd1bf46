"""The examples that pages work out by hand are what the code computes."""

from __future__ import annotations

from support.doc_pages import ROOT
from support.overtaking_model import Job, Server

from elora_sglang.runtime.pool.layout import ModuleShape, SliceShape, plan_adapter

R = Job("R", arrival=0, adapter=None, prompt=30, max_new=19, length=9)
QUEUE = [
    Job("A", arrival=1, adapter="cold", prompt=10, max_new=9, length=4),
    Job("B", arrival=1, adapter=None, prompt=5, max_new=2, length=2),
    Job("C", arrival=1, adapter=None, prompt=5, max_new=4, length=4),
    Job("D", arrival=1, adapter=None, prompt=5, max_new=24, length=24),
]
ORDERS = {"strict": "fcfs", "ELORA's rule": "rule", "everybody who fits": "anybody"}


def server(order: str) -> Server:
    return Server(pool=100, sizes={"cold": 60}, chunk=100, rows=8, order=order)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_overtaking_waits() -> None:
    text = page("overtaking.md")
    for name, order in ORDERS.items():
        waits = server(order).run([R, *QUEUE]).waits
        row = [waits[job.rid] for job in QUEUE]
        cells = [name, *map(str, row), f"{sum(row) / len(row):g}"]
        assert f"| {' | '.join(cells)} |" in text


def test_overtaking_batch_by_batch() -> None:
    """Every row of the page: what runs and the lag when the pass begins, and who is admitted."""
    text = page("overtaking.md")
    world = server("rule")
    world.add(R)
    world.step()
    for job in QUEUE:
        world.add(job)
    for w in range(11):
        running = ", ".join(f"{one.job.rid} {one.left}" for one in world.running) or "nobody"
        start = f"| {w} | {running} | {world.rule.lag} | "
        row = next(line for line in text.splitlines() if line.startswith(start))
        world.step()
        admitted = [rid for rid, wait in world.waits.items() if rid != "R" and wait == w]
        assert [rid for rid in "ABCD" if f"**{rid} " in row] == admitted, row


def test_one_adapter_placed_by_hand() -> None:
    """Every matrix of the small adapter on the page, and the row whose address it works out."""
    q, v = SliceShape(offset=0, width=16, rank=2), SliceShape(offset=24, width=8, rank=2)
    layout = plan_adapter(
        [[ModuleShape("qkv_proj", 16, (q, v))]], itemsize=2, row_bytes=(32, 32), page_size=1
    )
    text = page("byte-layout.md")
    for name, (_, matrix, first, rows, columns, stream, offset) in zip(
        ("A of q and v", "B of q", "B of v"), layout.table(0), strict=True
    ):
        size = rows * columns * 2
        row = f"| {name} | {matrix} | {first} | {rows} | {columns} | {stream} | {offset} | {size} |"
        assert row in text
    assert layout.slots == 4 and "**4 slots**" in text
    offset = layout.table(0)[2][-1]
    b = offset + 1 * 8 * 2
    assert (b, [17, 18, 19, 20][b // 32], b % 32) == (80, 19, 16)
    assert "b = 64 + 1 * 8 * 2 = 80" in text
