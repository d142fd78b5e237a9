"""A base model of two layers with one token per byte, and a dataset for it: training takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tokenizer(directory: Path, **options: Any) -> int:
    """One token per byte; returns the size of the vocabulary, in which <end> is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<end>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", **options)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return len(vocabulary)


def write_tiny_base(directory: Path) -> Path:
    """A random Llama, hidden size 32; the same bytes every time."""
    size = write_tokenizer(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_tiny_encoder(directory: Path) -> Path:
    """A random BERT without a head, hidden size 32."""
    size = write_tokenizer(directory, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            initializer_range=0.2,
        )
        BertModel(config).save_pretrained(directory)
    return directory


def moods(count: int = 40) -> list[dict[str, Any]]:
    """Text and label: which of three letters is in the text most."""
    return [
        {"text": f"{number:02d} " + "abc"[number % 3] * (3 + number % 4), "label": ("low", "high", "odd")[number % 3]}
        for number in range(count)
    ]


def tagged(count: int = 40) -> list[dict[str, Any]]:
    """Tokens and tags: words of digits are numbers."""
    return [
        {"tokens": ["take", str(number), "of", str(number * 7)], "tags": ["O", "NUM", "O", "NUM"]}
        for number in range(count)
    ]


def sums(limit: int = 8) -> list[dict[str, Any]]:
    """Prompt and completion of small sums."""
    return [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(limit) for b in range(limit)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
