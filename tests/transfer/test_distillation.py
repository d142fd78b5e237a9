"""Labels, the new adapter's training, and exams: what is learnt, from where, and in whose tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import load, load_adapted, write_adapter
from torch.nn import functional

from artifacts.errors import TransferRefused
from train.base_files import BaseFiles
from train.catalog import find_method, parse_parameters
from train.engine import linear_layers
from train.protocol import MethodContext
from train.settings import CausalLmTask, TrainingSettings
from train.tasks.causal_rows import encode_row
from train.tasks.protocol import TaskContext
from train.tasks.rows import IGNORED
from transfer.candidates import Screened
from transfer.decoding import Limits
from transfer.distillation import Distillation, distil, layers_of
from transfer.evaluation import Exam, Item, mean_states
from transfer.filters.excess import score_answers
from transfer.labelling import Label, Labeller, is_readable, synthetic_set
from transfer.prompts import PromptFormat
from transfer.selected_tokens import ALWAYS, SPANS, SelectedTokens, token_scores
from transfer.synthetic import SyntheticRow, SyntheticSet
from transfer.target_layers import query_and_value

FORM = PromptFormat(template="Message: {x}\nCode:")
INPUTS = [Screened(index, f"ship {index} {'mugs ' * (index % 4)}", "passed") for index in range(1, 9)]


class Follower:
    """Follows a training and keeps its losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def stop_wanted(self) -> bool:
        return False

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self.losses.append(values["loss"])

    def checkpoint(self, folder: Path, step: int) -> bool:
        return False

    def progress(self, fraction: float, message: str) -> None:
        pass


def labels(model: Any, tokenizer: Any, *, stop: str | None = None, size: int = 3, tokens: int = 8) -> list[Label]:
    labeller = Labeller(model, tokenizer, FORM, max_new_tokens=tokens, stop=stop, batch_size=size)
    return labeller.label_all(INPUTS)


def test_the_teacher_transferred_to_itself_gives_every_label(llama: Path, llama_adapter: Path) -> None:
    model, tokenizer = load_adapted(llama, llama_adapter)
    made = [label for label in labels(model, tokenizer) if is_readable(label.answer, tokenizer)]
    assert [label.index for label in made] == sorted(label.index for label in made)
    assert len({label.answer for label in made}) > 3
    items = tuple(Item(label.x, label.answer) for label in made)
    exam = Exam(items, FORM, max_new_tokens=8, stop=None, batch_size=3)
    again, _ = load_adapted(llama, llama_adapter)
    assert exam.take(again, tokenizer).score == 1.0
    plain, _ = load(llama)
    assert exam.take(plain, tokenizer).score < 0.5
    right = [teacher_forced(again, tokenizer, label) for label in made]
    assert False not in right
    assert right.count(True) > 2


def teacher_forced(model: Any, tokenizer: Any, label: Label) -> bool | None:
    """Whether every token of the label is the most likely one; None if its text is not cut as it was written."""
    prompt = FORM.encode(label.x, tokenizer)
    written = list(prompt)
    for _ in range(8):
        written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
    said = tokenizer(label.answer, add_special_tokens=False)["input_ids"]
    if said != written[len(prompt) :]:
        return None
    logits = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return bool((logits.argmax(-1) == torch.tensor(said)).all())


def test_answers_that_teach_nothing_are_left_out(gemma: Path) -> None:
    _, tokenizer = load(gemma)
    found, report = synthetic_set(
        [
            Label(4, "d", " fine", "end"),
            Label(0, "a", "never ends", "length"),
            Label(1, "b", "  ", "end"),
            Label(2, "c", " Z\u00fcrich", "stop"),
            Label(3, "e", "<end> odd", "end"),
        ],
        tokenizer,
    )
    assert [row.index for row in found.rows] == [2, 4]
    assert (report.labelled, report.endless, report.empty, report.unreadable, report.kept) == (5, 1, 1, 1, 2)
    assert report.end_rate == 0.8
    with pytest.raises(TransferRefused, match="1 did not end"):
        synthetic_set([Label(0, "a", "never ends", "length")], tokenizer)


def test_only_text_goes_from_one_tokenizer_to_another(llama: Path, gemma: Path, llama_adapter: Path) -> None:
    """The source has more tokens than the target: no id of it may arrive there."""
    source, source_tokenizer = load_adapted(llama, llama_adapter)
    target, target_tokenizer = load(gemma)
    assert len(source_tokenizer) > target.config.vocab_size
    made = labels(source, source_tokenizer, stop=" ")
    data, _ = synthetic_set([Label(label.index, label.x, label.answer, "end") for label in made], target_tokenizer)
    assert all(set(json.loads(line)) == {"i", "x", "y"} for line in data.to_bytes().splitlines())
    assert all(isinstance(json.loads(line)["y"], str) for line in data.to_bytes().splitlines())
    for row in data.rows:
        example = encode_row(FORM.row(row.x, row.answer), target_tokenizer, CausalLmTask())
        assert int(example.ids.max()) < len(target_tokenizer)
        said = target_tokenizer.decode(example.ids[example.answer_start :], skip_special_tokens=True)
        assert said == row.answer
        assert is_readable(row.answer, target_tokenizer)


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_counts_the_answer_and_one_end(llama: Path, chat: bool) -> None:
    model, tokenizer = load(llama)
    form = PromptFormat(chat=chat) if chat else FORM
    row = form.row("ship 4 mugs", " Lima | 4")
    example = encode_row(row, tokenizer, CausalLmTask())
    prompt = form.encode("ship 4 mugs", tokenizer)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert (example.labels[: len(prompt)] == IGNORED).all()
    assert (example.labels == tokenizer.eos_token_id).sum() == 1
    ids, marks = torch.from_numpy(example.ids.astype(np.int64))[None], torch.from_numpy(example.labels.astype(np.int64))
    logits = model(input_ids=ids).logits[0, :-1]
    full = functional.cross_entropy(logits, marks[1:], ignore_index=IGNORED)
    kept = marks[1:] != IGNORED
    gathered = functional.cross_entropy(logits[kept], marks[1:][kept])
    assert float(model(input_ids=ids, labels=marks[None]).loss) == pytest.approx(float(full), abs=1e-5)
    assert float(gathered) == pytest.approx(float(full), abs=1e-5)
    # labels of the prompt change nothing: they are not there
    other = marks.clone()
    other[1 : len(prompt)] = IGNORED
    assert torch.equal(other, marks)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_new_adapter_begins_as_the_base(gemma: Path, method: str) -> None:
    files = BaseFiles("acme/tiny", str(gemma))
    model, tokenizer = load(gemma)
    ids = torch.tensor([tokenizer("Message: 4 mugs\nCode:")["input_ids"]])
    before = model(input_ids=ids).logits
    names = query_and_value(layers_of(files))
    assert names == ("q_proj", "v_proj")
    targets = sorted(path for path in linear_layers(model) if path.rpartition(".")[2] in names)
    made = find_method(method).load(parse_parameters(method, {"rank": 4}))
    context = MethodContext(targets, 1, lambda: iter(()), TrainingSettings())
    adapted = made.prepare(model, context).eval()
    assert torch.equal(adapted(input_ids=ids).logits, before)


def test_layers_without_a_known_name_are_asked_for() -> None:
    assert query_and_value({"h.0.attn.c_attn": (9, 3)}) == ("c_attn",)
    with pytest.raises(TransferRefused, match="no name that is known"):
        query_and_value({"h.0.mystery": (3, 3)})


def train(
    gemma: Path, folder: Path, rows: Sequence[SyntheticRow], *, share: float | None = None, spans: Any = None
) -> tuple[Path, list[float]]:
    """A short training of the tiny Gemma; the adapter and the losses."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    lines = SyntheticSet(tuple(rows)).training_rows(FORM).decode().splitlines()
    if spans is not None:
        lines = [json.dumps({**json.loads(line), SPANS: item}) for line, item in zip(lines, spans, strict=True)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = parse_parameters("lora", {"rank": 4, "target_modules": ["q_proj", "v_proj"]})
    settings = TrainingSettings(steps=12, learning_rate=0.01, batch_size=4)
    how = Distillation("lora", options, settings, 200, seed=5, token_share=share)
    (folder / "work").mkdir()
    follower = Follower()
    report = distil(how, BaseFiles("acme/tiny", str(gemma)), data, folder / "work", folder / "adapter", follower)
    assert report.final_loss == follower.losses[-1]
    return folder / "adapter", follower.losses


ROWS = [SyntheticRow(index, f"{index} mugs", f" code {index % 2}") for index in range(8)]


def test_distillation_learns_the_labels_and_repeats_itself(gemma: Path, tmp_path: Path) -> None:
    first, losses = train(gemma, tmp_path / "a", ROWS)
    second, again = train(gemma, tmp_path / "b", ROWS)
    assert losses == again
    assert losses[-1] < losses[0] - 0.5
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()


def test_only_the_best_tokens_of_a_batch_are_learnt(gemma: Path, tmp_path: Path) -> None:
    """Of the answer " code n" only the digit has a high score: the rest of it is not learnt."""
    spans = [[[0, 5, 0.0], [5, 6, 0.0], [6, 7, 2.0]] for _ in ROWS]
    files = BaseFiles("acme/tiny", str(gemma))
    settings = TrainingSettings(batch_size=4)
    task = SelectedTokens(CausalLmTask(), TaskContext(files, settings, "cpu", 0, tmp_path), share=1 / 7)
    rows = [{**FORM.row(row.x, row.answer), SPANS: item} for row, item in zip(ROWS, spans, strict=True)]
    batch = task.collate([task.encode(row, None) for row in rows[:4]])
    learnt = [[int(token) for token in row if token != IGNORED] for row in batch["labels"]]
    assert learnt == [[task.tokenizer(str(index % 2))["input_ids"][0], 0] for index in range(4)]
    whole = task.collate([task.encode({**row, SPANS: None}, None) for row in rows[:4]])
    assert int((whole["labels"] != IGNORED).sum()) == 4 * 8
    trained, _ = train(gemma, tmp_path / "c", ROWS, share=1 / 7, spans=spans)
    plain, _ = train(gemma, tmp_path / "d", ROWS)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (trained, plain))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("chat", [False, True])
def test_scores_reach_the_target_in_its_own_tokens(llama: Path, gemma: Path, llama_adapter: Path, chat: bool) -> None:
    source, source_tokenizer = load_adapted(llama, llama_adapter)
    _, target_tokenizer = load(gemma)
    form = PromptFormat(chat=chat) if chat else FORM
    answer = " Please ship Z\u00fcrich"
    (scored,) = score_answers(source, source_tokenizer, [form.encode("x", source_tokenizer)], [answer], 1)
    row = {**form.row("x", answer), SPANS: [list(span) for span in scored.spans]}
    example = encode_row(row, target_tokenizer, CausalLmTask())
    found = token_scores(row, example, target_tokenizer)
    assert len(found) == int((example.labels != IGNORED).sum())
    size = len(answer.encode())
    assert all(score == ALWAYS for score in found[size:])
    assert found[size:]
    offsets = target_tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == size
    for (start, end), score in zip(offsets, found[:size], strict=True):
        inside = [span.score for span in scored.spans if span.start <= start and end <= span.end]
        assert min(inside) - 1e-9 <= score <= max(inside) + 1e-9


def test_mean_states_do_not_depend_on_the_batch(llama: Path) -> None:
    model, tokenizer = load(llama)
    texts = ["a", "ship 4 mugs to Anna", "not not True"]
    found = mean_states(model, tokenizer, texts, 3)
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(row, states.detach().double().mean(0).numpy(), atol=1e-5)


def test_an_exam_counts_answers_that_end(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(llama, tmp_path / "other", seed=3)
    model, tokenizer = load_adapted(llama, adapter)
    exam = Exam((Item("a", "?"), Item("b", "?")), FORM, max_new_tokens=5, stop=None, batch_size=2)
    score = exam.take(model, tokenizer)
    limits = Limits.of(model, tokenizer, 5, None)
    assert limits.ends == {tokenizer.eos_token_id}
    assert score.score == 0
    assert 0 <= score.ended <= 2
    assert score.distinct in (1, 2)
