"""Greedy answers by Transformers with merged adapter weights: what every server's tokens are compared with.

fp32, eager attention, one merged copy of the model per adapter. Use it only in a process that never imports
SGLang: once SGLang is imported, ``from_pretrained`` leaves Llama's rotary frequencies uninitialised.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 32


@dataclass(frozen=True)
class Job:
    """One greedy continuation: token ids in, ``max_new_tokens`` ids out; ``adapter`` None is the base model.

    Generation stops after the first of ``stop_ids`` (which is part of the answer), if any is given.
    """

    input_ids: tuple[int, ...]
    adapter: str | None
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Generated ids, and per id the logit gap between it and the runner-up."""

    output_ids: list[int]
    margins: list[float]


class Reference:
    """The base model and its merged variants, loaded on first use and kept one at a time."""

    def __init__(self, model: Path | str, adapters: dict[str, Path | str]) -> None:
        """``model``: HF folder; ``adapters``: PEFT folder by name. Raises RuntimeError after an sglang import."""
        if "sglang" in sys.modules:
            raise RuntimeError("sglang is imported in this process: make reference answers in a clean one")
        import torch
        from transformers import AutoModelForCausalLM

        self._base = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._adapters = adapters

    def _merged(self, adapter: str | None) -> Any:
        if adapter is None:
            return self._base
        if adapter not in self._adapters:
            raise KeyError(f"no adapter {adapter!r}; there are {sorted(self._adapters)}")
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(copy.deepcopy(self._base), str(self._adapters[adapter]))
        return wrapped.float().merge_and_unload().eval()

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers in the order of ``jobs``; jobs of one adapter and similar length share a batch."""
        answers: dict[int, Answer] = {}
        for adapter in sorted({job.adapter for job in jobs}, key=lambda name: (name is not None, name or "")):
            model = self._merged(adapter)
            mine = [i for i, job in enumerate(jobs) if job.adapter == adapter]
            mine.sort(key=lambda i: (len(jobs[i].input_ids), jobs[i].max_new_tokens, i))
            for start in range(0, len(mine), BATCH):
                batch = mine[start : start + BATCH]
                answers.update(zip(batch, _greedy(model, [jobs[i] for i in batch]), strict=True))
        return [answers[i] for i in range(len(jobs))]


def _greedy(model: Any, jobs: Sequence[Job]) -> list[Answer]:
    import torch

    width = max(len(job.input_ids) for job in jobs)
    ids = torch.zeros(len(jobs), width, dtype=torch.long)
    mask = torch.zeros(len(jobs), width, dtype=torch.long)
    for row, job in enumerate(jobs):
        ids[row, width - len(job.input_ids) :] = torch.tensor(job.input_ids)
        mask[row, width - len(job.input_ids) :] = 1
    tokens: list[torch.Tensor] = []
    margins: list[torch.Tensor] = []
    cache = None
    with torch.inference_mode():
        for _ in range(max(job.max_new_tokens for job in jobs)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            best = out.logits[:, -1].float().topk(2)
            tokens.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
            ids = best.indices[:, :1]
            mask = torch.cat([mask, torch.ones(len(jobs), 1, dtype=torch.long)], dim=1)
    table, gaps = torch.stack(tokens, 1).tolist(), torch.stack(margins, 1).tolist()
    return [_cut(job, ids, gap) for job, ids, gap in zip(jobs, table, gaps, strict=True)]


def _cut(job: Job, ids: list[int], gaps: list[float]) -> Answer:
    end = job.max_new_tokens
    for at, token in enumerate(ids[:end]):
        if token in job.stop_ids:
            end = at + 1
            break
    return Answer(ids[:end], gaps[:end])
