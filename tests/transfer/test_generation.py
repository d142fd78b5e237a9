"""Generation: every candidate has random numbers of its own, the shared prefix changes nothing, texts end rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import load, write_llama

from artifacts.errors import TransferRefused
from transfer.decoding import Limits, answers, batches_by_length, end_tokens, text_of
from transfer.generation import GenerationSettings, InputGenerator
from transfer.prompts import generator_prompt
from transfer.sampling import Draws, Sampling, draw

SEEDS = ("Please ship 4 blue mugs to Anna.", "Can Hugo get 2 hats?", "Send 3 red cups to Oslo.")
SETTINGS = GenerationSettings(Sampling(temperature=1.3), max_new_tokens=20, batch_size=8)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def base(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def generator(base: Path, settings: GenerationSettings = SETTINGS) -> InputGenerator:
    return InputGenerator(*load(base), SEEDS, settings)


def test_neither_batch_nor_order_changes_a_candidate(base: Path) -> None:
    made = generator(base)
    whole = made.batch("key", 0)
    assert [item.index for item in whole] == list(range(8))
    assert len({item.text for item in whole}) > 6
    alone = [made.candidates("key", [index])[0] for index in range(8)]
    assert alone == whole
    turned = made.candidates("key", list(reversed(range(8))))
    assert turned[::-1] == whole
    threes = [item for start in (0, 3, 6) for item in made.candidates("key", range(start, min(start + 3, 8)))]
    assert threes == whole
    assert made.batch("other key", 0) != whole
    assert generator(base).batch("key", 0) == whole


@torch.inference_mode()
def test_the_shared_prefix_gives_what_whole_sequences_give(base: Path) -> None:
    """Every step from the whole sequence, with no cache at all, and the same draws."""
    model, tokenizer = load(base)
    limits = Limits.of(model, tokenizer, SETTINGS.max_new_tokens, None)
    prompt = tokenizer(generator_prompt(SEEDS))["input_ids"]
    for candidate in generator(base).batch("key", 1):
        draws = Draws("key", [candidate.index], SETTINGS.max_new_tokens)
        ids: list[int] = []
        for step in range(SETTINGS.max_new_tokens):
            logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[:, -1, : len(tokenizer)]
            token = int(draw(logits, SETTINGS.sampling, draws.at([0], step))[0])
            if token in limits.ends:
                break
            ids.append(token)
        text = text_of(tokenizer, ids)
        cut = text.find("\n", len(text) - len(text.lstrip()))
        assert candidate.text == (text if cut < 0 else text[:cut])


def test_no_id_without_a_token_is_written(gemma: Path) -> None:
    model, tokenizer = load(gemma)
    assert model.config.vocab_size > len(tokenizer)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[len(tokenizer) :] = 100 * head.weight[: model.config.vocab_size - len(tokenizer)]
    found = InputGenerator(model, tokenizer, SEEDS, SETTINGS).batch("key", 0)
    assert all(item.text for item in found if item.finish == "length")


class _Typist:
    """In place of sampling: types one text."""

    def __init__(self, base: Path, text: str) -> None:
        self.model, self.tokenizer = load(base)
        self.ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]

    def written(self, stop: str | None, max_new_tokens: int = 60) -> tuple[str, str]:
        from transfer.decoding import write

        generator = InputGenerator(self.model, self.tokenizer, SEEDS, SETTINGS)
        limits = Limits.of(self.model, self.tokenizer, max_new_tokens, stop)
        start = (generator._first, generator._cache, None)
        with torch.inference_mode():
            (found,) = write(
                self.model, self.tokenizer, start, limits, lambda _l, _r, step: torch.tensor([self.ids[step]])
            )
        return found.text, found.finish


@pytest.mark.parametrize(
    ("text", "stop", "max_new_tokens", "wanted"),
    [
        (" one\n7. two", "\n", 60, (" one", "stop")),
        (" one\nmore\n7. two", "\n7.", 60, (" one\nmore", "stop")),
        ("\n\n one\n7. two", "\n", 60, ("\n\n one", "stop")),
        (" one", "\n", 60, (" one", "end")),
        (" one", None, 2, (" o", "length")),
    ],
)
def test_where_a_text_ends(
    gemma: Path, text: str, stop: str | None, max_new_tokens: int, wanted: tuple[str, str]
) -> None:
    assert _Typist(gemma, text).written(stop, max_new_tokens) == wanted


def test_seeds_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    model, tokenizer = load(write_llama(tmp_path))
    settings = GenerationSettings(Sampling(), max_new_tokens=500)
    with pytest.raises(TransferRefused, match="than the 512") as refused:
        InputGenerator(model, tokenizer, SEEDS, settings)
    assert refused.value.errors[0].pointer == "/parameters/input_tokens"


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    found = torch.bincount(draw(logits.expand(4000, -1), Sampling(), numbers), minlength=4) / 4000
    torch.testing.assert_close(found, logits[0].softmax(-1), atol=1e-3, rtol=0)
    assert found[2] == 0
    hotter = torch.bincount(draw(logits.expand(4000, -1), Sampling(temperature=2.0), numbers), minlength=4) / 4000
    torch.testing.assert_close(hotter, (logits[0] / 2).softmax(-1), atol=1e-3, rtol=0)
    two = torch.bincount(draw(logits.expand(4000, -1), Sampling(top_k=2), numbers), minlength=4) / 4000
    torch.testing.assert_close(
        two, torch.tensor([0, 1.0, -torch.inf, 2]).masked_fill(two == 0, -torch.inf).softmax(-1), atol=1e-3, rtol=0
    )
    assert two[0] == 0
    one = draw(logits.expand(4000, -1), Sampling(top_p=0.5), numbers)
    assert set(one.tolist()) == {3}


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_draw_hit_tokens_that_are_possible(number: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert int(draw(logits, Sampling(), torch.tensor([number], dtype=torch.float64))[0]) in (1, 2)


def test_greedy_answers_do_not_depend_on_the_batch(base: Path) -> None:
    model, tokenizer = load(base)
    prompts = [tokenizer("Message " + "abc " * count)["input_ids"] for count in (3, 1, 7, 2, 2, 9)]
    limits = Limits.of(model, tokenizer, 12, None)
    found = answers(model, tokenizer, prompts, limits, 3)
    assert [answers(model, tokenizer, [prompt], limits, 1)[0] for prompt in prompts] == found
    for prompt, item in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(12):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax())
            if token in end_tokens(model, tokenizer):
                break
            ids.append(token)
        assert item.text == text_of(tokenizer, ids[len(prompt) :])


def test_batches_are_made_by_length() -> None:
    assert list(batches_by_length([[1] * 5, [1], [1] * 3, [1]], 2)) == [[1, 3], [2, 0]]
