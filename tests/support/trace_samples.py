"""Small traces of every format."""

from __future__ import annotations

import json
from typing import Any


def request(at: int, length: int, hashes: list[int], answer: int = 5) -> dict[str, Any]:
    return {"timestamp": at, "input_length": length, "output_length": answer, "hash_ids": hashes}


# Two conversations that share block 0, a request of one block, and a prompt that comes twice.
MOONCAKE = [
    request(1000, 1500, [0, 1, 2]),
    request(1000, 1024, [0, 7]),
    request(2500, 300, [9]),
    request(4000, 2000, [0, 1, 3, 4]),
    request(4000, 300, [9]),
    request(5000, 2000, [0, 1, 3, 4], answer=0),
    request(6000, 1500, [0, 1, 2]),
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
DIALOGS = [
    {
        "conversation_id": "a",
        "vertical": "Tea",
        "turns": [["user", "one tea"], ["assistant", "with milk or lemon"]],
    },
    {
        "conversation_id": "b",
        "vertical": "Coffee",
        "turns": [
            ["assistant", "hello"],
            ["user", "a mocha please"],
            ["user", "now"],
            ["assistant", "ok"],
            ["assistant", "anything else"],
            ["user", "no"],
            ["assistant", "bye"],
            ["user", "unheard"],
        ],
    },
    {"conversation_id": "c", "vertical": "Tea", "turns": [["user", "alone"]]},
]
TABLE = "ts;in;out;conv;model\n3000;50;5;x;alpha\n1000;20;5;x;alpha\n2000;30;0;;\n5000;12;4;y;beta\n9000;58;1;x;alpha\n"
MAP = "time=ts,prompt=in,answer=out,session=conv,adapter=model,unit=ms"


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
