"""Rows become tokens: which tokens the loss counts, what is refused and by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.errors import FileBroken
from train.settings import CausalLmTask
from train.tasks.causal_lm import counted_loss, last_counted, row_losses
from train.tasks.causal_rows import collate, encode_row
from train.tasks.rows import IGNORED, Encoded, RowProblemError, encode_rows
from train.tasks.text_batches import padding_of

TASK = CausalLmTask()


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def counted(tokenizer: Any, example: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def test_of_a_pair_the_completion_and_its_end_are_counted(tokenizer: Any) -> None:
    example = encode_row({"prompt": "two and two is ", "completion": "four"}, tokenizer, TASK)
    assert tokenizer.decode(example.ids) == "two and two is four<end>"
    assert counted(tokenizer, example) == "four<end>"
    assert tokenizer.decode(example.ids[: example.answer_start]) == "two and two is "
    assert example.counted == 5


def test_of_a_text_all_but_the_first_token_are_counted(tokenizer: Any) -> None:
    example = encode_row({"text": "hello"}, tokenizer, TASK)
    assert counted(tokenizer, example) == "hello<end>"
    assert example.counted == 5


def test_of_a_chat_only_the_assistants_turns_are_counted(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    example = encode_row({"messages": messages}, tokenizer, TASK)
    assert counted(tokenizer, example).replace("\n", "") == "Ho<end>No.<end>"
    assert tokenizer.decode(example.ids[: example.answer_start]).endswith("[user]And?<end>\n[assistant]")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, "has none of the columns messages, completion and text"),
        ({"prompt": 3, "completion": "a"}, "are texts"),
        ({"text": 3}, "is no text"),
        ({"messages": "hello"}, "is a list of"),
        ({"messages": [{"role": "user"}]}, "is a list of"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
    ],
)
def test_a_row_that_does_not_serve_says_why(tokenizer: Any, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowProblemError, match=words):
        encode_row(row, tokenizer, TASK)


def rows(*lengths: int) -> list[tuple[int, dict[str, str]]]:
    return [(number, {"prompt": "a" * length, "completion": "b"}) for number, length in enumerate(lengths, 1)]


def encoded(tokenizer: Any, found: Any, overlong: str = "error") -> Encoded[Any]:
    return encode_rows(found, lambda row, cut: encode_row(row, tokenizer, TASK, cut), overlong, 20)


def test_overlong_rows_are_named_dropped_or_cut(tokenizer: Any) -> None:
    found = rows(3, 30, 4, 40)
    with pytest.raises(FileBroken, match="2 rows of the dataset can not be used") as caught:
        encoded(tokenizer, found)
    assert [item.pointer for item in caught.value.errors] == ["row 2", "row 4"]
    assert caught.value.errors[0].message == "32 tokens, 20 are allowed"
    dropped = encoded(tokenizer, found, "drop")
    assert (dropped.dropped, dropped.numbers, len(dropped.examples)) == ((2, 4), (1, 3), 2)


def test_a_cut_row_of_which_nothing_is_left_to_learn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FileBroken, match="row 1: nothing is left"):
        encoded(tokenizer, rows(30), "truncate")
    text = [(1, {"text": "c" * 30})]
    cut = encoded(tokenizer, text, "truncate")
    assert (cut.cut, len(cut.examples[0].ids)) == ((1,), 20)


@pytest.mark.parametrize("row", [{"text": ""}, {"prompt": "", "completion": ""}])
def test_a_row_whose_labels_are_all_left_out_is_refused(tokenizer: Any, row: dict[str, str]) -> None:
    """Its one token is the first, which nothing predicts."""
    with pytest.raises(FileBroken, match="1 row of the dataset can not be used; the first is row 2: nothing is left"):
        encoded(tokenizer, [(1, {"text": "ab"}), (2, row)])


def test_at_most_twenty_rows_are_named_and_all_are_counted(tokenizer: Any) -> None:
    with pytest.raises(FileBroken, match="50 rows") as caught:
        encoded(tokenizer, rows(*[30] * 50))
    assert len(caught.value.errors) == 20


def test_padding_changes_no_loss(tokenizer: Any, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    examples = [encode_row({"prompt": "a" * n, "completion": "b" * (9 - n)}, tokenizer, TASK) for n in (1, 5, 8)]
    examples.append(encode_row({"prompt": "one ", "completion": "much longer than all others"}, tokenizer, TASK))
    padding = padding_of(tokenizer)
    batch = collate(examples, padding)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert int(batch["attention_mask"].sum()) == sum(len(example.ids) for example in examples)
    together = row_losses(model, examples, padding)
    alone = [row_losses(model, [example], padding)[0] for example in examples]
    assert together == pytest.approx(alone, rel=1e-4)
    with torch.no_grad():
        single = collate([examples[0]], padding)
        mean = float(model(**single).loss)
    assert alone[0] / examples[0].counted == pytest.approx(mean, rel=1e-5)


def test_the_output_layer_sees_what_predicts_a_counted_token_and_the_loss_is_the_models_own(
    tokenizer: Any, tiny_base: Path
) -> None:
    """Rows of several lengths, one with two counted spans; values and gradients, also beside virtual tokens."""
    pairs = [("two and two is ", "four"), ("a word ", "much longer answer"), ("b and c ", "c")]
    batch = collate([encode_row({"prompt": p, "completion": c}, tokenizer, TASK) for p, c in pairs], 0)
    batch["labels"][0, 10] = batch["input_ids"][0, 10]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    items = (batch["labels"][:, 1:] != IGNORED).sum()
    given = last_counted(batch)
    labels = given.pop("labels")
    output = model(**given)
    assert output.logits.shape[1] == given["logits_to_keep"] == batch["labels"].shape[1] - 6
    found = counted_loss(output, labels, items)
    (gradient,) = torch.autograd.grad(found, [weight])
    expected = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, [weight])[0], rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_counted_token_has_a_loss_of_nothing(tokenizer: Any, tiny_base: Path) -> None:
    batch = collate([encode_row({"text": "hello"}, tokenizer, TASK)], 0)
    batch["labels"].fill_(IGNORED)
    given = last_counted(batch)
    labels = given.pop("labels")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    loss = counted_loss(model(**given), labels, torch.tensor(1))
    loss.backward()
    assert loss == 0
