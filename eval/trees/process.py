"""Processes that measure: each holds its trees, does what it is asked, and prints nothing of SGLang's."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

#: What is imported before processes fork: SGLang takes many seconds, once is enough.
MODULES = ("elora_sglang.integration.cache.wiring", "sglang.srt.mem_cache.unified_radix_cache")


class Child:
    """A process that calls functions, one after the other; what they keep in their modules stays with it.

    Args:
        name: for messages.
        patience_s: longest time to an answer.
    """

    def __init__(self, name: str, patience_s: float) -> None:
        self.name, self._patience_s = name, patience_s
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def order(self, work: Callable[..., object], *args: Any) -> None:
        """Have ``work(*args)`` called; :meth:`answer` waits for what it returns."""
        self._pipe.send((work, args))

    def answer(self) -> Any:
        """What the process answers; a text if the call failed, the process ended, or none comes in time."""
        try:
            return self._pipe.recv() if self._pipe.poll(self._patience_s) else "no answer"
        except EOFError:
            self._process.join(10)
            return f"its process ended with status {self._process.exitcode}"

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection) -> None:
    os.dup2(2, 1)  # whatever SGLang prints must not end up in a JSON report
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError):
        while True:
            work, args = pipe.recv()
            try:
                answer = work(*args)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}".splitlines()[0]
            pipe.send(answer)


def freeze() -> None:
    """Take what is there from the collector, as SGLang's server does after its warm-up (``/freeze_gc``)."""
    gc.collect()
    gc.freeze()
