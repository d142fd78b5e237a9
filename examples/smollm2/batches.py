"""Tensors of prompts and completions, and the loss on the completions alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.tasks import Item

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Left-padded sequences, so that every completion ends in the last column.

    inputs: input_ids, attention_mask and position_ids, each n × length.
    labels: n × longest completion; the last columns of input_ids, IGNORED where a shorter completion's prompt lies.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


def load_model(directory: Path) -> tuple[Any, Any]:
    """The base model (fp32, evaluation mode) and its tokenizer, set to pad on the left."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    return model.eval(), tokenizer


@contextmanager
def peft_deprecations_ignored() -> Iterator[None]:
    """For making a PEFT model: this release of PEFT reads a property that transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def encode(tokenizer: Any, items: Sequence[Item]) -> Batch:
    """Prompt, completion and end-of-sequence token of each item."""
    prompts = [tokenizer(item.prompt).input_ids for item in items]
    completions = [
        [*tokenizer(item.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for item in items
    ]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    longest = max(map(len, completions))
    ids = torch.full((len(items), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(items), longest), IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        sequence = torch.tensor(prompt + completion)
        ids[row, -len(sequence) :] = sequence
        mask[row, -len(sequence) :] = 1
        labels[row, -len(completion) :] = torch.tensor(completion)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels)


def completion_loss(model: Any, batch: Batch, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy per completion token (nats), mean or sum over the batch's completion tokens.

    Only the positions that predict a completion go through the output layer: with 49,152 words in the vocabulary it
    would otherwise cost as much as the rest of the model.
    """
    kept = batch.labels.shape[1] + 1
    logits = model(**batch.inputs, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
