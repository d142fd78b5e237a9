from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from examples.smollm2.batches import IGNORED, completion_loss, encode, in_batches, load_model
from examples.smollm2.tasks import TASKS, Item, make_items

TOLERANCE = 1e-5
ITEMS = make_items(TASKS["numbers"], "train", 6) + make_items(TASKS["orders"], "train", 6)


def _loss_of_one(model: object, tokenizer: object, item: Item) -> tuple[float, int]:
    """Summed loss by the plain way: no padding, logits at every position, prompt positions masked."""
    prompt = tokenizer(item.prompt).input_ids
    completion = [*tokenizer(item.completion).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, :-1]
    labels = torch.tensor([IGNORED] * (len(prompt) - 1) + completion)
    return float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")), len(completion)


def test_loss_equals_the_one_from_all_logits_without_padding(tiny_base: Path) -> None:
    model, tokenizer = load_model(tiny_base)
    with torch.inference_mode():
        alone = [_loss_of_one(model, tokenizer, item) for item in ITEMS]
        batch = encode(tokenizer, ITEMS)
        summed, mean = completion_loss(model, batch, "sum"), completion_loss(model, batch)
    total, tokens = sum(loss for loss, _ in alone), sum(count for _, count in alone)
    assert float(summed) == pytest.approx(total, rel=TOLERANCE)
    assert float(mean) == pytest.approx(total / tokens, rel=TOLERANCE)


def test_labels_are_the_completions_and_one_end_of_sequence_each(tiny_base: Path) -> None:
    _, tokenizer = load_model(tiny_base)
    batch = encode(tokenizer, ITEMS)
    for labels, ids, item in zip(batch.labels, batch.inputs["input_ids"], ITEMS, strict=True):
        kept = labels[labels != IGNORED].tolist()
        assert kept.count(tokenizer.eos_token_id) == 1
        assert kept[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(kept[:-1]) == item.completion
        assert ids[-len(kept) :].tolist() == kept


def test_batches_keep_order_and_leave_nothing_out() -> None:
    parts = list(in_batches(ITEMS, 5))
    assert [len(part) for part in parts] == [5, 5, 2]
    assert [item for part in parts for item in part] == ITEMS
