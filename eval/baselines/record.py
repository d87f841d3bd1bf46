"""Records what happens in SGLang's own prefix cache, in order, so that the simulator's trees can be asked the same.

Active only where :data:`ENV_RECORD` names a file: one JSON list a line, ``[event, ...]``, of the calls that change or
ask the tree. Calls that they make themselves are in it, too. Nodes are SGLang's ids; ``null`` is the root.
"""

from __future__ import annotations

import base64
import json
import os
from array import array
from collections.abc import Callable
from typing import Any, TextIO

ENV_RECORD = "ELORA_EVAL_RECORD"

_file: TextIO | None = None


def _say(*event: Any) -> None:
    global _file
    path = os.environ.get(ENV_RECORD)
    if path is None:
        return
    if _file is None:
        _file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  it lives as long as the process
    _file.write(json.dumps(event, separators=(",", ":")) + "\n")


def _tokens(key: Any) -> str:
    return base64.b64encode(array("i", key.raw_token_ids()).tobytes()).decode()


def _node(cache: Any, node: Any) -> int | None:
    return None if cache.is_root(node) else int(node)


def match(original: Callable[..., Any], cache: Any, params: Any) -> Any:
    """AROUND ``UnifiedRadixCache._match_tree``: key, tokens found on the device and beyond on the host, last nodes."""
    result = original(cache, params)
    key = params.key
    _say(
        "match", key.extra_key, _tokens(key), result.device_prefix_len, _node(cache, result.last_device_node),
        result.host_hit_length, _node(cache, result.best_match_node),
    )  # fmt: skip
    return result


def insert(original: Callable[..., Any], cache: Any, params: Any) -> Any:
    """AROUND ``UnifiedRadixCache.insert``: key, tokens that were there, node at its end."""
    _say("insert", params.key.extra_key, _tokens(params.key))
    result = original(cache, params)
    _say("inserted", result.prefix_len, _node(cache, result.last_device_node))
    return result


def lock(original: Callable[..., Any], cache: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache.inc_lock_ref``."""
    result = original(cache, node, *args, **kwargs)
    _say("lock", _node(cache, node))
    return result


def unlock(original: Callable[..., Any], cache: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache.dec_lock_ref``."""
    result = original(cache, node, *args, **kwargs)
    _say("unlock", _node(cache, node))
    return result


def evict(original: Callable[..., Any], cache: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache._evict``: tokens that left the device."""
    result = original(cache, *args, **kwargs)
    _say("evict", result.num_tokens_evicted)
    return result


def evict_host(original: Callable[..., Any], cache: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache.evict_host``: tokens that left the host."""
    result = original(cache, *args, **kwargs)
    _say("evict_host", int(result))
    return result


def backup(original: Callable[..., Any], cache: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache._track_write_through_node``: the node has a host copy, on its way, from now on.

    With the number of tokens up to its end.
    """
    if ENV_RECORD in os.environ:
        _say("backup", _node(cache, node), len(cache.path_device_indices(node)))
    return original(cache, node, *args, **kwargs)


def load_back(original: Callable[..., Any], cache: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache.load_back``: what only the host has, up to the node, comes back, if there is room."""
    _say("load", _node(cache, node))
    result = original(cache, node, *args, **kwargs)
    _say("loaded", bool(result))
    return result


def reset(original: Callable[..., Any], cache: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``UnifiedRadixCache.reset``: everything is gone."""
    result = original(cache, *args, **kwargs)
    _say("reset")
    return result
