"""A BPE tokenizer in which every id but the four control tokens has a text of its own.

It works on characters, not bytes: half of a byte-level alphabet decodes to U+FFFD alone, SGLang's detokenizer holds
such text back, and a streamed chunk with empty text makes clients measure a first-token time of zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elora_sglang.demo import text

VOCAB_SIZE = 2048
UNKNOWN, BEGIN, END, PAD = "<unk>", "<s>", "</s>", "<pad>"
CONTROL = (UNKNOWN, BEGIN, END, PAD)
PRINTABLE = [chr(c) for c in range(0x20, 0x7F)] + ["\n", "\t"]
LATIN = [chr(c) for c in range(0xA1, 0x180) if c != 0xAD] + list("–—‘’“”•…€")
# A word with the space before it, a digit, a run of punctuation, or white space.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def train(seed: int) -> Any:
    """Train on the package's own text; a ``PreTrainedTokenizerFast`` with ``VOCAB_SIZE`` ids at most."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL),
        initial_alphabet=PRINTABLE + LATIN,
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.tokenizer_corpus(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template beside the model."""
    tokenizer.save_pretrained(str(folder))
