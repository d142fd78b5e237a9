"""Words that are encoded together are the same as encoded one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from artifacts.errors import ComposeRefused
from compose.engine import compose, make_scene
from compose.request import Style
from compose.scene import PromptPair
from compose.validation import validate


def test_each_branch_has_its_own_words_and_adapters(toys: Any, pipelines: Any) -> None:
    request = replace(toys.request(), styles=(Style(toys.text, "style"),))
    loaded = pipelines.get(request.base)
    words = [
        PromptPair("a circle", ""),
        PromptPair("a sks circle and a square", "a square"),
        PromptPair("a square", ""),
        PromptPair("a circle and a zwx square", "a circle"),
    ]
    with loaded.lock, torch.no_grad(), loaded.restored():
        scene = make_scene(loaded, request, validate(request))
        style = scene.style_weights
        adapters = [{}, style, {}, dict.fromkeys(style, 0.5)]
        together = scene.encode_each(words, adapters)
        alone = [scene.encode_one(item.prompt, item.negative, own) for item, own in zip(words, adapters, strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.context, other.context, atol=1e-5, rtol=0)
        assert one.context.shape[0] == 2
        if loaded.is_xl:
            torch.testing.assert_close(one.pooled, other.pooled, atol=1e-5, rtol=0)
            assert torch.equal(one.time_ids, other.time_ids)
    assert float((together[1].context - together[0].context).abs().max()) > 1e-3


def test_branches_with_the_same_adapters_are_one_call(sd: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = sd.request(method="clora_mask_only")
    loaded, calls = pipelines.get(request.base), []
    real = loaded.pipeline.encode_prompt

    def encode_prompt(**given: Any) -> Any:
        calls.append(given["prompt"])
        return real(**given)

    monkeypatch.setattr(loaded.pipeline, "encode_prompt", encode_prompt)
    compose(replace(request, steps=1), pipelines)
    assert calls == [["a circle and a square", "a sks circle and a square", "a circle and a zwx square"]]


def test_the_prompt_that_is_too_long_is_named(sd: Any, pipelines: Any) -> None:
    request = sd.request()
    loaded = pipelines.get(request.base)
    words = [PromptPair("a circle", "", "/one"), PromptPair("a circle " * 40, "", "/two")]
    with loaded.lock, torch.no_grad(), loaded.restored():
        scene = make_scene(loaded, request, validate(request))
        with pytest.raises(ComposeRefused, match="tokens") as refused:
            scene.encode_each(words, [{}, {}])
    assert [item.pointer for item in refused.value.errors] == ["/two"]
