"""The demo's base model: a small Llama, trained for a moment so that its greedy choices are clear.

4 layers, hidden size 256, 4 heads of 64 over 2 KV heads (so that two tensor-parallel ranks get one each):
4 million parameters in fp32. Big enough that prefill costs something on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elora_sglang.demo import text

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 256, 4, 2, 64, 704
MAX_POSITION = 8192
STEPS, BATCH, LENGTH, PEAK_RATE = 190, 16, 44, 3e-3
INIT = 0.06
STYLED_SHARE = (
    0.35  # of the training turns name a style in a system line: the base knows every adapter's words
)


def config(tokenizer: Any) -> Any:
    """The ``LlamaConfig`` for this tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        initializer_range=INIT,
        attn_implementation="eager",
    )


def _mixed_turns(seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"mix-{seed}")
    streams = {style: text.turns(style, seed) for style in text.STYLES}
    styled = [style for style in text.STYLES if style != "base"]
    while True:
        if rng.random() < STYLED_SHARE:
            style = rng.choice(styled)
            asked, answer = next(streams[style])
            yield f"system: {style}\n{asked}", answer
        else:
            yield next(streams["base"])


def rows(
    tokenizer: Any, turns: Iterator[tuple[str, str]], length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (ids, labels) rows of ``length``: prompt, answer, end token, padding. Only the answer has labels."""
    for prompt, answer in turns:
        asked = tokenizer(prompt)["input_ids"]
        said = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        padding = max(0, length - len(asked) - len(said))
        ids = asked + said + [tokenizer.pad_token_id] * padding
        labels = [-100] * len(asked) + said + [-100] * padding
        yield ids[:length], labels[:length]


def fit(
    model: Any, source: Iterator[tuple[list[int], list[int]]], *, steps: int, batch: int, peak_rate: float
) -> float:
    """Train the parameters that require gradients, in place, on rows of ``source``; the loss of the last step.

    Linear warm-up over a tenth of the steps, linear decay to a tenth of the peak.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    value = float("nan")
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warm * (1.0 - 0.9 * step / steps)
        ids, labels = (torch.tensor(part) for part in zip(*(next(source) for _ in range(batch)), strict=True))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
    model.eval()
    return value


def train(tokenizer: Any, seed: int) -> tuple[Any, float]:
    """A trained ``LlamaForCausalLM`` in fp32 and its last loss."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(tokenizer))
    with (
        torch.no_grad()
    ):  # a word's output direction starts as its input direction: repeating a word is easy to learn
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    source = rows(tokenizer, _mixed_turns(seed), LENGTH)
    loss = fit(model, source, steps=STEPS, batch=BATCH, peak_rate=PEAK_RATE)
    return model, loss


def save(model: Any, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors``."""
    model.save_pretrained(str(folder), safe_serialization=True)
