"""Whole transfers between two tiny bases of different families and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_adapted, order
from transfers import HOLDOUT, SEEDS, Pair, Stopped, Watcher, adapter_bytes

from artifacts.errors import AttemptCancelled, TransferRefused, TransferStarved
from transfer.generation import InputGenerator
from transfer.methods import trans_lora
from transfer.options import TransLoraOptions


@pytest.fixture(scope="module")
def whole(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Watcher]:
    """An uninterrupted transfer with its controls, and who watched it."""
    watcher = Watcher()
    controls = ("copy", "cross-lora", "seeds-only")
    return pair.run(tmp_path_factory.mktemp("whole"), watcher=watcher, controls=controls), watcher


def test_a_transfer_reports_what_it_did(whole: tuple[Any, Watcher]) -> None:
    result, watcher = whole
    report = result.report
    assert list(dict.fromkeys(stage for stage, _ in watcher.told)) == [
        "generate", "filter", "label", "train", "evaluate", "move",
    ]  # fmt: skip
    found = report["inputs"]
    assert found["kept"] == 16
    assert found["candidates"] == sum(found["screening"].values()) <= 96
    assert 0 < found["acceptance"]["low"] < found["acceptance"]["rate"] <= 1
    assert report["labels"]["kept"] == report["data"]["rows"]
    assert report["labels"]["distinct"] > 3
    assert report["likeness"]["mmd2_kept"] >= 0
    assert report["training"]["steps"] == 6
    assert watcher.steps == [1, 2, 3, 4, 5, 6]  # the control seeds-only trained too, and told nothing of it
    assert report["gate"]["items"] == len(HOLDOUT)
    arms = report["evaluation"]["arms"]
    assert arms["source"]["score"]["rate"] > 0.8
    assert arms["target_base"]["score"]["rate"] == 0
    assert result.gate.verdict in ("fail", "hold")  # six steps teach nothing yet
    assert not arms["copy"]["applicable"]
    assert "32×32 in the source base" in arms["copy"]["reason"] or "×" in arms["copy"]["reason"]
    assert arms["cross-lora"]["score"]["rate"] < 0.5
    assert arms["seeds-only"]["items"] == len(HOLDOUT)
    assert report["discriminator_auc"] == 0.9
    json.dumps(report, allow_nan=False)


def test_the_report_holds_no_text(whole: tuple[Any, Watcher]) -> None:
    result, watcher = whole
    told = json.dumps(result.report) + json.dumps(watcher.told)
    for text in (*SEEDS, *(item.x for item in HOLDOUT), *(order(number)[0] for number in range(72))):
        assert text not in told


def test_the_new_adapter_is_one_that_peft_loads(whole: tuple[Any, Watcher], pair: Pair) -> None:
    result, _ = whole
    model, tokenizer = load_adapted(pair.target, result.adapter)
    ids = torch.tensor([tokenizer("Message: ship 4 mugs\nCode:")["input_ids"]])
    with model.disable_adapter():
        before = model(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, before)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/target"
    assert all(path.endswith(("q_proj", "v_proj")) for path in config["target_modules"])


def test_a_transfer_that_is_cut_before_every_unit_ends_the_same(
    whole: tuple[Any, Watcher], pair: Pair, tmp_path: Path
) -> None:
    """One new unit at a time, each in what could be another process, and the training in three parts."""
    result, _ = whole
    cuts = trained = 0
    for _ in range(60):
        watcher = Watcher(units=1, train_steps=3 if trained < 2 else None)
        try:
            found = pair.run(tmp_path / "cut", watcher=watcher)
        except Stopped:
            cuts += 1
        except AttemptCancelled:
            trained += 1
        else:
            break
    assert cuts > 6
    assert trained > 0
    assert adapter_bytes(found) == adapter_bytes(result)
    assert found.report["data"] == result.report["data"]
    assert found.gate == result.gate


def test_the_training_data_is_not_there_to_be_read(whole: tuple[Any, Watcher], pair: Pair, tmp_path: Path) -> None:
    """The teacher's dataset is gone, and then is garbage."""
    data = pair.teacher.parent / "rows.jsonl"
    kept = data.read_bytes()
    try:
        data.unlink()
        gone = pair.run(tmp_path / "gone")
        data.write_bytes(b"garbage\n" * 50)
        garbage = pair.run(tmp_path / "garbage")
    finally:
        data.write_bytes(kept)
    assert adapter_bytes(gone) == adapter_bytes(garbage) == adapter_bytes(whole[0])


def test_a_damaged_output_is_made_again(pair: Pair, tmp_path: Path) -> None:
    first = pair.run(tmp_path / "damaged", "seeds-only")
    before = adapter_bytes(first)
    for path in (tmp_path / "damaged" / "stages" / "objects").iterdir():
        path.write_bytes(b"damaged")
    again = pair.run(tmp_path / "damaged", "seeds-only")
    assert adapter_bytes(again) == before


@pytest.mark.parametrize("kind", ["excess", "tuneshift_kd", "none"])
def test_the_filters_without_a_discriminator(pair: Pair, tmp_path: Path, kind: str) -> None:
    found = pair.run(tmp_path, filter=kind, changes={"discriminator": None}, on_starved="top_n")
    assert found.report["inputs"]["filter"] == kind
    assert found.report["inputs"]["kept"] == 16
    assert found.report["training"]["steps"] == 6
    with pytest.raises(TransferRefused, match="no discriminator"):
        pair.run(tmp_path / "other", changes={"discriminator": None})


def test_accepted_inputs_become_seeds_of_the_next_batches(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and ended before its third batch and gone on with, as another process would."""
    shown: list[tuple[str, ...]] = []

    class Recorded(InputGenerator):
        def __init__(self, model: Any, tokenizer: Any, seeds: Any, settings: Any) -> None:
            shown.append(tuple(seeds))
            super().__init__(model, tokenizer, seeds, settings)

    monkeypatch.setattr(trans_lora, "InputGenerator", Recorded)
    growing: dict[str, Any] = {"grow_seeds": True, "generation_batch": 4, "threshold": -1e6, "changes": {"holdout": ()}}
    whole = pair.run(tmp_path / "whole", **growing)
    first, *later = list(shown)
    assert first == SEEDS
    assert len(later) >= 3
    assert all(len(seeds) == len(SEEDS) for seeds in later)
    invented = {text for seeds in later for text in seeds} - set(SEEDS)
    assert len(invented) > 3
    units = (tmp_path / "whole" / "stages" / "objects").iterdir()
    kept = b"".join(path.read_bytes() for path in units).decode("latin1")
    assert all(text in kept for text in invented)
    with pytest.raises(Stopped):
        pair.run(tmp_path / "cut", watcher=Watcher(units=4), **growing)
    assert adapter_bytes(pair.run(tmp_path / "cut", **growing)) == adapter_bytes(whole)


def test_seeds_grow_by_default_for_the_filter_whose_paper_says_so() -> None:
    assert TransLoraOptions(filter="tuneshift_kd").growing
    assert not TransLoraOptions(filter="tuneshift_kd", grow_seeds=False).growing
    assert not TransLoraOptions().growing
    assert TransLoraOptions(grow_seeds=True).growing


def test_a_starved_transfer_fails_or_is_marked(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(TransferStarved, match="16 are wanted"):
        pair.run(tmp_path / "fails", threshold=1e6, max_candidates=48)
    watcher = Watcher()
    found = pair.run(tmp_path / "marked", threshold=1e6, max_candidates=48, on_starved="top_n", watcher=watcher)
    assert found.report["degraded"]
    assert found.report["inputs"]["candidates"] == 48
    assert found.report["inputs"]["accepted"] == 0
    assert sum(stage == "generate" for stage, _ in watcher.told) == 3


def test_without_a_holdout_fidelity_is_measured(pair: Pair, tmp_path: Path) -> None:
    found = pair.run(tmp_path / "some", changes={"holdout": ()}, held_out=6)
    assert found.report["fidelity_only"]
    assert found.report["evaluation"]["arms"]["source"]["score"]["rate"] == 1.0
    assert found.report["data"]["rows"] == found.report["labels"]["kept"] - 6
    assert found.gate is not None
    assert found.gate.verdict == "hold"  # six items decide nothing
    nothing = pair.run(tmp_path / "none", changes={"holdout": ()})
    assert nothing.gate is None
    assert not nothing.report["fidelity_only"]


def test_refresh_learns_from_inputs_that_were_kept(pair: Pair, tmp_path: Path) -> None:
    kept = tuple(order(number)[0] for number in range(40))
    found = pair.run(
        tmp_path, "refresh", changes={"inputs": (*kept, kept[0]), "seeds": ()},
        training={"steps": 60, "learning_rate": 0.02, "batch_size": 8},
        target_parameters={"rank": 8, "target_modules": "all-linear"},
    )  # fmt: skip
    assert found.report["inputs"] == {"inputs": 41, "used": 40}
    arms = found.report["evaluation"]["arms"]
    assert arms["transferred"]["score"]["rate"] > arms["target_base"]["score"]["rate"] + 0.5
    with pytest.raises(TransferRefused, match="No input was given"):
        pair.run(tmp_path / "empty", "refresh")


def test_the_new_adapter_is_of_the_kind_that_is_asked_for(pair: Pair, tmp_path: Path) -> None:
    found = pair.run(tmp_path, "seeds-only", target_method="dora", changes={"holdout": ()})
    assert found.report["training"]["method"] == "dora"
    assert json.loads((found.adapter / "adapter_config.json").read_text())["use_dora"]


def test_what_is_needed_is_asked_for(pair: Pair, tmp_path: Path) -> None:
    for method in ("trans-lora", "seeds-only"):
        with pytest.raises(TransferRefused, match="no seeds") as refused:
            pair.run(tmp_path / method, method, changes={"seeds": ()})
        assert refused.value.errors[0].pointer == "/seeds"


def test_weights_alone_are_moved_and_measured(pair: Pair, tmp_path: Path) -> None:
    found = pair.run(tmp_path, "cross-lora", basis_rank=8)
    assert found.report["weights"]["moved_modules"] > 0
    assert found.report["evaluation"]["arms"]["transferred"]["score"]["rate"] < 0.5
    assert found.gate is not None
    assert found.gate.verdict == "fail"
