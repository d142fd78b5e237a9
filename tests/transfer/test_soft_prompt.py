"""Adapters of prompt tuning, as source and as target: read as PEFT reads them, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_models import load
from transfers import Pair

from artifacts.errors import TransferRefused
from train.base_files import BaseFiles
from train.quiet import peft_deprecations_ignored
from transfer.decoding import Limits, answers, last_logits
from transfer.source_model import load_adapted

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [30, 31, 32]]
TUNED = {"virtual_tokens": 5}


def write_soft_prompt(base: Path, directory: Path) -> Path:
    """Random vectors before the input of `base`."""
    model, _ = load(base)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with torch.random.fork_rng(), peft_deprecations_ignored():
        torch.manual_seed(0)
        get_peft_model(model, config).save_pretrained(directory)
    return directory


@pytest.fixture(params=["llama", "gemma"])
def soft(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    base: Path = request.getfixturevalue(request.param)
    return base, write_soft_prompt(base, tmp_path / "soft")


def of_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    with peft_deprecations_ignored():
        return PeftModel.from_pretrained(load(base)[0], str(adapter)).eval()


def test_logits_are_pefts_and_no_row_changes_another(soft: tuple[Path, Path]) -> None:
    base, adapter = soft
    model = load_adapted(BaseFiles("acme/base", str(base)), {"task": adapter})
    with torch.no_grad():
        found = last_logits(model, PROMPTS, 0)
        for row, prompt in zip(found, PROMPTS, strict=True):
            ids = torch.tensor([prompt])
            wanted = of_peft(base, adapter)(input_ids=ids).logits[0, -1]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            plain = last_logits(model, PROMPTS, 0)
        torch.testing.assert_close(plain, last_logits(load(base)[0], PROMPTS, 0), rtol=1e-4, atol=1e-4)
    assert float((plain - found).abs().max()) > 0.1


def test_answers_of_a_padded_batch_are_those_of_its_rows_alone(soft: tuple[Path, Path]) -> None:
    """Against PEFT without a cache: every token from the whole row anew."""
    base, adapter = soft
    model = load_adapted(BaseFiles("acme/base", str(base)), {"task": adapter})
    tokenizer = load(base)[1]
    limits = Limits(6, frozenset(), None, len(tokenizer))
    found = answers(model, tokenizer, PROMPTS, limits, 3)
    stock = of_peft(base, adapter)
    for item, prompt in zip(found, PROMPTS, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([ids])).logits[0, -1, : len(tokenizer)]
            ids.append(int(logits.argmax()))
        assert item.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_types_that_can_not_be_read_are_refused_by_name(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = BaseFiles("acme/base", str(llama))
    soft = write_soft_prompt(llama, tmp_path / "soft")
    with pytest.raises(TransferRefused, match="PROMPT_TUNING, which a transfer does not read beside another"):
        load_adapted(base, {"task": soft, "discriminator": llama_adapter})
    config = soft / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(TransferRefused, match="of PEFT type PREFIX_TUNING"):
        load_adapted(base, {"task": soft})


def test_a_transfer_to_prompt_tuning_and_back_again(pair: Pair, tmp_path: Path) -> None:
    """The new adapter is measured; an old one is read beside a discriminator that is a LoRA."""
    training = {"steps": 6, "learning_rate": 0.1, "batch_size": 4}
    found = pair.run(
        tmp_path / "to", "seeds-only", target_method="prompt-tuning", target_parameters=TUNED, training=training
    )
    assert found.report["training"]["method"] == "prompt-tuning"
    assert found.report["training"]["trainable_parameters"] == 5 * 40
    assert found.report["training"]["target_modules"] == 0
    assert found.report["training"]["reload"]["effect"] > 1e-3
    assert found.report["evaluation"]["arms"]["transferred"]["items"] == 24
    assert json.loads((found.adapter / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"

    soft = write_soft_prompt(pair.source, tmp_path / "soft")
    back = pair.run(
        tmp_path / "back",
        changes={"adapter": soft},
        threshold=-1e6,
        controls=("copy",),
        answer_stop="\n",
        answer_tokens=24,
    )
    assert back.report["inputs"]["scored"] > 0
    assert back.report["labels"]["labelled"] == 16
    assert "PROMPT_TUNING" in back.report["evaluation"]["arms"]["copy"]["reason"]
