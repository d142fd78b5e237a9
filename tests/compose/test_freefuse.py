"""Masked outputs on tiny random pipelines: what must hold exactly."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from final_latents import SOFTMAX, final_latents, made, same

from artifacts.errors import ComposeRefused, RequestInvalid
from compose.adapter_switch import activate, tuner_layers
from compose.engine import compose
from compose.masks import concept_masks
from compose.options.masks import MaskOptions
from compose.output_masks import masked_outputs
from compose.regional_attention import RegionalAttention
from compose.regions import Regions
from compose.request import Style
from compose.scene import Conditioning
from compose.validation import validate

EVERYWHERE = {"mask_threshold": 0.0, "disjoint": False, "mask_steps": 1}
FLOAT = 1e-5


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Masks of our own in place of those of attention."""

    def plant(*masks: torch.Tensor) -> None:
        monkeypatch.setattr("compose.methods.freefuse.concept_masks", lambda *_, **__: torch.stack(masks))

    return plant


def with_text(toys: Any, **changes: Any) -> Any:
    """The first concept's adapter has a part in the text encoders."""
    request = toys.request(**changes)
    return replace(request, concepts=(replace(request.concepts[0], adapter=toys.text), request.concepts[1]))


def test_masks_that_are_everywhere_are_the_weighted_sum(toys: Any, pipelines: Any) -> None:
    request = with_text(toys, method="freefuse", parameters=EVERYWHERE)
    first, second = request.concepts
    request = replace(
        request,
        concepts=(replace(first, weight=0.7), replace(second, weight=1.3)),
        styles=(Style(toys.peft, "style", 0.4),),
    )
    found, latents = made(request, pipelines)
    assert found.report["coverage"] == [{"step": 0, "circle": 1.0, "square": 1.0}]
    same(latents, final_latents(replace(request, method="merge", parameters={}), pipelines))


def test_a_mask_that_is_everywhere_beside_an_empty_one_is_that_adapter_alone(
    toys: Any, pipelines: Any, planted: Any
) -> None:
    planted(torch.ones(8, 8), torch.zeros(8, 8))
    request = with_text(toys, method="freefuse", parameters={"mask_steps": 1})
    prompt = "a sks circle and a zwx square"
    alone = replace(request, method="merge", parameters={}, concepts=request.concepts[:1], prompt=prompt)
    found, latents = made(request, pipelines)
    reference = final_latents(alone, pipelines)
    if pipelines.get(toys.base).is_xl:  # whose pooled words have no place: all adapters encode them
        request = toys.request(method="freefuse", parameters={"mask_steps": 1})
        latents = final_latents(request, pipelines)
        reference = final_latents(replace(alone, concepts=request.concepts[:1]), pipelines)
    same(latents, reference)
    assert found.report["concept_lost"] == ["circle", "square"]
    assert sum("concept_lost" in item for item in found.report["warnings"]) == 2


def test_empty_masks_are_the_base_with_its_styles(toys: Any, pipelines: Any, planted: Any) -> None:
    planted(torch.zeros(8, 8), torch.zeros(8, 8))
    style = (Style(toys.text, "style", 0.6),)
    request = toys.request(method="freefuse", parameters={"mask_steps": 1}, styles=style)
    silent = tuple(replace(item, weight=0.0) for item in request.concepts)
    same(
        final_latents(request, pipelines),
        final_latents(replace(request, method="merge", parameters={}, concepts=silent), pipelines),
    )


def test_the_order_of_concepts_does_not_matter(toys: Any, pipelines: Any) -> None:
    request = toys.request(method="freefuse", parameters={"mask_steps": 2})
    turned = replace(request, concepts=request.concepts[::-1])
    same(final_latents(request, pipelines), final_latents(turned, pipelines))
    assert (
        float((final_latents(request, pipelines) - final_latents(replace(request, seed=9), pipelines)).abs().max()) > 1
    )


def test_one_adapter_for_two_concepts_is_that_adapter_inside_both_masks(sd: Any, pipelines: Any, planted: Any) -> None:
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    planted(left, 1 - left)
    request = sd.request(method="freefuse", parameters={"mask_steps": 1})
    twice = replace(request, concepts=tuple(replace(item, adapter=sd.first) for item in request.concepts))
    alone = replace(
        request, method="merge", parameters={}, concepts=request.concepts[:1], prompt="a sks circle and a zwx square"
    )
    same(final_latents(twice, pipelines), final_latents(alone, pipelines))


def test_masks_are_made_before_the_first_step_or_on_the_way(sd: Any, pipelines: Any) -> None:
    again = compose(sd.request(method="freefuse", parameters={"mask_steps": 3}), pipelines)
    assert again.report["passes"]["unet_samples"] == 2 * (3 + 4)
    merged = sd.request(method="merge")
    on = replace(merged, method="freefuse", parameters={"mask_steps": 1, "restart": False, "masks_from": "adapters"})
    pictures: list[list[bytes]] = [[], []]
    for request, to in zip((merged, on), pictures, strict=True):
        found, latents = made(request, pipelines, on_step=lambda step, to=to: to.append(step.preview().tobytes()))
        assert found.report["passes"]["unet_samples"] == 2 * 4
    for one, two in list(zip(*pictures, strict=True))[:1]:
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1
    assert float((latents - final_latents(merged, pipelines)).abs().max()) > 1e-2


def test_masks_of_the_base_are_those_of_silent_adapters(sd: Any, pipelines: Any) -> None:
    request = sd.request(method="freefuse", parameters={"mask_steps": 2})
    silent = replace(request, concepts=tuple(replace(item, weight=0.0) for item in request.concepts))
    loud, quiet = compose(request, pipelines), compose(silent, pipelines)
    assert loud.report["coverage"] == quiet.report["coverage"]
    assert loud.image.tobytes() != quiet.image.tobytes()


def test_a_picture_that_is_not_square_and_its_evidence(toys: Any, pipelines: Any) -> None:
    found = compose(toys.request(method="freefuse", parameters={"mask_steps": 2}, width=24, height=40), pipelines)
    assert found.image.size == (24, 40)
    assert found.report["map_grid"] == [10, 6]
    assert [step for step, _ in found.masks["circle"]] == [1]
    assert found.masks["square"][0][1].size == found.pictures["overlay"].size == (24, 40)


def test_a_cell_of_several_masks_stays_with_the_highest_score() -> None:
    maps = torch.tensor([[0.9, 0.1], [0.8, 0.5], [0.4, 0.45], [0.05, 0.05]])
    apart = concept_masks(maps, [(0,), (1,)], (2, 2), MaskOptions(), disjoint=True)
    assert apart.tolist() == [[[1, 0], [0, 0]], [[0, 1], [1, 0]]]
    tied = concept_masks(maps.index_fill(0, torch.tensor(0), 0.9), [(0,), (1,)], (2, 2), MaskOptions(), disjoint=True)
    assert tied[:, 0, 0].tolist() == [1, 1]  # the largest of both, whatever their order
    shared = concept_masks(maps, [(0,), (1,)], (2, 2), MaskOptions(), disjoint=False)
    assert shared.tolist() == [[[1, 1], [1, 0]], [[0, 1], [1, 0]]]


LAYERS = [
    "to_q", "to_out.0", "attn1.to_k", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv", "conv_in", "conv_out",
]  # fmt: skip


def adapted_unet(targets: list[str], **options: Any) -> Any:
    from peft import LoraConfig
    from toy_pipelines import make_unet

    torch.manual_seed(3)
    unet = make_unet(16).requires_grad_(False).eval()
    for name in ("a", "b"):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options)
        unet.add_adapter(config, adapter_name=name)
    activate(unet, {"a": 1.0, "b": 1.0})
    return unet


def halves(rows: int = 16, columns: int = 12) -> Regions:
    """The left half for a, the right one for b with a weight of its own."""
    left = torch.zeros(rows, columns)
    left[:, : columns // 2] = 1
    words = Conditioning(torch.zeros(2, 7, 16))
    return Regions(torch.stack([left, 1 - left]), [{"a": 1.0}, {"b": 0.5}], [words, words])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_every_layers_output_is_that_of_the_places_own_adapter() -> None:
    """Layer by layer, on what the layer was given: linear ones, convolutions, other grids."""
    unet = adapted_unet(LAYERS)
    seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 7, 16, generator=generator)
    with ExitStack() as stack, torch.no_grad():
        for layer in tuner_layers(unet):
            handle = layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
            stack.callback(handle.remove)
        with masked_outputs(unet, halves(), (16, 12)):
            unet(torch.randn(2, 4, 16, 12, generator=generator), torch.tensor(500), context)
    assert len(seen) == len(tuner_layers(unet)) > 30
    sizes = set()
    for layer, given, out in seen:
        with torch.no_grad():
            activate(layer, {"a": 1.0})
            left = layer(given)
            activate(layer, {"b": 0.5})
            right = layer(given)
        if out.ndim == 4:
            sizes.add(tuple(out.shape[2:]))
            middle = out.shape[3] // 2
            parts = (out[..., :middle], left[..., :middle]), (out[..., middle:], right[..., middle:])
        else:
            rows = torch.arange(out.shape[1]) % 6 < 3  # of a grid 8 high and 6 wide
            parts = (out[:, rows], left[:, rows]), (out[:, ~rows], right[:, ~rows])
        for one, other in parts:
            torch.testing.assert_close(one, other, atol=FLOAT, rtol=0)
    assert sizes == {(16, 12), (8, 6)}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_every_place_attends_to_the_words_of_its_own_region() -> None:
    unet = adapted_unet(["attn2.to_k", "attn2.to_v", "attn2.to_q"])
    generator = torch.Generator().manual_seed(5)
    words = [Conditioning(torch.randn(2, 7, 16, generator=generator)) for _ in range(2)]
    regions = replace(halves(), words=words)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    layer = unet.get_submodule(path)
    states = torch.randn(2, 8 * 6, 32, generator=generator)
    attention = RegionalAttention(unet, regions, (16, 12), 2)
    with torch.no_grad():
        plain = []
        for item, adapter in ((words[0], {"a": 1.0}), (words[1], {"b": 0.5})):
            activate(layer, {"a": 1.0, "b": 1.0})
            for part in (layer.to_k, layer.to_v):
                activate(part, adapter)
            plain.append(layer(states, encoder_hidden_states=item.context))
        activate(layer, {"a": 1.0, "b": 1.0})
        with attention.installed():
            both = layer(states, encoder_hidden_states=torch.zeros(2, 1, 16))
            cond = layer(states[1:], encoder_hidden_states=torch.zeros(1, 1, 16))
    left = torch.arange(48) % 6 < 3
    for row in (0, 1):
        torch.testing.assert_close(both[row, left], plain[0][row, left], atol=SOFTMAX, rtol=0)
        torch.testing.assert_close(both[row, ~left], plain[1][row, ~left], atol=SOFTMAX, rtol=0)
    torch.testing.assert_close(cond[0], both[1], atol=SOFTMAX, rtol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [(["time_emb_proj"], {}, "sees no places"), (["to_q"], {"use_dora": True}, "no plain LoRA")],
)
def test_adapters_that_can_not_be_kept_to_a_mask_are_refused(targets: Any, options: Any, message: str) -> None:
    unet = adapted_unet(targets, **options)
    with pytest.raises(ComposeRefused, match=message), masked_outputs(unet, halves(), (16, 12)):
        pass
    assert not any(part._forward_hooks for layer in tuner_layers(unet) for part in layer.lora_B.values())


def test_masks_that_no_step_would_have_are_refused(sd: Any) -> None:
    with pytest.raises(RequestInvalid) as refused:
        validate(sd.request(method="freefuse", parameters={"mask_steps": 4}))
    assert [item.pointer for item in refused.value.errors] == ["/parameters/mask_steps"]
