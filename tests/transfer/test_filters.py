"""The filters: what is accepted, what an adapter adds token by token, and how scores cross tokenizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load, load_adapted, write_llama

from artifacts.errors import TransferRefused, TransferStarved
from transfer.candidates import Candidate, Screened, screen
from transfer.filters.discriminator import Discriminator, DiscriminatorRecipe
from transfer.filters.excess import score_answers, tuneshift_score
from transfer.prompts import PromptFormat
from transfer.selection import select, select_best
from transfer.span_alignment import ScoredSpan, align, keep_highest

TEXTS = ["Please ship 4 mugs", "a", "Can Hugo get 12 blue hats delivered to Oslo?", "not True", "ship ship ship"]


class Judge(DiscriminatorRecipe):
    """Other words for yes and no, single tokens of the tiny tokenizers."""

    words: tuple[str, str] = ("y", "n")

    @property
    def answers(self) -> tuple[str, str]:
        return self.words


class Shifted(torch.nn.Module):
    """A model whose logits all are higher by a constant."""

    def __init__(self, model: Any, by: float) -> None:
        super().__init__()
        self.inner, self.by = model, by

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits + self.by
        return output


@pytest.fixture(scope="module")
def judged(llama: Path, llama_adapter: Path) -> tuple[Any, Any]:
    return load_adapted(llama, llama_adapter)


@pytest.fixture(scope="module")
def words(judged: tuple[Any, Any]) -> tuple[str, str]:
    """Two letters between which the random model decides now this way, now that way."""
    pairs = [(one, other) for one in "abcdefgh" for other in "mnopqrst"]
    for pair in pairs:
        found = Discriminator(*judged, Judge(task="orders", words=pair)).scores(TEXTS, 5)
        if min(found) < -0.1 and max(found) > 0.1:
            return pair
    raise AssertionError("the model decides always the same way")


def test_a_score_is_the_difference_of_two_logits(judged: tuple[Any, Any], words: tuple[str, str]) -> None:
    model, tokenizer = judged
    recipe = Judge(task="orders", words=words)
    found = Discriminator(model, tokenizer, recipe).scores(TEXTS, 2)
    yes, no = (tokenizer(word)["input_ids"][0] for word in recipe.words)
    for text, score in zip(TEXTS, found, strict=True):
        ids = torch.tensor([recipe.encode(text, tokenizer)])
        logits = model(input_ids=ids).logits[0, -1]
        assert score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_score_depends_on_nothing_else(judged: tuple[Any, Any], size: int) -> None:
    model, tokenizer = judged
    wanted = Discriminator(model, tokenizer, Judge(task="orders")).scores(TEXTS, 2)
    assert Discriminator(model, tokenizer, Judge(task="orders")).scores(TEXTS, size) == pytest.approx(wanted, abs=1e-4)
    shifted = Discriminator(Shifted(model, 5.0), tokenizer, Judge(task="orders")).scores(TEXTS, size)
    assert shifted == pytest.approx(wanted, abs=1e-4)
    turned = Discriminator(model, tokenizer, Judge(task="orders", words=("n", "y"))).scores(TEXTS, size)
    assert turned == pytest.approx([-score for score in wanted], abs=1e-4)


def test_padding_on_the_other_side_gives_the_same_score(judged: tuple[Any, Any]) -> None:
    model, tokenizer = judged
    recipe = Judge(task="orders", chat=True)
    found = Discriminator(model, tokenizer, recipe).scores(TEXTS, 5)
    yes, no = (tokenizer(word)["input_ids"][0] for word in recipe.words)
    prompts = [recipe.encode(text, tokenizer) for text in TEXTS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row, prompt in enumerate(prompts):
        last = logits[row, len(prompt) - 1]
        assert found[row] == pytest.approx(float(last[yes] - last[no]), abs=1e-4)


def test_answers_are_single_tokens(tmp_path: Path) -> None:
    _, tokenizer = load(write_llama(tmp_path, vocabulary=1))
    with pytest.raises(TransferRefused, match="' yes' is 4 tokens") as refused:
        DiscriminatorRecipe(task="orders").answer_ids(tokenizer)
    assert refused.value.errors[0].pointer == "/parameters/filter"
    with pytest.raises(TransferRefused, match="one token for both"):
        Judge(task="orders", words=("y", "y")).answer_ids(tokenizer)


def passed(count: int) -> list[Screened]:
    return screen([Candidate(index, f"text {index}", "stop") for index in range(count)], ["seed a", "seed b", "c"])


def test_a_tie_is_rejected_and_the_first_by_index_are_kept() -> None:
    scores = dict(enumerate([0.0, 1.0, -1.0, 0.5, 2.0, 0.1]))
    found = select(passed(6), scores, 3, threshold=0.0, on_starved="fail")
    assert [item.index for item in found.kept] == [1, 3, 4]
    assert (found.accepted, found.scored, found.starved) == (4, 6, False)
    assert found.to_dict()["acceptance"]["rate"] == pytest.approx(4 / 6)
    higher = select(passed(6), scores, 2, threshold=0.5, on_starved="fail")
    assert [item.index for item in higher.kept] == [1, 4]
    assert (higher.accepted, higher.accepted_at_zero) == (2, 4)


def test_a_starved_transfer_fails_or_takes_the_next_best() -> None:
    scores = dict(enumerate([-0.3, 1.0, -0.1, -0.1, -5.0]))
    with pytest.raises(TransferStarved, match="1 were accepted; 3 are wanted") as refused:
        select(passed(5), scores, 3, threshold=0.0, on_starved="fail")
    assert "text" not in f"{refused.value.detail} {refused.value.hint}".replace("top_n", "")
    found = select(passed(5), scores, 3, threshold=0.0, on_starved="top_n")
    assert [item.index for item in found.kept] == [1, 2, 3]
    assert found.starved
    assert found.to_dict()["starved"]
    with pytest.raises(TransferStarved):
        select(passed(2), scores, 3, threshold=0.0, on_starved="top_n")


def test_the_best_are_kept_by_score() -> None:
    found = select_best(passed(5), dict(enumerate([0.1, 3.0, 2.0, -1.0, 2.0])), 2)
    assert [item.index for item in found.kept] == [1, 2]
    with pytest.raises(TransferStarved):
        select_best(passed(5), dict.fromkeys(range(5), 0.0), 6)


def test_excess_is_what_the_adapter_adds(judged: tuple[Any, Any], llama: Path) -> None:
    model, tokenizer = judged
    plain, _ = load(llama)
    form = PromptFormat(template="Message: {x}\nCode:")
    prompts = [form.encode(text, tokenizer) for text in TEXTS]
    said = [" Lima | mugs", " blue", "", " Z\u00fcrich \u2603 ok", " 4"]
    found = score_answers(model, tokenizer, prompts, said, 2)
    for prompt, answer, scored in zip(prompts, said, found, strict=True):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert len(scored.spans) == len(ids)
        if not ids:
            assert scored.excess == tuneshift_score(scored, "ratio") == -math.inf
            continue
        whole = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            own, base = (each(input_ids=whole).logits[0].log_softmax(-1) for each in (model, plain))
        wanted = [float(own[len(prompt) + n - 1, i] - base[len(prompt) + n - 1, i]) for n, i in enumerate(ids)]
        assert [span.score for span in scored.spans] == pytest.approx(wanted, abs=1e-4)
        assert scored.excess == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
        assert tuneshift_score(scored, "ratio") == pytest.approx(math.exp(scored.excess), rel=1e-6)
        assert tuneshift_score(scored, "difference") == pytest.approx(math.exp(scored.base) - math.exp(scored.teacher))
    # the adapter is on again
    assert torch.equal(model(input_ids=whole).logits[0].log_softmax(-1), own)


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        ([(0, 2, 1.0), (2, 5, 3.0)], [(0, 2), (2, 5)], [1.0, 3.0]),  # 1:1
        ([(0, 4, 2.0), (4, 5, 1.0)], [(0, 1), (1, 4), (4, 5)], [2.0, 2.0, 1.0]),  # 1:n
        ([(0, 1, 1.0), (1, 2, 2.0), (2, 4, 6.0)], [(0, 2), (2, 4)], [1.5, 6.0]),  # n:1
        ([(0, 2, 1.0), (2, 4, 3.0)], [(0, 1), (1, 3), (3, 4)], [2.0, 2.0, 2.0]),  # n:m
        ([(0, 1, 1.0), (1, 2, 5.0), (1, 2, 7.0), (2, 3, 2.0)], [(0, 1), (1, 2), (2, 3)], [1.0, 6.0, 2.0]),  # bytes
        ([(0, 1, 1.0)], [(0, 1), (1, 2)], [1.0, 0.0]),  # text that the source has not
        ([], [(0, 3)], [0.0]),
        ([(0, 3, 1.0)], [], []),
    ],
)
def test_scores_follow_the_text(
    source: list[tuple[int, int, float]], target: list[tuple[int, int]], wanted: list[float]
) -> None:
    assert align([ScoredSpan(*span) for span in source], target) == pytest.approx(wanted)


def test_the_highest_scores_are_kept() -> None:
    assert keep_highest([1.0, 5.0, 3.0, 3.0, 0.0], 0.5) == {1, 2, 3}
    assert keep_highest([1.0, 1.0, 1.0], 0.3) == {0}
    assert keep_highest([2.0, 1.0], 1.0) == {0, 1}
    assert keep_highest([], 0.7) == set()
