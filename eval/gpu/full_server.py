"""``python -m elora_sglang.eval.gpu.full_server --model FOLDER``: stock SGLang against ``--elora`` on a GPU.

Both servers get the same share of the GPU memory and the same generated adapters for the model; stock, with
overlap loading, gets ``--slots`` buffers. They serve the same seeded workload in turn, one server at a time: mean, P50
and P99 TTFT, and TPOT, at each rate. For a machine that has SGLang with CUDA; elsewhere it says what is missing and
ends with 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elora_sglang.eval import server
from elora_sglang.eval.gpu.timing import finish
from elora_sglang.eval.serving import player, rates
from elora_sglang.eval.support import arguments, reporting
from elora_sglang.eval.workloads import create

#: As the paper's set-up and sglang#13349 have them.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARMUP = 0.2


def missing(model: Path) -> list[str]:
    """What this machine lacks, a line each."""
    found = []
    if importlib.util.find_spec("sglang") is None:
        found.append("SGLang is not installed: pip install sglang==0.5.23")
    else:
        version = importlib.metadata.version("sglang")
        if version != "0.5.23":
            found.append(f"SGLang {version} is installed, elora-sglang is for 0.5.23")
    if not torch.cuda.is_available():
        found.append("PyTorch sees no CUDA device")
    if not (model / "config.json").exists():
        found.append(f"{model}: no config.json; --model takes a folder with a Hugging Face model")
    return found


def linear_layers(model: Path) -> dict[str, tuple[int, int]]:
    """(output, input) features of every linear layer that gets an adapter, by name. Reads no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(model)))
    modules = ((name, module) for name, module in empty.named_modules() if name.rpartition(".")[2] in MODULES)
    return {name: (module.out_features, module.in_features) for name, module in modules}


def write_adapters(model: Path, folder: Path, ranks: Sequence[int]) -> list[str]:
    """Seeded random PEFT folders, one a rank; those that are there stay. Returns their names."""
    from safetensors.torch import save_file

    layers = linear_layers(model)
    found = [f"tenant-{index:03d}-r{rank}" for index, rank in enumerate(ranks)]
    for index, (name, rank) in enumerate(zip(found, ranks, strict=True)):
        target = folder / name
        if (target / "adapter_config.json").exists():
            continue
        generator, tensors = torch.Generator().manual_seed(index), {}
        for layer, (out, into) in layers.items():
            a = torch.randn(rank, into, generator=generator) / into**0.5
            b = 0.01 * torch.randn(out, rank, generator=generator)
            for matrix, values in (("A", a), ("B", b)):
                tensors[f"base_model.model.{layer}.lora_{matrix}.weight"] = values.to(torch.bfloat16)
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
            "bias": "none", "target_modules": list(MODULES), "base_model_name_or_path": "eval",
        }  # fmt: skip
        (target / "adapter_config.json").write_text(json.dumps(settings))
    return found


def flags(system: str, args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Command line of a server after ``--model-path``."""
    folder = args.adapter_folder
    found = ["--mem-fraction-static", str(args.memory), "--lora-paths"]
    found += [f"{one}={folder / one}" for one in names]
    if system == "elora":
        return [*found, "--elora"]
    return [
        *found, "--enable-lora", "--max-loras-per-batch", str(args.slots), "--enable-lora-overlap-loading",
        "--max-lora-rank", str(max(args.ranks)),
    ]  # fmt: skip


def serve(system: str, args: argparse.Namespace, names: Sequence[str], vocab: int) -> list[dict[str, Any]]:
    """Figures at every rate, caches flushed in between."""
    log = args.json.with_suffix(f".{system}.log")
    live = server.launch(args.model, flags(system, args, names), log, device=None)
    found = []
    try:
        server.wait_ready(live, args.boot_seconds)
        for rate in args.rates:
            work = create(
                args.workload, rate=rate, duration_s=args.seconds, adapters=len(names),
                ranks=",".join(map(str, args.ranks)), seed=args.seed,
            )  # fmt: skip
            live.flush()
            played = player.play(live.url, work, names, vocab=vocab, until_s=args.seconds)
            counted = [one for one in played if one.sent >= WARMUP * args.seconds]
            figures = player.summary(counted, (1 - WARMUP) * args.seconds)
            found.append({"name": system, "rate_asked": rate, "summary": figures})
            reporting.progress(
                f"{system} at {rate:g} turns a second: mean TTFT {1e3 * figures['ttft_mean']:.0f} ms"
            )
    finally:
        live.stop()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the JSON; 2 where it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m elora_sglang.eval.gpu.full_server", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Llama-shaped model")
    add("--adapter-folder", type=Path, help="where adapters are written (default: adapters/ beside --json)")
    add("--json", type=Path, required=True, help="file to write; servers' logs lie beside it")
    systems = arguments.names(("stock", "elora"))
    add("--systems", type=systems, default="stock,elora", help="by comma (default %(default)s)")
    add("--adapters", type=int, default=16)
    ranks = "LoRA ranks, by comma, in turn (default %(default)s)"
    add("--ranks", type=arguments.counts, default="16", help=ranks)
    add("--slots", type=int, default=8, help="buffers of stock (default %(default)s, SGLang's own)")
    add("--memory", type=float, default=0.8, help="--mem-fraction-static of both (default %(default)s)")
    add("--workload", default="chat", help="chat, translation, agents or burst (default %(default)s)")
    add("--rates", type=arguments.positives, default="2,4,8", help="turns a second, by comma")
    add("--seconds", type=float, default=60.0, help="of a run (default %(default)s)")
    add("--boot-seconds", type=float, default=900.0)
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    lacking = missing(args.model)
    if lacking:
        print("full_server cannot start:", *lacking, sep="\n  ", file=sys.stderr)
        return 2
    args.adapter_folder = args.adapter_folder or args.json.parent / "adapters"
    config = json.loads((args.model / "config.json").read_text())
    each = [args.ranks[index % len(args.ranks)] for index in range(args.adapters)]
    names = write_adapters(args.model, args.adapter_folder, each)
    found = [one for system in args.systems for one in serve(system, args, names, config["vocab_size"])]
    data = {"workload": args.workload, "adapters": names, "slots": args.slots, "runs": found}
    shown = [reporting.Table(f"Whole servers on {args.workload}", rates.HEADER, rates.rows(found))]
    title = "Stock SGLang beside --elora on a GPU"
    finish(args.json, title, shown, [], data, torch.device("cuda"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
