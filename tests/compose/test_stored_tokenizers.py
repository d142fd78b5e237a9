"""Prompts that are too long are found without loading a pipeline: by the same tokens, of the same texts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_state import short_request
from transformers import CLIPTokenizer

from artifacts.errors import ComposeRefused
from compose.catalog import METHODS
from compose.engine import compose
from compose.fused_adapter import fuse
from compose.prompts import prompt_ids
from compose.request import Style
from compose.stored_tokenizers import check_lengths, stored_tokenizers
from compose.validation import validate
from examples.shapes_sd.concepts import BASE

PIECES = ["a", "and", "sks", "circle", "SQUARE", "red,", "."]
OWN: dict[str, dict[str, Any]] = {
    "clora": {"branch_prompts": ["a circle and a square", "a sks circle and a square", "a circle and a zwx square"]},
    "clora_mask_only": {"branch_negative_prompts": ["a", "and", "square"], "base_branch": False},
    "omg": {"region_prompts": ["a sks circle", "a zwx square"]},
    "lora_composer": {"region_prompts": ["a sks circle", "a zwx square"]},
    "ziplora": {"style_prompt": "a square"},
    "gradient_fusion": {"concept_prompts": ["a sks circle", "a zwx square"]},
}


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_tokens_are_those_of_the_loaded_pipeline(text: str) -> None:
    (stored,) = stored_tokenizers(BASE)
    loaded = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    for special in (True, False):
        assert stored(text, add_special_tokens=special).input_ids == list(
            loaded(text, add_special_tokens=special, truncation=False, verbose=False).input_ids
        )
    assert stored.model_max_length == loaded.model_max_length


@pytest.mark.parametrize(("method", "own"), [*((name, False) for name in METHODS), *((name, True) for name in OWN)])
def test_the_texts_are_those_that_are_encoded(
    sd: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, method: str, own: bool
) -> None:
    request = replace(short_request(sd, method), negative_prompt="a sks")
    if method == "ziplora":
        request = replace(request, concepts=request.concepts[:1], styles=(Style(sd.second, "second"),))
        request = replace(request, parameters={"samples": 1, "train_steps": 1})
    if method == "gradient_fusion":
        request = replace(request, parameters={"samples": 1})
    short = {"latent_update": False, "max_iter_to_alter": None, "iterative_steps": None}
    kept = {key: value for key, value in request.parameters.items() if key not in short}
    request = replace(request, parameters={**kept, **(OWN[method] if own else {})})
    seen = set()

    def noted(tokenizer: Any, text: str, pointer: str, limit: int | None = None) -> list[int]:
        seen.add((text, pointer))
        return prompt_ids(tokenizer, text, pointer, limit)

    monkeypatch.setattr("compose.scene.prompt_ids", noted)
    monkeypatch.setattr("compose.prompts.prompt_ids", noted)
    yields = METHODS[method].capabilities.yields
    if yields == "image":
        compose(request, pipelines)
    else:
        fuse(request, pipelines, tmp_path / "fused")
    validated = validate(request, yields)
    assert set(validated.options.told(request, validated.prompts)) == seen


def test_what_would_be_cut_off_is_named(toys: Any) -> None:
    fine = [("a circle", "/prompt"), ("", "/negative_prompt")]
    check_lengths(toys.base, fine)
    with pytest.raises(ComposeRefused, match="the text encoder takes") as refused:
        check_lengths(toys.base, [*fine, ("a circle and " * 30, "/parameters/branch_prompts/1")])
    assert [item.pointer for item in refused.value.errors] == ["/parameters/branch_prompts/1"]


def test_what_is_not_there_is_left_to_the_worker(tmp_path: Any) -> None:
    (tmp_path / "tokenizer").mkdir()
    check_lengths(tmp_path, [("a " * 1000, "/prompt")])


def test_no_torch_is_needed() -> None:
    code = "import sys, compose.stored_tokenizers; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
