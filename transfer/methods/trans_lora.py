"""Trans-LoRA (arXiv:2405.17258, algorithm 1) and its relatives without a discriminator: generate, filter, until enough
inputs are kept or the most have been generated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from artifacts.errors import FieldError, TransferRefused
from transfer.bench import DISCRIMINATOR, TASK, Bench, StoredDiscriminator, required_seeds
from transfer.candidates import Candidate, Screened, screen
from transfer.filters.discriminator import Discriminator
from transfer.filters.excess import ScoredAnswer, score_answers, tuneshift_score
from transfer.generation import GenerationSettings, InputGenerator
from transfer.labelling import Label
from transfer.options import TransLoraOptions
from transfer.prompts import stop_of
from transfer.sampling import Sampling
from transfer.seeds import grown_seeds, seeds_digest
from transfer.selection import Selection, select, select_best
from transfer.sources import Drawn, PromptSource, Span

GROWING_ROUNDS = 4
"""With growing seeds a round generates at most this part of what is wanted. The paper does not tell its rounds."""
LEAST_RATE = 0.05
"""A round generates as if at least this share were accepted, so that one unlucky round does not ask for everything."""


class TransLora(PromptSource):
    """A shard is a batch of candidates: the unit that is generated, filtered and kept."""

    def draw(self, bench: Bench) -> Drawn:
        return _Search(bench).run()


class _Search:
    def __init__(self, bench: Bench) -> None:
        self._bench, self._options = bench, cast("TransLoraOptions", bench.options)
        self._seeds = required_seeds(bench.inputs)
        if self._options.filter == "discriminator":
            _discriminator(bench)
        self._size = self._options.generation_batch
        self._shards: list[list[Candidate]] = []
        self._screened: list[Screened] = []
        self._scores: dict[int, float] = {}
        self._labels: dict[int, Label] = {}
        self._spans: dict[int, tuple[Span, ...]] = {}

    def run(self) -> Drawn:
        wanted = self._options.ranked if self._options.filter == "excess" else self._options.rows
        limit = -(-self._options.candidates // self._size)
        more = self._round(-(-wanted // self._size), wanted)
        while more and len(self._shards) < limit:
            first = len(self._shards)
            self._generate(min(first + more, limit))
            self._screen()
            if self._options.filter != "excess":
                self._score(first)
            found = self._found()
            rate = max(found / len(self._screened), LEAST_RATE)
            missing = math.ceil((wanted - found) / rate / self._size) if found < wanted else 0
            more = self._round(missing, wanted)
        if self._options.filter == "excess":
            self._screened = _first_passed(self._screened, wanted)
            self._score(0)
        selection = self._select()
        chosen = [item.index for item in selection.kept]
        return Drawn(
            kept=selection.kept,
            labels=tuple(self._labels[index] for index in chosen) if self._labels else None,
            spans={index: self._spans[index] for index in chosen} if self._options.filter == "excess" else {},
            report={"filter": self._options.filter, **selection.to_dict()},
            unfiltered=tuple(item.text for item in self._screened if item.verdict == "passed"),
            degraded=selection.starved,
        )

    def _round(self, shards: int, wanted: int) -> int:
        """How many are generated before the filter looks: with growing seeds few, that it finds seeds for the next."""
        return min(shards, math.ceil(wanted / GROWING_ROUNDS / self._size)) if self._options.growing else shards

    def _seeds_of(self, number: int, accepted: Sequence[str]) -> tuple[str, ...]:
        if not self._options.growing or not accepted:
            return self._seeds
        return grown_seeds(self._seeds, accepted, self._bench.inputs.key, number)

    def _accepted(self) -> list[str]:
        cut = self._options.cut
        return [item.text for item in self._screened if self._scores.get(item.index, -math.inf) > cut]

    def _generate(self, until: int) -> None:
        """Shards up to number `until`, one after another, with the target base."""
        options, bench = self._options, self._bench
        settings = GenerationSettings(
            Sampling(options.temperature, options.top_p, options.top_k),
            options.input_tokens,
            self._size,
            stop_of(self._seeds) if options.stop == "auto" else options.stop,
        )
        generators: dict[tuple[str, ...], InputGenerator] = {}

        def make(number: int, seeds: tuple[str, ...]) -> list[list[Any]]:
            bench.observer.unit("generate", f"generating inputs from number {number * self._size} on")
            if seeds not in generators:
                generators.clear()
                resident = bench.resident
                generators[seeds] = InputGenerator(resident.target(), resident.target_tokenizer(), seeds, settings)
            return [[item.index, item.text, item.finish] for item in generators[seeds].batch(bench.inputs.key, number)]

        how = [options.temperature, options.top_p, options.top_k, options.input_tokens, options.stop, self._size]
        accepted = self._accepted()
        for number in range(len(self._shards), until):
            seeds = self._seeds_of(number, accepted)
            given = [[bench.inputs.key, seeds_digest(seeds), how], number]
            rows = bench.files.json_unit(f"generate-{number:05d}", given, partial(make, number, seeds))
            self._shards.append([Candidate(*row) for row in rows])

    def _screen(self) -> None:
        """All candidates so far; a text is a duplicate by what stands before it, so earlier verdicts stay."""
        candidates = [item for shard in self._shards for item in shard if item.index < self._options.candidates]
        self._screened = screen(candidates, self._seeds)

    def _score(self, first: int) -> None:
        """The shards from `first` on, with the source base."""
        for number in range(first, len(self._shards)):
            inside = range(number * self._size, (number + 1) * self._size)
            passed = [item for item in self._screened if item.verdict == "passed" and item.index in inside]
            if self._options.filter == "none":
                self._scores.update((item.index, 1.0) for item in passed)
            elif passed:
                self._score_shard(number, passed)

    def _score_shard(self, number: int, passed: Sequence[Screened]) -> None:
        bench, options = self._bench, self._options
        texts = [[item.index, item.text] for item in passed]
        if options.filter == "discriminator":
            stored = _discriminator(bench)
            given = [stored.digest, stored.recipe.model_dump(), options.filter_batch, texts]
            scores = bench.files.json_unit(f"filter-{number:05d}", given, lambda: self._discriminate(stored, passed))
            self._scores.update((item.index, score) for item, score in zip(passed, scores, strict=True))
            return
        given = [bench.answer_settings, options.filter_batch, texts]
        rows = bench.files.json_unit(f"answer-{number:05d}", given, lambda: self._answer(passed))
        for item, (answer, finish, spans, teacher, base) in zip(passed, rows, strict=True):
            self._labels[item.index] = Label(item.index, item.text, answer, finish)
            scored = ScoredAnswer(tuple(spans), teacher, base)
            self._spans[item.index] = tuple((start, end, score) for start, end, score in spans)
            useful = finish != "length" and bool(answer.strip())
            self._scores[item.index] = self._compared(scored) if useful else -math.inf

    def _compared(self, scored: ScoredAnswer) -> float:
        if self._options.filter == "tuneshift_kd":
            return tuneshift_score(scored, self._options.comparison)
        return scored.excess

    def _discriminate(self, stored: StoredDiscriminator, passed: Sequence[Screened]) -> list[float]:
        resident = self._bench.resident
        self._bench.observer.unit("filter", f"filtering inputs from number {passed[0].index} on")
        judge = Discriminator(resident.source(DISCRIMINATOR), resident.source_tokenizer(), stored.recipe)
        return judge.scores([item.text for item in passed], self._options.filter_batch)

    def _answer(self, passed: Sequence[Screened]) -> list[list[Any]]:
        """Answer, its finish, spans, and the likelihoods with and without the adapter, for each."""
        resident, inputs = self._bench.resident, self._bench.inputs
        self._bench.observer.unit("filter", f"answering inputs from number {passed[0].index} on")
        labels = self._bench.labeller().label_all(passed)
        tokenizer = resident.source_tokenizer()
        prompts = [inputs.prompt_format.encode(label.x, tokenizer) for label in labels]
        scored = score_answers(
            resident.source(TASK), tokenizer, prompts, [label.answer for label in labels], self._options.filter_batch
        )
        return [
            [label.answer, label.finish, [list(span) for span in found.spans], found.teacher, found.base]
            for label, found in zip(labels, scored, strict=True)
        ]

    def _found(self) -> int:
        if self._options.filter == "excess":
            return sum(item.verdict == "passed" for item in self._screened)
        return sum(score > self._options.cut for score in self._scores.values())

    def _select(self) -> Selection:
        options = self._options
        if options.filter == "excess":
            return select_best(self._screened, self._scores, options.rows)
        return select(self._screened, self._scores, options.rows, threshold=options.cut, on_starved=options.on_starved)


def _first_passed(screened: Sequence[Screened], wanted: int) -> list[Screened]:
    """The candidates up to the one that is the last of the first `wanted` to pass."""
    passed = 0
    for place, item in enumerate(screened):
        passed += item.verdict == "passed"
        if passed == wanted:
            return list(screened[: place + 1])
    return list(screened)


def _discriminator(bench: Bench) -> StoredDiscriminator:
    stored = bench.inputs.discriminator
    if stored is None:
        raise TransferRefused(
            "The adapter has no discriminator.",
            hint="Take the filter excess, tuneshift_kd or none, which need none.",
            errors=[FieldError("/parameters/filter", "adapter has no discriminator")],
        )
    return stored
