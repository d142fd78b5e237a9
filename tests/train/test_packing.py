"""Packed rows: each once, none sees another, and the losses are those of the rows by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.errors import RequestInvalid
from train.settings import CausalLmTask
from train.tasks.causal_lm import row_losses
from train.tasks.causal_rows import Example, encode_row
from train.tasks.packing import check_separate, collate_packs, pack
from train.tasks.rows import IGNORED


def example(length: int, first: int = 1) -> Example:
    ids = np.arange(first, first + length, dtype=np.int32)
    return Example(ids, ids.copy(), 0)


def test_every_row_is_in_one_pack_and_none_is_over_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    rows = [example(int(length), number * 100) for number, length in enumerate(lengths)]
    packs = pack(rows, 32)
    assert max(found.length for found in packs) <= 32
    assert sum(found.rows for found in packs) == 500
    assert sorted(np.concatenate([found.ids for found in packs])) == sorted(np.concatenate([row.ids for row in rows]))
    assert len(packs) < 1.1 * lengths.sum() / 32
    assert [found.ids.tolist() for found in pack(rows, 32)] == [found.ids.tolist() for found in packs]


def test_the_first_token_of_a_row_is_not_the_answer_to_the_row_before() -> None:
    (found,) = pack([example(3), example(2, 10)], 8)
    assert found.labels.tolist() == [IGNORED, 2, 3, IGNORED, 11]
    assert found.positions.tolist() == [0, 1, 2, 0, 1]
    batch = collate_packs([found, pack([example(7)], 8)[0]], 0)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch["labels"][0].tolist() == [IGNORED, 2, 3, IGNORED, 11, IGNORED, IGNORED]


@pytest.fixture(scope="module")
def texts(tiny_base: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = [{"text": "a" * n} for n in (3, 9, 1)] + [{"prompt": "bc" * n, "completion": "d" * n} for n in (2, 4, 6)]
    return [encode_row(row, tokenizer, CausalLmTask()) for row in rows]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_losses_and_gradients_are_those_of_the_rows(
    tiny_base: Path, texts: list[Example], attention: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention)
    packs = pack(texts, 24)
    assert len(packs) < len(texts)
    weight = model.model.layers[0].self_attn.k_proj.weight
    loss = model(**collate_packs(packs, 0), use_cache=False).loss
    loss.backward()
    packed = weight.grad.clone()
    model.zero_grad()
    counted = sum(row.counted for row in texts)
    assert float(loss.detach()) == pytest.approx(sum(row_losses(model, texts, 0)) / counted, rel=1e-5)
    total = 0.0
    for row in texts:
        ids, labels = torch.from_numpy(row.ids[None].astype(int)), torch.from_numpy(row.labels[None].astype(int))
        total = total + model(input_ids=ids, labels=labels).loss * row.counted
    (total / counted).backward()
    torch.testing.assert_close(packed, weight.grad, rtol=1e-4, atol=1e-6)


def test_a_model_whose_rows_see_one_another_is_refused(tiny_base: Path, texts: list[Example]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    packs = pack(texts, 24)
    check_separate(model, packs, 0, 1e-4)
    true = model.forward

    def blind(**batch: Any) -> Any:
        batch.pop("position_ids", None)
        return true(**batch)

    model.forward = blind
    with pytest.raises(RequestInvalid, match="The rows of a pack see one another") as caught:
        check_separate(model, packs, 0, 1e-4)
    assert caught.value.errors[0].pointer == "/task/packing"


def test_a_packed_training_learns_and_resumes_to_the_same_bytes(trainings: Any) -> None:
    changes = {"steps": 8, "batch_size": 2, "task": {"packing": True, "max_length": 64}, "parameters": {"rank": 4}}
    report, adapter, watcher = trainings.run(checkpoint_steps=5, **changes)
    assert report.data["packs"] < report.data["training_rows"] / 3
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    _, again, _ = trainings.run(resume=watcher.checkpoints[5], **changes)
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (adapter / weights).read_bytes()
