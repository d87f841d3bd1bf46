"""``python -m elora_sglang.eval.baselines.launch FLAGS``: ``sglang.launch_server`` with hooked schedulers.

SGLang's ``launch_server`` takes the function that its scheduler processes run (``entrypoints/http_server.py``). Ours
installs the records of ``patches.py`` there and goes on with SGLang's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from elora_sglang.eval.baselines.patches import MANIFEST, PATCHES


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """A scheduler process of SGLang with every record in place. Exits with one line where one cannot be."""
    from sglang.srt.managers import scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from elora_sglang.integration.plugin import verify
    from elora_sglang.integration.plugin.install import install
    from elora_sglang.patches.base import manifest

    load_plugins()
    verify.check_all(PATCHES, manifest(MANIFEST))
    install(PATCHES)
    HookRegistry.apply_hooks()
    verify.require_in_place(PATCHES)
    return scheduler.run_scheduler_process(*args, **kwargs)


def main(arguments: list[str] | None = None) -> None:
    """Start the server and serve until it is stopped. ``arguments``: SGLang's; by default those of this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(sys.argv[1:] if arguments is None else arguments)
    try:
        server_args.resolve_once()
        launch_server(server_args, run_scheduler_process_func=run_scheduler_process)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
