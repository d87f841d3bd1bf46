"""A stock launch that writes down which patch hooks were called: ``recording_launch.py {serve|engine} FILE ...``.

SGLang spawns its processes, and a spawned process runs this module again, so the recording reaches all of them.
Each line of FILE is the name of a record whose hook was called, in whatever process.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

from elora_sglang.patches.base import Kind, Patch

FILE = Path(sys.argv[2])
_load = Patch.load_hook


@functools.cache
def _recording(patch: Patch) -> Any:
    hook = _load(patch)

    def called() -> None:
        with FILE.open("a") as lines:
            lines.write(patch.name + "\n")

    if inspect.isclass(hook) and patch.kind is Kind.REPLACE:

        class Recorded(hook):  # type: ignore[valid-type, misc]  # the class is known at run time only
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                called()
                super().__init__(*args, **kwargs)

        Recorded.__module__ = hook.__module__
        return Recorded

    @functools.wraps(hook)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        called()
        return hook(*args, **kwargs)

    return recorded


Patch.load_hook = _recording  # type: ignore[method-assign]


def serve(arguments: list[str]) -> None:
    """What ``python -m sglang.launch_server`` does."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def engine(arguments: list[str]) -> None:
    """``sglang.Engine(**keywords)`` with one prompt for the base model and one per adapter; prints a JSON line."""
    import sglang

    keywords = json.loads(arguments[0])
    names = [None, *(path.partition("=")[0] for path in keywords["lora_paths"])]
    served = sglang.Engine(**keywords)
    try:
        answers = [
            served.generate("Hello", {"temperature": 0, "max_new_tokens": 8}, lora_path=name)["output_ids"]
            for name in names
        ]
        state = served.get_server_info()["internal_states"][0]
        print("RESULT " + json.dumps({"answers": answers, "elora": state.get("elora")}))
    finally:
        served.shutdown()


if __name__ == "__main__":
    {"serve": serve, "engine": engine}[sys.argv[1]](sys.argv[3:])
