"""OMG with given masks on tiny random pipelines: what must hold exactly."""

from __future__ import annotations

import base64
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
import torch
from final_latents import final_latents, made, same
from PIL import Image

from artifacts.errors import ComposeRefused
from compose.engine import compose, make_scene
from compose.methods.omg import Omg
from compose.options.places import Box, Place
from compose.places import blend_weights, box_mask, place_mask
from compose.request import Style
from compose.validation import validate

ALL = {"left": 0, "top": 0, "right": 1, "bottom": 1}
LEFT = {"left": 0, "top": 0, "right": 0.5, "bottom": 1}
LOW = {"left": 0.25, "top": 0.5, "right": 1, "bottom": 1}
TWO = [{"boxes": [LEFT]}, {"boxes": [LOW]}]


def as_png(rows: list[list[int]]) -> str:
    image = Image.new("L", (len(rows[0]), len(rows)))
    image.putdata([255 * value for row in rows for value in row])
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_mask_over_everything_is_the_adapter_alone(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="omg", parameters={"places": [{"boxes": [ALL]}]}, prompt="a circle and a square")
    first = replace(request.concepts[0], adapter=toys.text, weight=0.8)
    style = (Style(toys.second, "style", 0.5),)
    request = replace(request, concepts=(first,), styles=style)
    merge = replace(request, method="merge", parameters={})
    same(final_latents(request, pipelines), final_latents(merge, pipelines))


def test_a_rho_of_zero_is_the_base_as_is_its_own_stage(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="omg", parameters={"places": TWO, "rho": 0.0})
    base = replace(request, parameters={"stage": "base"})
    silent = tuple(replace(item, weight=0.0, trigger="") for item in request.concepts)
    merge = final_latents(replace(request, method="merge", parameters={}, concepts=silent), pipelines)
    same(final_latents(request, pipelines), merge)
    found, latents = made(base, pipelines)
    same(latents, merge)
    assert found.report["stage"] == "base"
    assert not found.masks
    late = {"places": TWO, "base_steps": 4}
    same(final_latents(replace(request, parameters=late), pipelines), merge)


@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_noise_is_blended_inside_each_mask_and_the_bases_outside(toys: Any, pipelines: Any, rho: float) -> None:
    """Against passes of the pipeline with one adapter each."""
    prompts = ["a sks circle", "a zwx square"]
    request = toys.request(
        method="omg", height=40, width=24, parameters={"places": TWO, "rho": rho, "region_prompts": prompts}
    )
    loaded = pipelines.get(request.base)
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validate(request))
        method = Omg(scene, stack)
        method.prepare()
        latents = torch.randn(1, 4, *scene.latent_size, generator=torch.Generator().manual_seed(8))
        timestep = scene.schedule.timesteps[0]
        found = method.step(0, timestep, latents).noise
        alone = []
        for text, adapters in (
            (scene.prompts.plain, {}),
            (prompts[0], scene.concept_weights(0)),
            (prompts[1], scene.concept_weights(1)),
        ):
            words = scene.encode_one(text, "", adapters)
            loaded.activate_unet(adapters)
            alone.append(scene.guide(scene.predict(latents, timestep, words)))
    height, width = 20, 12
    for row, column, inside in ((2, 8, ()), (2, 2, (1,)), (15, 8, (2,)), (15, 4, (1, 2))):
        assert row < height
        assert column < width
        expected = alone[0][0, :, row, column]
        if inside:
            mean = torch.stack([alone[index][0, :, row, column] for index in inside]).mean(dim=0)
            expected = (1 - rho) * expected + rho * mean
        same(found[0, :, row, column], expected)


def test_the_order_of_concepts_and_the_batch_do_not_matter(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="omg", parameters={"places": TWO, "rho": 0.7})
    turned = replace(
        request,
        concepts=request.concepts[::-1],
        parameters={"places": TWO[::-1], "rho": 0.7, "batch_branches": "never"},
    )
    one, two = made(request, pipelines), made(turned, pipelines)
    same(one[1], two[1])
    assert (one[0].report["batched"], two[0].report["batched"]) == (True, False)
    assert one[0].report["passes"]["unet_samples"] == two[0].report["passes"]["unet_samples"] == 3 * 2 * 4


def test_a_mask_is_the_box_that_is_drawn_in_it(sd: Any, pipelines: Any) -> None:
    drawn = as_png([[1, 1, 0, 0]] * 3)
    boxes = sd.request(method="omg", parameters={"places": TWO})
    masks = replace(boxes, parameters={"places": [{"png": drawn}, TWO[1]]})
    found, latents = made(masks, pipelines)
    assert torch.equal(latents, final_latents(boxes, pipelines))
    assert found.report["coverage"] == [{"step": 0, "circle": 0.5, "square": 0.375}]
    assert found.report["parameters"]["places"][0]["png"] == drawn
    assert found.masks["circle"][0][1].size == found.pictures["overlay"].size == (32, 32)


def test_places_on_grids_that_are_not_square() -> None:
    box = Box(left=0.5, top=0.25, right=1, bottom=0.5)
    assert box_mask(box, (4, 2)).tolist() == [[0, 0], [0, 1], [0, 0], [0, 0]]
    png = Place(png=as_png([[0, 0, 0, 0], [0, 0, 0, 1]]))
    assert place_mask(png, (2, 4), "/x").tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert place_mask(png, (4, 4), "/x")[:, 3].tolist() == [0, 0, 1, 1]
    both = Place(boxes=[box, Box(left=0, top=0, right=0.5, bottom=0.25)])
    assert place_mask(both, (4, 2), "/x").tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]


def test_weights_sum_to_one_and_masks_that_meet_share() -> None:
    masks = [torch.tensor([[0.0, 1, 1]]), torch.tensor([[0.0, 0, 1]])]
    weights = blend_weights(masks, 0.5)[:, 0, 0]
    assert weights.T.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]]


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [
        ({}, "/parameters/places"),
        ({"places": TWO[:1]}, "/parameters/places"),
        ({"places": [{}, TWO[1]]}, "/parameters/places/0"),
        ({"places": [{**TWO[0], "png": as_png([[1]])}, TWO[1]]}, "/parameters/places/0"),
        ({"places": [TWO[0], {"png": as_png([[0]])}]}, "/parameters/places/1/png"),
        ({"places": [TWO[0], {"png": "nonsense"}]}, "/parameters/places/1/png"),
        ({"places": [TWO[0], {"boxes": [{**ALL, "right": 0}]}]}, "/parameters/places/1/boxes/0/right"),
        ({"places": [TWO[0], {"boxes": [{**ALL, "right": 1.5}]}]}, "/parameters/places"),
        ({"places": [TWO[0], {"boxes": []}]}, "/parameters/places"),
        ({"places": [TWO[0], {"boxes": [ALL] * 17}]}, "/parameters/places"),
        ({"places": TWO, "rho": 1.1}, "/parameters/rho"),
        ({"places": TWO, "base_steps": 5}, "/parameters/base_steps"),
        ({"places": TWO, "region_prompts": ["a"]}, "/parameters/region_prompts"),
    ],
)
def test_places_that_are_none_are_refused(sd: Any, parameters: Any, pointer: str) -> None:
    from artifacts.errors import RequestInvalid

    with pytest.raises(RequestInvalid) as refused:
        validate(sd.request(method="omg", parameters=parameters))
    assert pointer in {item.pointer for item in refused.value.errors}


def test_a_place_smaller_than_a_pixel_of_the_latent_is_refused(sd: Any, pipelines: Any) -> None:
    tiny = {"boxes": [{"left": 0.5, "top": 0.5, "right": 0.51, "bottom": 0.51}]}
    with pytest.raises(ComposeRefused, match="covers no pixel") as refused:
        compose(sd.request(method="omg", parameters={"places": [TWO[0], tiny]}), pipelines)
    assert [item.pointer for item in refused.value.errors] == ["/parameters/places/1"]
