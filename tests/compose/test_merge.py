"""The weighted sum: what stock diffusers makes with set_adapters, for every stored form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from compose.engine import compose
from compose.request import Style

PIXELS = 1  # of 255: rounding to 8 bits


def stock_image(toys: Any, adapters: list[tuple[Any, float]], prompt: str, request: Any, **call: Any) -> Any:
    """The picture of diffusers' own pipeline with its own loader."""
    import diffusers
    from diffusers import DDIMScheduler

    from compose.pipelines import pipeline_kind

    pipe: Any = getattr(diffusers, pipeline_kind(toys.base)).from_pretrained(toys.base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for index, (path, _) in enumerate(adapters):
        state = pipe.lora_state_dict(path, weight_name="pytorch_lora_weights.safetensors", return_lora_metadata=True)
        pipe.load_lora_into_unet(
            state[0], network_alphas=None, unet=pipe.unet, adapter_name=f"a{index}", metadata=state[2]
        )
    pipe.unet.set_adapters([f"a{index}" for index in range(len(adapters))], [weight for _, weight in adapters])
    latents = torch.randn(
        1, 4, request.height // 2, request.width // 2, generator=torch.Generator().manual_seed(request.seed)
    )
    return pipe(
        prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        height=request.height,
        width=request.width,
        latents=latents,
        **call,
    ).images[0]


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_it_is_set_adapters_with_the_same_weights(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="merge", negative_prompt="zwx", parameters={"guidance_scale": 5.0})
    first, second = request.concepts
    request = replace(request, concepts=(replace(first, weight=0.7), replace(second, weight=1.2)))
    ours = compose(request, pipelines).image
    adapters = [(toys.first, 0.7), (toys.second, 1.2)]
    stock = stock_image(toys, adapters, "a sks circle and a zwx square", request, guidance_scale=5.0)
    assert difference(ours, stock) <= PIXELS
    assert difference(ours, compose(replace(request, concepts=(first, second)), pipelines).image) > 5


def test_a_peft_directory_is_the_diffusers_file_of_the_same_tensors(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="merge")
    first, second = request.concepts
    peft = replace(request, concepts=(replace(first, adapter=toys.peft), second))
    assert difference(compose(request, pipelines).image, compose(peft, pipelines).image) == 0


def test_styles_act_with_their_weight_and_text_encoders_have_their_part(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="merge")
    plain = compose(request, pipelines).image
    styled = compose(replace(request, styles=(Style(toys.text, "style", 0.8),)), pipelines).image
    silent = compose(replace(request, styles=(Style(toys.text, "style", 0.0),)), pipelines).image
    assert difference(plain, silent) <= PIXELS
    assert difference(plain, styled) > 5


def test_guidance_of_one_runs_the_conditional_half_alone(sd: Any, pipelines: Any) -> None:
    made = compose(sd.request(method="merge", parameters={"guidance_scale": 1.0}), pipelines)
    assert made.report["passes"]["unet_samples"] == 4
    assert compose(sd.request(method="merge"), pipelines).report["passes"]["unet_samples"] == 8
