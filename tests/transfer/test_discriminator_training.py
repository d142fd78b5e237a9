"""Stage 0: what the discriminator learns, from inputs alone, and what is measured of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import order
from transfers import Pair

from artifacts.errors import TransferRefused
from train.base_files import BaseFiles
from train.catalog import parse_parameters
from train.follower import Silent
from train.settings import CausalLmTask, TrainingSettings
from train.tasks.protocol import TaskContext
from train.tasks.rows import IGNORED
from transfer.discriminator_training import AnswerToken, DiscriminatorReport, LabelledInputs, train_discriminator
from transfer.distillation import Distillation
from transfer.filters.discriminator import DiscriminatorRecipe

RECIPE = DiscriminatorRecipe(task="orders")
REAL = [order(number)[0] for number in range(60)]
INVENTED = [f"{text[5:]} {text[:4]}" for text in REAL]


def test_inputs_are_balanced_and_some_are_held_out() -> None:
    found = LabelledInputs.of([*REAL, REAL[0].upper()], [*INVENTED[:40], REAL[3], "  "])
    assert len(found.real) == len(found.invented) == 32
    assert len(found.held_out_real) == len(found.held_out_invented) == 8
    everything = [*found.real, *found.invented, *found.held_out_real, *found.held_out_invented]
    assert len(set(everything)) == len(everything)
    assert REAL[3] not in (*found.invented, *found.held_out_invented)
    assert LabelledInputs.of(list(reversed(REAL)), list(reversed(INVENTED[:40]))) == LabelledInputs.of(
        REAL, INVENTED[:40]
    )
    assert found.rows().count(b'"real": true') == found.rows().count(b'"real": false') == 32


@pytest.mark.parametrize(("real", "invented"), [(REAL, INVENTED[:2]), (REAL[:1], INVENTED), (REAL, REAL)])
def test_too_few_inputs_are_refused(real: list[str], invented: list[str]) -> None:
    with pytest.raises(TransferRefused, match="can not be trained on"):
        LabelledInputs.of(real, invented)


def test_the_loss_counts_the_answer_alone(pair: Pair, tmp_path: Path) -> None:
    context = TaskContext(BaseFiles("acme/source", str(pair.source)), TrainingSettings(), "cpu", 0, tmp_path)
    task = AnswerToken(CausalLmTask(), context, RECIPE)
    yes, no = RECIPE.answer_ids(task.tokenizer)
    for real, wanted in ((True, yes), (False, no)):
        example = task.encode({"x": "ship 4 mugs", "real": real}, None)
        assert example.labels[:-1].tolist() == [IGNORED] * (len(example.ids) - 1)
        assert example.labels[-1] == example.ids[-1] == wanted
        assert example.ids[:-1].tolist() == RECIPE.encode("ship 4 mugs", task.tokenizer)


def train(pair: Pair, folder: Path, inputs: LabelledInputs, steps: int) -> DiscriminatorReport:
    folder.mkdir()
    settings = TrainingSettings(steps=steps, learning_rate=0.01, batch_size=8)
    how = Distillation("lora", parse_parameters("lora", {"rank": 8}), settings, 300, seed=0)
    base = BaseFiles("acme/source", str(pair.source))
    report = train_discriminator(inputs, RECIPE, how, base, folder, folder / "adapter", Silent())
    assert not (folder / "rows.jsonl").exists()
    return report


def test_it_tells_inputs_apart_unless_its_labels_are_shuffled(pair: Pair, tmp_path: Path) -> None:
    found = train(pair, tmp_path / "right", LabelledInputs.of(REAL, INVENTED), 120)
    assert found.auc >= 0.95
    assert found.accepted >= 0.9
    assert found.rejected >= 0.9
    assert found.trained == 48
    assert found.held_out == 12
    mixed: list[Any] = [*REAL, *INVENTED]
    random.Random(0).shuffle(mixed)
    shuffled = train(pair, tmp_path / "shuffled", LabelledInputs.of(mixed[:60], mixed[60:]), 40)
    assert abs(shuffled.auc - 0.5) < 0.3
    assert shuffled.auc < found.auc
