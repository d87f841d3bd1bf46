"""Workloads: sessions with think times, turns, lengths and adapters, made by seeded generators or read from traces.

:func:`create` makes one by name, :func:`.traces.open_trace` reads a trace or a saved workload, :mod:`.file` saves and
loads, :mod:`.transforms` takes shares of one; :mod:`.model` says what a workload is.

Many files, because a generator and a reader of a trace format are one each, and a new one is one file more.
"""

from __future__ import annotations

import difflib
from dataclasses import fields

from elora_sglang.eval.workloads.agents import Agents
from elora_sglang.eval.workloads.burst import Burst
from elora_sglang.eval.workloads.chat import Chat
from elora_sglang.eval.workloads.model import Workload, WorkloadError
from elora_sglang.eval.workloads.traffic import Traffic
from elora_sglang.eval.workloads.translation import Translation

GENERATORS: dict[str, type[Traffic]] = {kind.NAME: kind for kind in (Chat, Translation, Agents, Burst)}


def generator(name: str) -> type[Traffic]:
    """The class behind a name: its fields are the parameters, ``ABOUT`` says what it is in a line.

    Raises :class:`WorkloadError` for a name that nothing has.
    """
    try:
        return GENERATORS[name]
    except KeyError:
        raise WorkloadError(f"no workload is called {name!r}; there are {', '.join(GENERATORS)}") from None


def create(name: str, **parameters: float | str) -> Workload:
    """A generated workload; the same arguments give the same sessions.

    ``parameters``: fields of the class in ``GENERATORS``, the others have their defaults. Raises
    :class:`WorkloadError` for unknown ones and for values that make no sense.
    """
    kind = generator(name)
    known = {field.name for field in fields(kind)}
    for parameter in parameters:
        if parameter not in known:
            near = difflib.get_close_matches(parameter, sorted(known), 1)
            hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise WorkloadError(f"{name} has no parameter {parameter!r}; {hint}")
    return kind(**parameters).workload()  # type: ignore[arg-type]  # each class checks its own
