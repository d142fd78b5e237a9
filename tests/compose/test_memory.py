"""The lower bound of what an image takes: it holds of what really runs, and says what would help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifacts.errors import ComposeRefused
from compose.catalog import parse_parameters
from compose.memory import Estimate, check_fits, estimate
from compose.pipeline_facts import PipelineFacts
from compose.request import Style


def test_the_bound_holds_of_what_runs(toys: Any, pipelines: Any) -> None:
    """Weights are counted exactly; the outputs on the way down are there when the way up begins."""
    import torch

    facts, loaded = PipelineFacts.read(toys.base), pipelines.get(toys.base)
    loaded.evict(0)  # adapters of earlier tests are no part of the pipeline's weights
    options = parse_parameters("merge", {"guidance_scale": 1})
    found = estimate(toys.base, facts, toys.request(), options, "float32")
    assert found.weights == sum(4 * value.numel() for part in loaded.parts for value in part.parameters())
    kept: list[int] = []

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        kept.extend(item.numel() * 4 for item in kwargs["res_hidden_states_tuple"])

    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in loaded.unet.up_blocks]
    context = torch.zeros(1, 4, loaded.unet.config.cross_attention_dim)
    added = {"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)} if loaded.is_xl else None
    with torch.no_grad():
        loaded.unet(torch.zeros(1, 4, 16, 16), 1, encoder_hidden_states=context, added_cond_kwargs=added)
    for handle in handles:
        handle.remove()
    assert 0.5 * sum(kept) < found.sample <= sum(kept) * 1.5


@pytest.mark.parametrize(
    ("method", "parameters", "samples"),
    [
        ("merge", {}, 2),
        ("merge", {"guidance_scale": 1}, 1),
        ("clora", {}, 6),
        ("clora", {"base_branch": False, "guidance_scale": 1}, 2),
        ("clora", {"batch_branches": "never"}, 2),
    ],
)
def test_branches_that_come_together_count_together(
    sd: Any, method: str, parameters: dict[str, Any], samples: int
) -> None:
    facts, options = PipelineFacts.read(sd.base), parse_parameters(method, parameters)
    assert estimate(sd.base, facts, sd.request(), options, "float32").samples == samples
    styled = replace(sd.request(), styles=(Style(sd.peft, "peft"),))
    assert estimate(sd.base, facts, styled, options, "float32").samples <= 2


def test_an_image_grows_with_its_area_and_shrinks_with_the_precision(sd: Any) -> None:
    facts, options = PipelineFacts.read(sd.base), parse_parameters("merge", {})
    small, large = (
        estimate(sd.base, facts, sd.request(width=side, height=side), options, "float32") for side in (32, 64)
    )
    assert large.sample == 4 * small.sample
    half = estimate(sd.base, facts, sd.request(width=32, height=32), options, "bfloat16")
    assert (2 * half.weights, 2 * half.sample) == (small.weights, small.sample)


@pytest.mark.parametrize(
    ("found", "pointer", "words"),
    [
        (Estimate(200, 2, 1), "/base_model", "its weights take"),
        (Estimate(50, 6, 10), "/parameters/batch_branches", "6 samples in one batch"),
        (Estimate(50, 6, 30), "/width", "an image of this size"),
    ],
)
def test_a_refusal_points_to_what_would_help(found: Estimate, pointer: str, words: str) -> None:
    with pytest.raises(ComposeRefused, match=words) as refused:
        check_fits(found, 100, "this machine")
    assert [item.pointer for item in refused.value.errors] == [pointer]
    check_fits(found, found.floor, "this machine")
