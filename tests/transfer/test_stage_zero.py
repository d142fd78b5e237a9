"""Stage 0 beside a training: inputs are invented after the seeds and kept by batches; what is refused early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import order, write_llama
from transfers import SEEDS, Pair, Stopped

from artifacts.errors import RequestInvalid, TransferRefused
from train.base_files import BaseFiles
from train.catalog import parse_parameters
from train.settings import TrainingSettings
from transfer.distillation import Distillation
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.prompts import PromptFormat
from transfer.seeds import folded
from transfer.stage_files import StageFiles
from transfer.stage_zero import StageZero
from transfer.transferable import DiscriminatorSettings

INPUTS = [f"{order(number)[0]} now" for number in range(40)]


class Counting:
    """Follows the inventing, and ends it before batch `until`."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.units = until, 0

    def unit(self, done: int, most: int) -> None:
        assert 0 <= done < most
        if self.units == self.until:
            raise Stopped
        self.units += 1


def stage(base: Path, **changes: object) -> StageZero:
    adapter = TrainingSettings(steps=2, early_stopping={"every_steps": 1})
    settings = DiscriminatorSettings(input_tokens=24, generation_batch=16)
    how = Distillation("lora", settings.options(parse_parameters("dora", {"rank": 2})), settings.loop(adapter), 300, 3)
    recipe = DiscriminatorRecipe(task="orders")
    made = StageZero(BaseFiles("acme/source", str(base)), SEEDS, INPUTS, recipe, settings, how)
    return replace(made, **changes)


def test_what_is_not_given_is_as_the_adapter_has_it(pair: Pair) -> None:
    how = stage(pair.source).how
    assert how.options.model_dump()["rank"] == 2
    assert how.training.early_stopping is None
    assert how.training.steps == 2
    own = DiscriminatorSettings(parameters={"rank": 3}, training=TrainingSettings(steps=5))
    assert own.options(parse_parameters("vera", {})).model_dump()["rank"] == 3
    assert own.loop(how.training).steps == 5


def test_inputs_are_invented_by_batches_that_are_kept(pair: Pair, tmp_path: Path) -> None:
    watcher = Counting()
    whole = stage(pair.source).invent(StageFiles(tmp_path / "whole"), watcher)
    assert len(whole) == len({folded(text) for text in whole}) == 40
    assert not {folded(text) for text in whole} & {folded(text) for text in (*INPUTS, *SEEDS)}
    with pytest.raises(Stopped):
        stage(pair.source).invent(StageFiles(tmp_path / "stopped"), Counting(until=2))
    assert stage(pair.source).invent(StageFiles(tmp_path / "stopped"), Counting()) == whole
    again = stage(tmp_path / "no base")
    assert again.invent(StageFiles(tmp_path / "whole"), Counting(watcher.units)) == whole, "nothing is invented twice"
    few = stage(pair.source, settings=DiscriminatorSettings(input_tokens=24, generation_batch=16, max_candidates=16))
    assert 0 < len(few.invent(StageFiles(tmp_path / "few"), Counting())) <= 16
    some = stage(pair.source, settings=DiscriminatorSettings(input_tokens=24, generation_batch=16, examples=5))
    assert some.invent(StageFiles(tmp_path / "whole"), Counting()) == whole[:5]


def test_what_would_fail_later_is_refused_before(pair: Pair, tmp_path: Path) -> None:
    stage(pair.source).check(PromptFormat(chat=True))
    with pytest.raises(TransferRefused) as few:
        stage(pair.source, inputs=["one", "ONE ", "two"]).check(PromptFormat())
    assert few.value.errors[0].pointer == "/dataset"
    bytes_only = write_llama(tmp_path / "bytes", vocabulary=1)
    with pytest.raises(TransferRefused) as no_token:
        stage(bytes_only).check(PromptFormat())
    assert no_token.value.errors[0].pointer == "/transferable"
    assert "Train without transferable" in str(no_token.value.hint)
    (bytes_only / "chat_template.jinja").unlink()
    with pytest.raises(RequestInvalid) as no_template:
        stage(bytes_only).check(PromptFormat(chat=True))
    assert no_template.value.errors[0].pointer == "/transferable/format/chat"
