"""Processes that measure: each holds its trees, answers orders through a pipe, and prints nothing of SGLang's."""

from __future__ import annotations

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
    """A process that runs ``serve(pipe, *args)``."""

    def __init__(self, serve: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_quiet, args=(serve, theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def order(self, *what: Any) -> None:
        """Send an order; :meth:`answer` waits for what comes back."""
        self._pipe.send(what)

    def answer(self, patience_s: float) -> Any:
        """What the process answers; a text of its own if it ended or does not answer in time."""
        try:
            return self._pipe.recv() if self._pipe.poll(patience_s) else "no answer"
        except EOFError:
            self.process.join(10)
            return f"its process ended with status {self.process.exitcode}"

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join()


def _quiet(serve: Callable[..., None], pipe: Connection, *args: Any) -> None:
    os.dup2(2, 1)  # whatever SGLang prints must not end up in a JSON report
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    serve(pipe, *args)


def freeze() -> None:
    """Take what is there from the collector, as SGLang's server does after its warm-up (``/freeze_gc``)."""
    gc.collect()
    gc.freeze()
