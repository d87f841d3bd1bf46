"""Entry point ``sglang.srt.plugins``: SGLang calls :func:`register` once in every process.

In the launcher the arguments are not parsed yet, so only the command line is hooked there; the rest follows
when ``--elora`` is seen (:mod:`elora_sglang.integration.plugin.launch`). A scheduler process learns from its
environment that its launcher runs with ``--elora``, because it has no arguments yet, either.
"""

from __future__ import annotations

import sys

from elora_sglang.integration.plugin import config

SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
ENGINE_MODULE = "sglang.srt.entrypoints.engine"


def register() -> None:
    """Register ELORA's hooks for this process. SGLang swallows exceptions here, so faults exit."""
    try:
        _register()
    except Exception as error:
        raise SystemExit(f"elora: the plugin could not be set up: {type(error).__name__}: {error}") from error


def _register() -> None:
    from elora_sglang.integration.plugin import launch, verify
    from elora_sglang.integration.plugin.install import install
    from elora_sglang.patches.base import Patch, Process, When, discover, select

    patches = discover()
    child = config.announce_launcher()
    # What a command line does not need is not imported for it: an Engine has its module in place already.
    always = select(patches, process={Process.MAIN}, when={When.ALWAYS})
    install(p for p in always if ENGINE_MODULE in sys.modules or not p.target.startswith(ENGINE_MODULE))
    if SCHEDULER_MODULE not in sys.modules:
        return
    # A scheduler process, or an Engine's launcher, whose schedulers may be forked from it.
    needed: tuple[Patch, ...] = ()
    if launch.on_elora_cpu_platform():
        needed += select(patches, process={Process.SCHEDULER}, when={When.CPU})
    if child and config.launcher_enabled():
        needed += verify.scheduler_patches()
    verify.check_all(needed)
    install(needed)
