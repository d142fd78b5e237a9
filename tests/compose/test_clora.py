"""CLoRA on tiny random pipelines: what must hold exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from final_latents import SOFTMAX, final_latents, made

from artifacts.errors import CompositionDiverged
from compose.adapter_switch import tuner_layers
from compose.branches import Branches
from compose.engine import compose, make_scene
from compose.latent_update import cached_gradient, joint_gradient
from compose.methods.clora import Clora
from compose.request import Style
from compose.scene import check_finite
from compose.validation import validate

FLOAT = 1e-5
QUICK = {"iterative_steps": [0], "iterative_repeats": 1, "step_size": 2.0}
NO_MASKS = {"apply_mask_after": 4}


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal but for rounding, measured by the largest entry."""
    return float((one - two).abs().max()) <= SOFTMAX * float(two.abs().max())


@contextmanager
def prepared(request: Any, pipelines: Any) -> Iterator[tuple[Clora, torch.Tensor, torch.Tensor]]:
    """A method before its first step, a latent and a time step."""
    loaded = pipelines.get(request.base)
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validate(request))
        method = Clora(scene, stack)
        method.prepare()
        latents = torch.randn(1, 4, *scene.latent_size, generator=torch.Generator().manual_seed(8))
        yield method, latents, scene.schedule.timesteps[0]


def test_branches_of_one_adapter_and_prompt_are_the_plain_pipeline(toys: Any, pipelines: Any) -> None:
    """All branches alike, no update: whatever the masks are, the result is that of one branch alone."""
    request = toys.request(method="merge", steps=4)
    alone = replace(request, concepts=request.concepts[:1], prompt="a sks circle and a square")
    first = request.concepts[0]
    twice = (first, replace(first, noun="square", trigger="and a"))  # the very same words
    words = ["a sks circle and a square"] * 3
    for base_branch in (True, False):
        same = replace(
            request,
            method="clora_mask_only",
            concepts=twice,
            prompt="a sks circle and a square",
            parameters={"branch_prompts": words, "base_branch": base_branch},
        )
        if base_branch:  # the base has no adapter, so that its own part is set aside by giving every branch none
            same = replace(same, concepts=tuple(replace(item, weight=0.0) for item in twice))
            reference = replace(alone, concepts=(replace(first, weight=0.0),))
        else:
            reference = alone
        ours, stock = final_latents(same, pipelines), final_latents(reference, pipelines)
        torch.testing.assert_close(ours, stock, atol=SOFTMAX, rtol=0)


def test_a_step_of_zero_is_mask_only(sd: Any, pipelines: Any) -> None:
    still = final_latents(sd.request(parameters={**QUICK, "step_size": 0.0}), pipelines)
    masks = final_latents(sd.request(method="clora_mask_only"), pipelines)
    off = final_latents(sd.request(parameters={"latent_update": False}), pipelines)
    assert torch.equal(still, masks)
    assert torch.equal(off, masks)
    moved = final_latents(sd.request(parameters=QUICK), pipelines)
    assert float((moved - masks).abs().max()) > 1e-2


def test_without_base_masks_and_update_it_is_the_composite(sd: Any, pipelines: Any) -> None:
    prompt = "a sks circle and a zwx square"
    alike = {"branch_prompts": [prompt] * 3, "base_branch": False, **NO_MASKS}
    ours = final_latents(sd.request(method="clora_mask_only", parameters=alike), pipelines)
    composite = final_latents(sd.request(method="composite"), pipelines)
    torch.testing.assert_close(ours, composite, atol=SOFTMAX, rtol=0)


def test_the_order_of_concepts_does_not_matter(toys: Any, pipelines: Any) -> None:
    request = toys.request(parameters=QUICK)
    turned = replace(request, concepts=request.concepts[::-1])
    torch.testing.assert_close(
        final_latents(request, pipelines), final_latents(turned, pipelines), atol=SOFTMAX, rtol=0
    )


def test_a_seed_gives_the_same_image_and_another_seed_another(sd: Any, pipelines: Any) -> None:
    request = sd.request(parameters=QUICK)
    one, two = compose(request, pipelines), compose(request, pipelines)
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    other = compose(replace(request, seed=4), pipelines)
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_fusing_latents_is_fusing_noise_for_ddim(sd: Any, pipelines: Any) -> None:
    from compose.fusion import fuse
    from compose.masks import mask_weights
    from compose.scene import Prediction
    from compose.schedulers import make_schedule

    stored = pipelines.get(sd.base).pipeline.scheduler
    schedule = make_schedule(stored, "ddim", 4, torch.device("cpu"), torch.Generator())
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(1, 4, 16, 16, generator=generator) for _ in range(3)]
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    weights = mask_weights((torch.rand(3, 8, 8, generator=generator) > 0.5).float(), (16, 16))
    for timestep in schedule.timesteps:
        fused = fuse([Prediction(None, noise) for noise in noises], weights).cond
        once = schedule.step(fused, timestep, latents)[0]
        each = torch.cat([schedule.step(noise, timestep, latents)[0] for noise in noises])
        torch.testing.assert_close(once, (each * weights).sum(dim=0, keepdim=True), atol=FLOAT, rtol=0)


def test_every_small_update_lowers_the_loss(toys: Any, pipelines: Any) -> None:
    small = {"step_size": 0.05, "iterative_steps": [0, 1], "iterative_repeats": 2, "max_iter_to_alter": 3}
    report = compose(toys.request(parameters=small), pipelines).report
    assert [item["step"] for item in report["updates"]] == [0, 0, 0, 1, 1, 1, 2]
    assert all(item["after"] < item["before"] for item in report["updates"])
    assert all(item["gradient"] > 0 and item["moved"] > 0 for item in report["updates"])


@pytest.mark.parametrize("together", ["auto", "never"])
def test_cached_gradients_are_joint_ones(toys: Any, pipelines: Any, together: str) -> None:
    request = toys.request(parameters={"batch_branches": together})
    with prepared(request, pipelines) as (method, latents, timestep):
        branches: Branches = method.branches

        def maps_of(indices: Any, z: torch.Tensor) -> list[torch.Tensor]:
            return branches.maps(indices, z, timestep)

        cached = cached_gradient(latents, 3, maps_of, method._loss)
        joint = joint_gradient(latents, 3, maps_of, method._loss)
    assert cached.loss == pytest.approx(joint.loss, abs=1e-6)
    assert float(joint.value.abs().max()) > 1e-4
    assert close(cached.value, joint.value)


def test_the_conditional_half_alone_has_the_gradient_of_that_half_in_a_whole_batch(sd: Any, pipelines: Any) -> None:
    with prepared(sd.request(), pipelines) as (method, latents, timestep), torch.enable_grad():
        z = latents.requires_grad_(True)
        alone = method._loss(method.branches.maps(range(3), z, timestep))
        both = method._loss(method.branches.predictions(z, timestep, with_maps=True).maps)
        one, two = torch.autograd.grad(alone, z)[0], torch.autograd.grad(both, z)[0]
    assert close(one, two)


def test_checkpointing_gives_the_same_bits(sd: Any, pipelines: Any) -> None:
    found = []
    for checkpointing in (False, True):
        parameters = {"gradient_caching": "always", "gradient_checkpointing": checkpointing, "batch_branches": "never"}
        with prepared(sd.request(parameters=parameters), pipelines) as (method, latents, timestep):
            assert method.scene.loaded.unet.is_gradient_checkpointing is checkpointing
            found.append(method._gradient(timestep, latents).value)
        assert not pipelines.get(sd.base).unet.is_gradient_checkpointing
    assert torch.equal(*found)


def test_one_batch_of_all_branches_is_one_after_another(toys: Any, pipelines: Any) -> None:
    found = []
    for together in ("auto", "never"):
        with prepared(toys.request(parameters={"batch_branches": together}), pipelines) as (method, latents, timestep):
            assert method.branches.together is (together == "auto")
            found.append(method.branches.predictions(latents, timestep, with_maps=True))
            unet = method.scene.loaded.unet
        assert not any(layer._forward_pre_hooks for layer in tuner_layers(unet))
    for one, two in zip(found[0].predictions, found[1].predictions, strict=True):
        torch.testing.assert_close(one.cond, two.cond, atol=FLOAT, rtol=0)
        torch.testing.assert_close(one.uncond, two.uncond, atol=FLOAT, rtol=0)
    for one, two in zip(found[0].maps, found[1].maps, strict=True):
        torch.testing.assert_close(one, two, atol=FLOAT, rtol=0)


@pytest.mark.parametrize(
    ("choice", "free", "truncated", "caching"),
    [
        ("always", 10**12, 15, True),  # 2·3 − 1 in each of 3 updates
        ("never", 0, 9, False),
        ("auto", 10**12, 5 + 2 * 3, False),  # the first tells how much a graph takes
        ("auto", 0, 15, True),
    ],
)
def test_passes_are_counted(
    sd: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch, choice: str, free: int, truncated: int, caching: bool
) -> None:
    """3 branches, 4 steps, updates in 2 of them and one repeat in the first: 3 updates."""
    monkeypatch.setattr("compose.methods.clora.free_memory", lambda device: free)
    report = compose(sd.request(parameters={**QUICK, "gradient_caching": choice}), pipelines).report
    counts = {"unet_samples": 24 + truncated, "full": 24, "truncated": truncated, "backward": 9}
    assert (report["passes"], report["gradient_caching"], report["predictions"]) == (counts, caching, "fresh")


@pytest.mark.parametrize("together", ["auto", "never"])
def test_what_is_held_at_once_does_not_change_the_image(
    toys: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch, together: str
) -> None:
    request = toys.request(parameters={**QUICK, "batch_branches": together})
    found = []
    for choice, free in (("always", 0), ("never", 0), ("auto", 10**12)):
        monkeypatch.setattr("compose.methods.clora.free_memory", lambda device, free=free: free)
        held = replace(request, parameters={**request.parameters, "gradient_caching": choice})
        found.append(final_latents(held, pipelines))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=SOFTMAX, rtol=0)


def test_all_graphs_are_held_from_the_memory_on_that_they_take_twice(
    sd: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = compose(sd.request(parameters=QUICK), pipelines).report
    needed = 2 * 3 * report["graph_bytes"]
    assert needed > 0
    for free, caching in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr("compose.methods.clora.free_memory", lambda device, free=free: free)
        assert compose(sd.request(parameters=QUICK), pipelines).report["gradient_caching"] is caching


def test_the_authors_order_goes_on_with_what_it_saw_before_the_last_update(sd: Any, pipelines: Any) -> None:
    """One update, one step: the prediction is that of the latent before, the latent is the one after."""
    quick = {"max_iter_to_alter": 1, "iterative_steps": [], "step_size": 2.0}
    request = sd.request(steps=2, parameters={**quick, "compat": "official"})
    report = compose(request, pipelines).report
    assert report["predictions"] == "stale"
    with prepared(request, pipelines) as (method, latents, timestep):
        before = method.branches.predictions(latents, timestep, with_maps=True)
        denoised = method.step(0, timestep, latents)
        assert float((denoised.latents - latents).abs().max()) > 1e-4
        weights = method._weights(0, before)
        from compose.fusion import fuse

        expected = method.scene.guide(fuse(before.predictions, weights))
        torch.testing.assert_close(denoised.noise, expected, atol=FLOAT, rtol=0)
    # its maps are means over both halves
    with prepared(replace(request, parameters=quick), pipelines) as (method, latents, timestep):
        alone = method.branches.predictions(latents, timestep, with_maps=True).maps
    assert float((alone[1] - before.maps[1]).abs().max()) > 1e-4


def test_styles_act_in_every_branch_and_are_no_concept(sd: Any, pipelines: Any) -> None:
    request = sd.request(parameters=QUICK)
    plain = final_latents(request, pipelines)
    styled, latents = made(replace(request, styles=(Style(sd.text, "style", 0.8),)), pipelines)
    assert styled.report["branches"] == 3
    assert styled.report["batched"] is False
    assert set(styled.masks) == {"circle", "square"}
    assert float((latents - plain).abs().max()) > 1e-2
    silent = final_latents(replace(request, styles=(Style(sd.first, "style", 0.0),)), pipelines)
    assert silent.shape == plain.shape


def test_text_encoders_have_the_concepts_adapters_only_if_asked(sd: Any, pipelines: Any) -> None:
    request = sd.request(method="clora_mask_only")
    first, second = request.concepts
    request = replace(request, concepts=(replace(first, adapter=sd.text), second))
    without = final_latents(request, pipelines)
    having = final_latents(replace(request, parameters={"use_text_encoder_lora": True}), pipelines)
    assert float((without - having).abs().max()) > 1e-3


def test_masks_begin_late_and_freeze(sd: Any, pipelines: Any) -> None:
    late = compose(sd.request(method="clora_mask_only", parameters={"apply_mask_after": 2}), pipelines)
    assert [item["step"] for item in late.report["coverage"]] == [2, 3]
    frozen = compose(sd.request(parameters={**QUICK, "freeze_mask_after": 0}), pipelines)
    shares = [{key: value for key, value in item.items() if key != "step"} for item in frozen.report["coverage"]]
    assert len(shares) == 4
    assert all(item == shares[0] for item in shares)
    assert all(item["after"] is not None for item in frozen.report["updates"])


def test_a_picture_that_is_not_square_and_its_evidence(toys: Any, pipelines: Any) -> None:
    found = compose(toys.request(width=24, height=40, parameters=QUICK), pipelines)
    assert found.image.size == (24, 40)
    assert found.report["map_grid"] == [10, 6]
    assert [step for step, _ in found.masks["circle"]] == [0, 1, 2, 3]
    assert found.masks["circle"][0][1].size == (24, 40)
    assert found.pictures["overlay"].size == (24, 40)


@pytest.mark.parametrize("entries", [[float("nan"), 0.0], [float("inf"), 1.0], [float("inf"), -float("inf")]])
def test_what_is_not_finite_is_told_with_its_step(entries: list[float]) -> None:
    with pytest.raises(CompositionDiverged, match="in step 3"):
        check_finite(torch.tensor(entries), "It", 3)
    check_finite(torch.tensor([3e38, 3e38]), "It", 3)  # whose sum is not


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_samplers_and_predictions(sd: Any, pipelines: Any, kind: str, scheduler: str) -> None:
    loaded = pipelines.get(sd.base)
    stored = loaded.pipeline.scheduler
    loaded.pipeline.scheduler = type(stored).from_config(stored.config, prediction_type=kind)
    try:
        small = {**QUICK, "step_size": 0.05, "scheduler": scheduler}
        report = compose(sd.request(parameters=small), pipelines).report
    finally:
        loaded.pipeline.scheduler = stored
    assert all(item["after"] < item["before"] for item in report["updates"])
    assert any("The first update moved" in item for item in report["warnings"])  # so little on purpose
