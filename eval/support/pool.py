"""Many independent jobs on several cores, with a bar for whoever waits."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

_work: Callable[[int], Any] | None = None


def _call(number: int) -> Any:
    assert _work is not None
    return _work(number)


def compute(
    work: Callable[[int], Any], labels: Sequence[str], missing: Sequence[int], processes: int, unit: str
) -> dict[int, Any]:
    """``work(number)`` of every number in ``missing``, by number; ``processes`` work at once.

    Workers are forked, so ``work`` may be a closure over whatever is in memory. ``labels``: of all jobs, of which those
    that are not missing are done already.
    """
    global _work  # a forked worker inherits it
    _work, found = work, dict[int, Any]()
    with tqdm(total=len(labels), initial=len(labels) - len(missing), unit=unit, leave=False) as bar:

        def done(number: int, result: Any) -> None:
            found[number] = result
            bar.set_description(labels[number])
            bar.update()

        if processes < 2 or len(missing) < 2:
            for number in missing:
                done(number, work(number))
            return found
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(processes, len(missing)), mp_context=context) as pool:
            waiting = {pool.submit(_call, number): number for number in missing}
            for future in as_completed(waiting):
                done(waiting[future], future.result())
    return found
