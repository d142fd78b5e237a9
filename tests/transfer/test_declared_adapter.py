"""Adapters of Rankwise's own types, as source and as target of a transfer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import load, order
from transfers import FORM, Pair, learn

from artifacts.errors import TransferRefused
from train import declared
from train.base_files import BaseFiles
from transfer.decoding import last_logits
from transfer.source_model import load_adapted

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [30, 31, 32]]
SMORA = {"rank": 6, "active_rank": 2}


@pytest.fixture(scope="module")
def learnt(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of SMoRA that a few steps have moved."""
    rows = [dict(FORM.row(*order(number))) for number in range(8)]
    return learn(llama, rows, tmp_path_factory.mktemp("smora"), 2, ("smora", SMORA))


def test_the_adapter_is_on_the_model_and_the_model_without_it_is_the_base(llama: Path, learnt: Path) -> None:
    model = load_adapted(BaseFiles("acme/base", str(llama)), {"task": learnt})
    with torch.no_grad():
        found = last_logits(model, PROMPTS, 0)
        for row, prompt in zip(found, PROMPTS, strict=True):
            wanted = declared.load(load(llama)[0], learnt)(input_ids=torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            plain = last_logits(model, PROMPTS, 0)
        assert torch.equal(plain, last_logits(load(llama)[0], PROMPTS, 0))
        assert torch.equal(last_logits(model, PROMPTS, 0), found)
    assert float((plain - found).abs().max()) > 1e-3


def test_a_type_that_changes_its_base_and_a_folder_of_another_base_are_refused(
    llama: Path, learnt: Path, tmp_path: Path
) -> None:
    files = BaseFiles("acme/base", str(llama))
    config = json.loads((learnt / "adapter_config.json").read_text())
    weights = (learnt / "adapter_model.safetensors").read_bytes()
    norms = {path: 2 * norm for path, norm in config["base_weight_norms"].items()}
    for name, changes, words in (
        ("loftq", {"peft_type": "RANKWISE_LOFTQ"}, "changes the weights of its base"),
        ("other", {"base_weight_norms": norms}, "not for this model"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        (folder / "adapter_model.safetensors").write_bytes(weights)
        with pytest.raises(TransferRefused, match=words):
            load_adapted(files, {"task": folder})


@pytest.mark.slow
def test_a_transfer_to_smora_and_back_again(pair: Pair, tmp_path: Path) -> None:
    """The new adapter is measured; an old one is read beside a discriminator that is a LoRA."""
    found = pair.run(tmp_path / "to", "seeds-only", target_method="smora", target_parameters=SMORA)
    assert found.report["training"]["method"] == "smora"
    assert found.report["evaluation"]["arms"]["transferred"]["items"] == 24
    assert declared.is_declared(found.adapter)

    rows = [dict(FORM.row(*order(number))) for number in range(45)]
    source = learn(pair.source, rows, tmp_path / "source", 10, ("smora", SMORA))
    back = pair.run(
        tmp_path / "back",
        changes={"adapter": source},
        threshold=-1e6,
        controls=("copy",),
        answer_stop="\n",
        answer_tokens=24,
    )
    assert back.report["labels"]["labelled"] == 16
    assert "RANKWISE_SMORA" in back.report["evaluation"]["arms"]["copy"]["reason"]
