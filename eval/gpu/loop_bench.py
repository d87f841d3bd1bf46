"""``python -m elora_sglang.eval.gpu.loop_bench``: adapters and KV on the move, in a PyTorch loop on our own core.

Llama-3-8B-shaped, dummy weights, generated adapters; see :mod:`elora_sglang.eval.gpu.loop` for what it is and is not.

* switch: how long an adapter takes from the host to the device, over its bytes at the speed of a plain pinned copy.
* overlap: time to first token where an adapter and a long context come back from the host, beside the same with both on
  the device and beside the copy alone: how much of the copy the computing hides.
* burst: sglang#13349: requests to 8 adapters, then to 16, with device memory for the KV of the load and 8 adapters.
"""

from __future__ import annotations

import random
import statistics
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from elora_sglang.eval.gpu.llama import LLAMA_8B, TINY, Shape, layout
from elora_sglang.eval.gpu.loop import Job, Loop
from elora_sglang.eval.gpu.timing import Bench, bench, dry_run_parser, finish
from elora_sglang.eval.support import reporting

AIM_SWITCH = 1.3


def _tokens(count: int, vocab: int, seed: str) -> array[int]:
    rng = random.Random(seed)
    return array("q", (rng.randrange(vocab) for _ in range(count)))


def _sync(how: Bench) -> None:
    if not how.dry:
        torch.cuda.synchronize()


def _load(how: Bench, loop: Loop, transfer: int, host: torch.Tensor, device: torch.Tensor) -> float:
    """Seconds of a copy of slots from the host to the device."""
    _sync(how)
    loop.engine.drain()
    begun = loop.now()
    loop.engine.load(transfer, host, device)
    loop.engine.wait(transfer)
    return loop.now() - begun


def switch(how: Bench, shape: Shape, ceiling: float) -> list[dict[str, Any]]:
    """Loads of adapters into scattered device slots, one at a time, nothing else going on."""
    found = []
    for rank in (4,) if how.dry else (8, 16, 64):
        slots = layout(shape, rank, shape.layers, 1).slots
        loop = Loop(shape, how.device, 4 * slots, 3 * slots, {"a": rank})
        adapter = loop.manager.tree.adapter("a")
        assert adapter is not None
        generator, times = torch.Generator().manual_seed(0), []
        for number in range(2 if how.dry else 12):
            order = torch.randperm(4 * slots, generator=generator)[:slots] + 1
            times.append(_load(how, loop, number, adapter.host_payload, order.sort().values))
        size = slots * loop.host.slot_bytes
        seconds = statistics.median(times[1:])
        one = {"rank": rank, "slots": slots, "bytes": size, "seconds": seconds}
        found.append({**one, "ratio": seconds * ceiling / size})
    return found


def overlap(how: Bench, shape: Shape) -> dict[str, Any]:
    """Time to first token of a turn after ``context`` tokens, with all it needs on the device, and on the host."""
    context, new, rank = (24, 8, 4) if how.dry else (6144, 512, 32)
    adapter_slots = layout(shape, rank, shape.layers, 1).slots
    size = 3 * (context + new) + 2 * adapter_slots + 64
    loop = Loop(shape, how.device, size, 4 * size, {"a": rank, "b": rank})
    history = _tokens(context, shape.vocab, "history")
    results: dict[str, list[float]] = {"device": [], "host": [], "copy_alone": []}

    def serve(name: str, tokens: array[int]) -> float:
        _sync(how)
        job = Job(name, "a", tokens, 2, 0.0)
        loop.run([job])
        return job.ttft

    serve("first", history)
    for number in range(2 if how.dry else 8):
        turn = history + _tokens(new, shape.vocab, f"turn {number}")
        for where in ("device", "host"):
            job_tokens = turn + _tokens(1, shape.vocab, where)
            if where == "host":
                deadline = loop.now() + 30
                while loop.driver.busy or not _backed_up(loop, history):
                    loop.step()  # idle: what is new is backed up
                    if loop.now() > deadline:
                        raise RuntimeError("the history was not backed up within 30 s")
                loop.executor.run(loop.manager.evict(size))
                loop.driver.book_ended(loop.driver.finished(), follower=False)
            results[where].append(serve(f"{where} {number}", job_tokens))
    moved = (context + adapter_slots) * loop.host.slot_bytes
    host = torch.arange(context + adapter_slots)
    for number in range(2 if how.dry else 8):
        results["copy_alone"].append(_load(how, loop, 10**6 + number, host, host + 1))
    seconds = {name: statistics.median(values[1:]) for name, values in results.items()}
    hidden = 1 - (seconds["host"] - seconds["device"]) / seconds["copy_alone"]
    return {"context": context, "new": new, "bytes": moved, "seconds": seconds, "copy_hidden": hidden}


def _backed_up(loop: Loop, tokens: array[int]) -> bool:
    tree = loop.manager.tree
    adapter = tree.adapter("a")
    assert adapter is not None
    found = tree.match(adapter, tokens[:-1], None, None)
    return all(node.clean for node in tree.path(found.node) if node.kind == "kv")


def burst(how: Bench, shape: Shape) -> dict[str, Any]:
    """TTFT over 8 adapters and then over 16, prompts of 256 tokens, answers of 32, 4 requests a second."""
    few, rank = (2, 4) if how.dry else (8, 16)
    prompt, answer, rate, seconds = (8, 3, 20.0, 0.5) if how.dry else (256, 32, 4.0, 20.0)
    names = {f"a{number}": rank for number in range(2 * few)}
    adapter_slots = layout(shape, rank, shape.layers, 1).slots
    device = few * adapter_slots + 16 * (prompt + answer)
    host = 2 * few * adapter_slots + 40 * (prompt + answer)
    found: dict[str, Any] = {"rank": rank, "device_slots": device, "adapter_slots": adapter_slots}
    for name, without in (("elora", ()), ("without queue prefetch", ("queue-prefetch",))):
        loop = Loop(shape, how.device, device, host, names, without)
        rng, at = random.Random(1), 0.0
        jobs: list[Job] = []
        while at < 2 * seconds:
            adapters = few if at < seconds else 2 * few
            tokens = _tokens(prompt, shape.vocab, f"burst {len(jobs)}")
            jobs.append(Job(f"r{len(jobs)}", f"a{rng.randrange(adapters)}", tokens, answer, at))
            at += rng.expovariate(rate)
        parts = [[job for job in jobs if (job.arrived < seconds) == first] for first in (True, False)]
        loop.run(jobs)
        if loop.leaks():
            raise RuntimeError(f"{loop.leaks()} device slots are lost")
        found[name] = {
            str(count): {
                "requests": len(part),
                "p50": statistics.median(job.ttft for job in part),
                "most": max(job.ttft for job in part),
            }
            for count, part in zip((few, 2 * few), parts, strict=True)
        } | {"adapter_loads": loop.driver.stats.adapter_loads, "demotions": loop.driver.stats.demoted}
    return found


def tables(result: dict[str, Any]) -> list[reporting.Table]:
    """The three experiments."""
    switch = [
        [one["rank"], one["slots"], f"{one['bytes'] / 2**20:.1f}", f"{1e3 * one['seconds']:.2f}", f"{one['ratio']:.2f}"]
        for one in result["switch"]
    ]  # fmt: skip
    overlap = result["overlap"]
    hidden = [
        [name.replace("_", " "), f"{1e3 * seconds:.1f}"] for name, seconds in overlap["seconds"].items()
    ]
    hidden.append(["share of the copy that computing hides", f"{overlap['copy_hidden']:.0%}"])
    burst = [
        [name, count, part["requests"], f"{1e3 * part['p50']:.0f}", f"{1e3 * part['most']:.0f}"]
        for name, parts in result["burst"].items()
        if isinstance(parts, dict)
        for count, part in parts.items()
        if isinstance(part, dict)
    ]
    first = f"First token after {overlap['context']} tokens of context, {overlap['new']} new ones"
    bursts = ("", "adapters", "requests", "P50 ms", "most")
    loads = ("rank", "slots", "MiB", "ms", "over bytes / link")
    return [
        reporting.Table("An adapter from the host to the device", loads, switch, "switch"),
        reporting.Table(first, ("what it needs is on the", "ms"), hidden, "overlap"),
        reporting.Table("Requests to half of the adapters, then to all", bursts, burst, "loop-burst"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the JSON."""
    args = dry_run_parser("loop_bench", __doc__).parse_args(arguments)
    how = bench(args.dry_run)
    shape = TINY if how.dry else LLAMA_8B
    torch.manual_seed(0)
    ceilings, title = how.ceilings(), "A PyTorch loop on ELORA's core, runtime and kernels; not SGLang"
    with torch.inference_mode():
        result: dict[str, Any] = {
            "dry_run": how.dry, "ceilings": ceilings, "what": title[0].lower() + title[1:],
            "switch": switch(how, shape, ceilings["to_device_bytes_s"]), "overlap": overlap(how, shape),
            "burst": burst(how, shape),
        }  # fmt: skip
    name = "switch of a rank {rank} adapter over bytes / link"
    aims = [reporting.Aim.at_most(name.format(**one), one["ratio"], AIM_SWITCH) for one in result["switch"]]
    finish(args.json, title, tables(result), aims, result, how.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
