from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from examples.smollm2 import score as scoring
from examples.smollm2.batches import load_model
from examples.smollm2.score import answers, as_document, as_text, main, parse_answer, score_adapters
from examples.smollm2.tasks import TASKS, make_items
from examples.smollm2.train import RECIPES, train

SHORT = dataclasses.replace(RECIPES["orders"], steps=4, batch=4, learning_rate=5e-3)
ITEMS = 6


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, task in (("first", "orders"), ("second", "dates")):
        train(dataclasses.replace(SHORT, task=task), tiny_base, folder / name)
    return {name: folder / name for name in ("first", "second")}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 2019-03-07", "2019-03-07"),
        ("\n\n 00342 \nAmount: two", "00342"),
        (" a | b | 3\n", "a | b | 3"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_answer_is_the_first_line_that_is_not_blank(text: str, answer: str) -> None:
    assert parse_answer(text) == answer


def test_answers_do_not_depend_on_what_shares_the_batch(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(tiny_base)
    task = TASKS["orders"]
    items = make_items(task, "held_out", ITEMS)
    together = answers(model, tokenizer, task, items)
    monkeypatch.setattr(scoring, "_BATCH", 1)
    assert answers(model, tokenizer, task, items) == together
    assert len(together) == ITEMS


def test_exact_match_counts_equal_answers_only(
    tiny_base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_right(_model: object, _tokenizer: object, _task: object, items: list) -> list[str]:
        return [item.completion.strip() if n < 2 else item.completion.strip() + " 1" for n, item in enumerate(items)]

    monkeypatch.setattr(scoring, "answers", two_right)
    table = score_adapters(adapters, ["orders"], items=ITEMS, base=tiny_base)
    assert {name: row["orders"].correct for name, row in table.items()} == {"base": 2, "first": 2, "second": 2}
    assert table["base"]["orders"].exact_match == pytest.approx(2 / ITEMS)


def test_an_adapter_scores_the_same_whatever_was_scored_before_it(tiny_base: Path, adapters: dict[str, Path]) -> None:
    both = score_adapters(adapters, ["orders", "dates"], items=ITEMS, base=tiny_base)
    alone = score_adapters({"second": adapters["second"]}, ["orders", "dates"], items=ITEMS, base=tiny_base)
    assert alone["second"] == both["second"]
    assert alone["base"] == both["base"]
    assert both["first"]["orders"].loss != both["second"]["orders"].loss != both["base"]["orders"].loss


def test_unknown_tasks_and_the_name_of_the_base_are_refused(tiny_base: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"unknown tasks.*'chess'"):
        score_adapters(adapters, ["chess"], items=ITEMS, base=tiny_base)
    with pytest.raises(ValueError, match="may not be called"):
        score_adapters({"base": adapters["first"]}, ["dates"], items=ITEMS, base=tiny_base)


def test_the_command_scores_adapters_sums_and_averages(
    tiny_base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    command = ["--adapter", f"a={adapters['first']}", "--adapter", f"b={adapters['second']}", "--base", str(tiny_base)]
    command += ["--sum", "both=a,b", "--sum", "none=a,b,0", "--average", "mean=a,b", "--tasks", "orders", "dates"]
    main([*command, "--items", str(ITEMS), "--json", str(out)])
    document = json.loads(out.read_text())
    assert list(document) == ["base", "a", "b", "both", "none", "mean"]
    assert document["none"] == document["base"]
    assert document["both"] != document["mean"] != document["base"]
    for row in document.values():
        assert row["loss_sum"] == pytest.approx(sum(task["loss"] for task in row["tasks"].values()))
        assert {task["items"] for task in row["tasks"].values()} == {ITEMS}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == list(document)


def test_text_and_document_agree(tiny_base: Path) -> None:
    table = score_adapters({}, ["numbers"], items=2, base=tiny_base)
    document = as_document(table)
    assert as_text(table).splitlines()[1].split()[-1] == f"{document['base']['loss_sum']:.4f}"


def test_a_name_without_a_value_ends_the_command() -> None:
    with pytest.raises(SystemExit, match="expected NAME=VALUE, got 'nameless'"):
        main(["--adapter", "nameless"])
