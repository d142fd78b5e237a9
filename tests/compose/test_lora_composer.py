"""LoRA-Composer on tiny random pipelines, and its losses by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from final_latents import SOFTMAX, final_latents, made, same

from artifacts.errors import ComposeRefused, RequestInvalid
from compose.box_losses import BoxedConcept, box_loss, moved_noise, smoothed
from compose.engine import compose, make_scene
from compose.isolation import Isolation
from compose.methods.lora_composer import LoraComposer
from compose.options.lora_composer import LoraComposerOptions
from compose.request import Style
from compose.validation import validate

ALL = {"left": 0, "top": 0, "right": 1, "bottom": 1}
LEFT = {"left": 0, "top": 0, "right": 0.5, "bottom": 0.75}
RIGHT = {"left": 0.5, "top": 0.25, "right": 1, "bottom": 1}
TWO = [LEFT, RIGHT]
STILL = {"isolate": False, "reinitialise": False, "latent_update": False}


def request_of(toys: Any, parameters: Any = None, **changes: Any) -> Any:
    return toys.request(method="lora_composer", parameters={"boxes": TWO, **(parameters or {})}, **changes)


@contextmanager
def prepared(request: Any, pipelines: Any) -> Iterator[tuple[LoraComposer, torch.Tensor, torch.Tensor]]:
    """A method before its first step, a latent and a time step."""
    loaded = pipelines.get(request.base)
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validate(request))
        method = LoraComposer(scene, stack)
        method.prepare()
        latents = torch.randn(1, 4, *scene.latent_size, generator=torch.Generator().manual_seed(8))
        yield method, latents, scene.schedule.timesteps[0]


def test_silent_adapters_with_the_scenes_own_words_are_the_plain_pipeline(toys: Any, pipelines: Any) -> None:
    plain = "a circle and a square"
    request = request_of(toys, {**STILL, "region_prompts": [plain] * 2})
    silent = tuple(replace(item, weight=0.0, trigger="") for item in request.concepts)
    request = replace(request, concepts=silent, styles=(Style(toys.text, "style", 0.6),))
    same(final_latents(request, pipelines), final_latents(replace(request, method="merge", parameters={}), pipelines))


@pytest.mark.parametrize("layers", ["words", "all"])
def test_a_box_that_is_everywhere_is_the_adapter_alone(toys: Any, pipelines: Any, layers: str) -> None:
    """In all layers as it is; in those of words only as if it had no others."""
    plain = "a circle and a square"
    parameters = {**STILL, "boxes": [ALL], "region_prompts": [plain], "adapted_layers": layers}
    request = request_of(toys, parameters)
    alone = (replace(request.concepts[0], trigger="", weight=0.8),)
    request = replace(request, concepts=alone)
    latents = final_latents(request, pipelines)
    merge = replace(request, method="merge", parameters={})
    if layers == "all":
        same(latents, final_latents(merge, pipelines))
        return
    from compose.pipelines import LoadedPipeline

    real = LoadedPipeline.activate_unet

    def only_words(self: Any, weights: Any) -> None:
        real(self, weights)
        for path, module in self.unet.named_modules():
            if hasattr(module, "scaling") and not path.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                module._disable_adapters = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedPipeline, "activate_unet", only_words)
        reference = final_latents(merge, pipelines)
    same(latents, reference)


def test_losses_without_weight_move_nothing(sd: Any, pipelines: Any) -> None:
    weights = {"foreground_weight": 0.0, "fill_weight": 0.0, "background_weight": 0.0}
    still = final_latents(request_of(sd, {"latent_update": False}), pipelines)
    same(final_latents(request_of(sd, weights), pipelines), still)
    moved = final_latents(request_of(sd), pipelines)
    assert float((moved - still).abs().max()) > 1e-2


def test_the_order_of_concepts_does_not_matter(toys: Any, pipelines: Any) -> None:
    request = request_of(toys, {"step_size": 1.0})
    turned = replace(request, concepts=request.concepts[::-1], parameters={"boxes": TWO[::-1], "step_size": 1.0})
    same(final_latents(request, pipelines), final_latents(turned, pipelines))


def test_a_small_update_lowers_the_loss(toys: Any, pipelines: Any) -> None:
    with prepared(request_of(toys, {"step_size": 0.05}), pipelines) as (method, latents, timestep):
        moved = method._moved(0, timestep, latents)
        assert float(method.loss(moved, timestep)) < method.trace[0].before
        assert method.trace[0].moved > 0
        assert method.scene.passes.truncated == 2


@pytest.mark.parametrize("risen", [True, False])
def test_updates_end_once_the_loss_has_risen(
    sd: Any, pipelines: Any, risen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 6.0, 4.0, 7.0 if risen else 3.0, 8.0, 9.0])

    def loss(self: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents.sum() * 0 + next(losses)

    monkeypatch.setattr(LoraComposer, "loss", loss)
    parameters = {"max_iter_to_alter": 5, "stop_after": 3}
    report = compose(request_of(sd, parameters, steps=6), pipelines).report
    assert [item["step"] for item in report["updates"]] == ([0, 1, 2, 3] if risen else [0, 1, 2, 3, 4])


def concept(rows: slice, columns: slice, grid: tuple[int, int] = (6, 8)) -> BoxedConcept:
    mask = torch.zeros(grid)
    mask[rows, columns] = 1
    return BoxedConcept(mask, (1,))


def test_the_losses_are_those_by_hand() -> None:
    """A box of 3 by 3 on a grid of 6 by 8, with maps that are alike everywhere: smoothing changes nothing."""
    boxed = concept(slice(1, 4), slice(2, 5))
    maps = torch.full((48, 2), 0.25)
    self_map = torch.full((48, 48), 0.01)
    inside = boxed.mask.flatten() > 0
    self_map[12, 40] = 0.5  # from inside the box to outside
    self_map[40, 12] = 0.9  # the other way, which is no leak
    assert bool(inside[12])
    assert not bool(inside[40])
    options = LoraComposerOptions(
        top_k=0.5, foreground_weight=8.0, fill_weight=2.0, background_weight=10.0
    )  # k = 4 of 9 cells
    bell = [math.exp(-(y * y + x * x) / 2) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    best = sorted(bell, reverse=True)[:4]
    foreground = 8 * (1 - 0.25 * sum(best) / 4)
    fill = 2 * (3 * 0.75 / 8 + 3 * 0.75 / 6)
    background = 10 * (0.5 + 3 * 0.01) / 4
    found = box_loss([maps], self_map, [boxed], options)
    assert float(found) == pytest.approx(foreground + fill + background, rel=1e-5)
    full = concept(slice(0, 6), slice(0, 8))
    whole = box_loss([maps], self_map, [full], options.model_copy(update={"foreground_weight": 0.0}))
    assert float(whole) == pytest.approx(2 * (0.75 + 0.75), rel=1e-5)


def test_smoothing_keeps_the_sum_away_from_borders_and_is_the_gaussian() -> None:
    cells = torch.zeros(5, 5)
    cells[2, 2] = 1
    found = smoothed(cells)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[2, 1] / found[2, 2]) == pytest.approx(math.exp(-1 / (2 * 0.25)))
    assert float(found[1, 1] / found[2, 2]) == pytest.approx(math.exp(-2 / (2 * 0.25)))
    assert smoothed(torch.ones(1, 4)).tolist() == [pytest.approx([1] * 4)]


def test_the_noise_of_the_best_window_goes_into_the_box() -> None:
    boxed = concept(slice(1, 4), slice(2, 4))  # 3 by 2 of a grid 6 high and 8 wide
    maps = torch.zeros(48, 2)
    maps[:, 1].view(6, 8)[3:6, 6:8] = 1
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    moved, corners = moved_noise(latents, [maps], [boxed], 2)
    assert corners == [(3, 6)]
    raw = latents.clone()
    raw[..., 2:8, 4:8] = latents[..., 6:12, 12:16]
    expected = (raw - raw.mean()) / raw.std() * latents.std() + latents.mean()
    torch.testing.assert_close(moved, expected)
    assert float(moved.mean()) == pytest.approx(float(latents.mean()), abs=1e-5)
    assert float(moved.std()) == pytest.approx(float(latents.std()), rel=1e-5)


def test_places_of_one_box_do_not_see_another() -> None:
    from toy_pipelines import make_unet

    torch.manual_seed(3)
    unet = make_unet(16).requires_grad_(False).eval()
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    masks = torch.zeros(2, 16, 12)
    masks[0, :8, :6], masks[1, 8:, 6:] = 1, 1
    isolation = Isolation(unet, masks, 2)
    states = torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(5))
    small = masks[:, ::2, ::2].flatten(1) > 0
    changed = states.clone()
    changed[:, small[1]] += 1
    with torch.no_grad():
        plain = layer(states)
        with isolation.installed():
            one, two = layer(states), layer(changed)
            with isolation.watching():
                seen = layer(states)
                maps = isolation.take()[0]
        with replace(isolation, isolating=False).installed():
            torch.testing.assert_close(layer(states), plain, atol=SOFTMAX, rtol=0)
        torch.testing.assert_close(layer(states), plain, atol=0, rtol=0)
    torch.testing.assert_close(one[:, small[0]], two[:, small[0]], atol=1e-6, rtol=0)
    background = ~(small[0] | small[1])
    assert float((one[:, background] - two[:, background]).abs().max()) > 1e-3
    torch.testing.assert_close(seen, one, atol=SOFTMAX, rtol=0)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(48))
    assert not bool(maps[small[0]][:, small[1]].any())
    assert bool((maps[small[0]][:, background] > 0).all())


def test_a_place_in_two_boxes_sees_both() -> None:
    masks = torch.zeros(2, 1, 3)
    masks[0, 0, :2], masks[1, 0, 1:] = 1, 1
    blocked = Isolation(torch.nn.Module(), masks, 1).blocked(1)
    assert blocked.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_picture_that_is_not_square_with_its_evidence(toys: Any, pipelines: Any, scheduler: str) -> None:
    found, _ = made(
        request_of(toys, {"scheduler": scheduler, "step_size": 0.5}, width=24, height=40, styles=()), pipelines
    )
    assert found.image.size == found.masks["circle"][0][1].size == found.pictures["overlay"].size == (24, 40)
    assert found.report["map_grid"] == [10, 6]
    assert set(found.report["windows"]) == {"circle", "square"}
    assert [item["step"] for item in found.report["updates"]] == [0, 1]
    # a pass for the noise, two for updates, four steps with both halves
    assert found.report["passes"] == {"unet_samples": 11, "full": 8, "truncated": 3, "backward": 2}


def test_text_encoders_have_the_boxes_adapters_only_if_asked(sd: Any, pipelines: Any) -> None:
    request = request_of(sd, STILL)
    request = replace(request, concepts=(replace(request.concepts[0], adapter=sd.text), request.concepts[1]))
    without = replace(request, parameters={**request.parameters, "use_text_encoder_lora": False})
    assert float((final_latents(request, pipelines) - final_latents(without, pipelines)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [
        ({"boxes": None}, "/parameters/boxes"),
        ({"boxes": [LEFT]}, "/parameters/boxes"),
        ({"boxes": [LEFT, {**RIGHT, "bottom": 0.1}]}, "/parameters/boxes/1/bottom"),
        ({"region_prompts": ["a"]}, "/parameters/region_prompts"),
        ({"max_iter_to_alter": 5}, "/parameters/max_iter_to_alter"),
        ({"top_k": 1.5}, "/parameters/top_k"),
        ({"step_size": -1}, "/parameters/step_size"),
    ],
)
def test_what_does_not_fit_is_refused(sd: Any, parameters: Any, pointer: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        validate(request_of(sd, parameters))
    assert pointer in {item.pointer for item in refused.value.errors}


def test_equal_nouns_are_told_apart_by_their_place(sd: Any, pipelines: Any) -> None:
    request = request_of(sd, prompt="a circle and a circle")
    twins = tuple(replace(item, noun="circle", trigger="") for item in request.concepts)
    with prepared(replace(request, concepts=twins), pipelines) as (method, _, _):
        assert [item.tokens for item in method.boxed] == [(2,), (5,)]


def test_boxes_and_words_that_can_not_be_found_are_refused(sd: Any, pipelines: Any) -> None:
    tiny = {"left": 0.51, "top": 0.51, "right": 0.55, "bottom": 0.55}
    with pytest.raises(ComposeRefused, match="covers no cell") as refused:
        compose(request_of(sd, {"boxes": [LEFT, tiny]}), pipelines)
    assert [item.pointer for item in refused.value.errors] == ["/parameters/boxes/1"]
    with pytest.raises(ComposeRefused, match="are not in its branch's prompt"):
        compose(request_of(sd, {"region_prompts": ["a sks circle", "a square"]}), pipelines)
