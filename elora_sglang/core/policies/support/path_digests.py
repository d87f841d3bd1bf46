"""Recognises a conversation that goes on: digests of a token path at fixed places, whatever nodes it is cut into."""

from __future__ import annotations

import hashlib
from array import array

from elora_sglang.core.tree.node import Node


def path_tokens(node: Node) -> array[int]:
    """The tokens from the adapter down to the end of ``node`` (KV, in the tree)."""
    parts: list[array[int]] = []
    while node.kind == "kv" and node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    tokens: array[int] = array("q")
    for part in reversed(parts):
        tokens.extend(part)
    return tokens


def namespace_of(node: Node) -> bytes:
    """What separates equal tokens below one adapter: the namespace, as text."""
    while node.parent is not None and node.parent.kind == "kv":
        node = node.parent
    return repr(node.key[0]).encode() if isinstance(node.key, tuple) else b""


def path_digests(node: Node) -> list[tuple[int, bytes]]:
    """Places along the path of ``node`` and 8 bytes of a blake2b of all tokens before each, the longest last.

    Places are every 16 tokens up to 512, every 64 up to 4,096, then every 256. Neither the last token of the path (it
    is often encoded otherwise when the text comes back) nor a part of a step has a place. O(tokens).
    """
    tokens = path_tokens(node)
    digest = hashlib.blake2b(namespace_of(node), digest_size=8)
    places: list[tuple[int, bytes]] = []
    start = 0
    while True:
        end = start + (16 if start < 512 else 64 if start < 4096 else 256)
        if end >= len(tokens):
            return places
        digest.update(tokens[start:end])
        places.append((end, digest.copy().digest()))
        start = end
