"""What both examples do first: reach the server and look which adapters it has."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable

import sglang as sgl


def connect(url: str, adapters: Iterable[str]) -> sgl.RuntimeEndpoint:
    """Backend for the server at ``url``. Ends the program with one line if an adapter is not loaded there."""
    url = url.rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            models = json.load(answer)["data"]
    except (OSError, ValueError) as error:
        raise SystemExit(f"no SGLang server at {url}: {error}; start one with `make serve`") from None
    loaded = sorted(model["id"] for model in models if model.get("parent"))
    for name in adapters:
        if name not in loaded:
            raise SystemExit(f"{url} has no adapter {name!r}; loaded: {', '.join(loaded) or 'none'}")
    return sgl.RuntimeEndpoint(url)
