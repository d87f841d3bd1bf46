"""Random pools for tests and benchmarks of row copies."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from elora_sglang.eval.gpu.cases.case import Case
from elora_sglang.kernels.page_copy import reference
from elora_sglang.kernels.page_copy.rows import Rows

#: Imported where it runs: Triton is not on every machine.
KERNEL = "elora_sglang.kernels.page_copy.triton_kernel"


def make_rows(
    slots: int,
    words: tuple[int, int],
    layers: int,
    *,
    generator: torch.Generator,
    store: torch.device | str,
    device: torch.device | str,
) -> Rows:
    """A pool of random words in ``store``; ``store`` "cpu" is pinned where ``device`` is a GPU."""
    found = []
    for _ in range(layers):
        pair = [torch.randint(-(2**62), 2**62, (slots, size), generator=generator) for size in words]
        if torch.device(store).type == "cpu" and torch.device(device).type == "cuda":
            pair = [rows.pin_memory() for rows in pair]
        found.append((pair[0].to(store), pair[1].to(store)))
    return Rows(found, device)


def poison(rows: Rows) -> None:
    """Overwrite all of it: what a copy leaves out is seen."""
    for pair in rows.layers:
        for one in pair:
            one.fill_(-1)


def joined(rows: Rows) -> torch.Tensor:
    """All words, on the CPU."""
    return torch.cat([one.flatten().cpu() for pair in rows.layers for one in pair])


def case(
    name: str,
    source: Rows,
    target: Rows,
    source_slots: Sequence[int],
    target_slots: Sequence[int],
    layers: range,
) -> Case:
    """A copy; what it must not touch stays poisoned."""
    device = source.device
    slots = [torch.tensor(given, dtype=torch.int32, device=device) for given in (source_slots, target_slots)]

    def run(name: str) -> torch.Tensor:
        module = reference if name == "reference" else importlib.import_module(KERNEL)
        poison(target)
        module.copy_rows(source, target, *slots, layers)
        if device.type == "cuda":  # host memory does not wait for a stream
            torch.cuda.synchronize(device)
        return joined(target)

    def expected() -> torch.Tensor:
        parts = []
        for layer, pair in enumerate(target.layers):
            for stream, rows in enumerate(pair):
                plain = torch.full(rows.shape, -1, dtype=torch.int64)
                if layer in layers:
                    for there, here in zip(source_slots, target_slots, strict=True):
                        plain[here] = source.layers[layer][stream][there].cpu()
                parts.append(plain.flatten())
        return torch.cat(parts)

    ways = {which: partial(run, which) for which in ("reference", "triton")}
    return Case("page_copy", name, ways, expected, 0.0)


def awkward(seed: int, device: torch.device | str) -> Iterator[Case]:
    """Nothing, one slot, pages of 16, rows that differ between K and V, one layer, to the host and back."""
    generator = torch.Generator().manual_seed(seed)

    def slots(count: int, of: int) -> list[int]:
        return torch.randperm(of, generator=generator)[:count].tolist()

    def pages(count: int, of: int) -> list[int]:
        return [16 * page + inside for page in slots(count, of) for inside in range(16)]

    ways = [(device, device)]
    if torch.device(device).type == "cuda":
        ways += [("cpu", device), (device, "cpu")]
    for words in ((4, 4), (34, 6), (256, 256)):
        for from_, to in ways:
            source = make_rows(64, words, 3, generator=generator, store=from_, device=device)
            target = make_rows(48, words, 3, generator=generator, store=to, device=device)
            way = f"{words[0]} and {words[1]} words, {torch.device(from_).type} to {torch.device(to).type}"
            for name, there, here, layers in (
                ("no slots", [], [], range(3)),
                ("one slot, last layer", slots(1, 64), slots(1, 48), range(2, 3)),
                ("scattered", slots(21, 64), slots(21, 48), range(3)),
                ("pages", pages(2, 4), pages(2, 3), range(3)),
                ("first two layers", slots(9, 64), slots(9, 48), range(2)),
            ):
                yield case(f"{name}, {way}", source, target, there, here, layers)
