"""``sglang.Engine(**keywords)`` in a process of its own: ``engine_launch.py KEYWORDS-AS-JSON``.

Asks one prompt of the base model and of each adapter, and prints a line ``RESULT {"answers": ..., "elora": ...}``.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import sglang

    keywords = json.loads(sys.argv[1])
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
    main()
