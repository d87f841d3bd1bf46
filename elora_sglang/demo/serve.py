"""``python -m elora_sglang.demo.serve DEMO_DIR``: serve the demo with ``--elora`` and say what to try."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


def command(demo: Path, host: str, port: int, more: list[str]) -> list[str]:
    """The server's command line: all adapters of the demo but the last, which is left to load by hand."""
    manifest = json.loads((demo / "manifest.json").read_text())
    adapters = [f"{entry['name']}={demo / entry['path']}" for entry in manifest["adapters"][:-1]]
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--elora"),
        *("--model-path", str(demo / manifest["model"]), "--served-model-name", "demo"),
        *("--host", host, "--port", str(port)),
        *("--lora-paths", *adapters),
        *more,
    ]


def hints(demo: Path, host: str, port: int) -> str:
    """Three commands to try: native, OpenAI with SGLang's spelling of an adapter, and loading one more."""
    manifest = json.loads((demo / "manifest.json").read_text())
    first, last = manifest["adapters"][0]["name"], manifest["adapters"][-1]
    sampling = {"max_new_tokens": 16, "temperature": 0}
    chat = [{"role": "user", "content": "Hello"}]
    requests = (
        ("/generate", {"text": "Hello", "lora_path": first, "sampling_params": sampling}),
        ("/v1/chat/completions", {"model": f"demo:{first}", "messages": chat, "max_tokens": 16}),
        ("/load_lora_adapter", {"lora_name": last["name"], "lora_path": str(demo / last["path"])}),
    )
    return "\n".join(_curl(f"http://{host}:{port}{path}", body) for path, body in requests)


def _curl(url: str, body: Any) -> str:
    return f"curl -s {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def wait_until_healthy(server: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Poll ``/health`` until it answers 200; False when the server ends before."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        try:
            with opener.open(f"http://{host}:{port}/health", timeout=10):
                return True
        except OSError:
            time.sleep(0.5)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Serve until the server ends or Ctrl-C; unknown flags go to SGLang. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elora_sglang.demo.serve", description=__doc__)
    parser.add_argument(
        "demo", type=Path, metavar="DEMO_DIR", help="made by python -m elora_sglang.demo DEMO_DIR"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    args, more = parser.parse_known_args(arguments)
    demo = args.demo.resolve()
    if not (demo / "manifest.json").exists():
        print(f"{demo} holds no demo; make it with: python -m elora_sglang.demo {args.demo}", file=sys.stderr)
        return 1
    server = subprocess.Popen(command(demo, args.host, args.port, more))
    try:
        if wait_until_healthy(server, args.host, args.port):
            print(f"\nELORA serves the demo on http://{args.host}:{args.port}; three lines to try:\n")
            print(hints(demo, args.host, args.port), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        return server.wait()


if __name__ == "__main__":
    sys.exit(main())
