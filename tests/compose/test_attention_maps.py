"""Maps of a UNet: which layers, what they sum to, and that looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from artifacts.errors import ComposeRefused
from compose.attention_maps import MapRecorder, Stop, map_factor, map_layers

TIGHT = 1e-6
CLOSE = 2e-5  # explicit softmax against the fused kernel


@pytest.fixture(scope="module")
def unet() -> Any:
    from toy_pipelines import make_unet

    torch.manual_seed(3)
    return make_unet(16).requires_grad_(False).eval()


def inputs(batch: int = 2, size: tuple[int, int] = (16, 16)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=generator),
    }


def test_rows_sum_to_one_over_all_tokens_and_the_output_is_that_of_the_plain_layers(unet: Any) -> None:
    recorder = MapRecorder(unet, 2, (8, 8))
    with torch.no_grad():
        plain = unet(**inputs()).sample
        before = dict(unet.attn_processors)
        with recorder.installed(), recorder.watching():
            seen = unet(**inputs()).sample
            maps = recorder.take()
    assert maps.shape == (2, 64, 7)
    torch.testing.assert_close(maps.sum(dim=2), torch.ones(2, 64), atol=TIGHT, rtol=0)
    torch.testing.assert_close(seen, plain, atol=CLOSE, rtol=0)
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_the_mean_is_over_layers_and_heads(unet: Any) -> None:
    """Each layer's probabilities, formed here from its own projections by hand."""
    seen: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        query = module.to_q(args[0]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        key = module.to_k(kwargs["encoder_hidden_states"]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        seen.append((query @ key.transpose(2, 3) * module.scale).softmax(-1).mean(dim=1))

    layers = map_layers(unet)
    handles = [unet.get_submodule(layer.path).register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    recorder = MapRecorder(unet, 2, (8, 8))
    with torch.no_grad(), recorder.installed(), recorder.watching():
        unet(**inputs())
        maps = recorder.take()
    for handle in handles:
        handle.remove()
    assert len(seen) == len(layers) == 4
    torch.testing.assert_close(maps, torch.stack(seen).mean(dim=0), atol=TIGHT, rtol=0)


def test_a_stopped_pass_saw_the_same_maps(unet: Any) -> None:
    recorder = MapRecorder(unet, 2, (8, 8))
    with torch.no_grad(), recorder.installed():
        with recorder.watching():
            unet(**inputs())
            whole = recorder.take()
        with recorder.watching(stopping=True), pytest.raises(Stop):
            unet(**inputs())
        assert torch.equal(recorder.take(), whole)


def test_grids_of_pictures_that_are_not_square(unet: Any) -> None:
    recorder = MapRecorder(unet, 2, (8, 4))
    with torch.no_grad(), recorder.installed(), recorder.watching():
        unet(**inputs(size=(16, 8)))
        assert recorder.take().shape == (2, 32, 7)
    wrong = MapRecorder(unet, 2, (8, 8))
    with torch.no_grad(), wrong.installed(), wrong.watching(), pytest.raises(AssertionError, match="32 cells"):
        unet(**inputs(size=(16, 8)))


def test_residual_scale_and_groups_of_other_attention_layers_are_honoured() -> None:
    from diffusers.models.attention_processor import Attention

    from compose.attention_maps import _Recording

    torch.manual_seed(0)
    layer = Attention(
        12, cross_attention_dim=6, heads=3, dim_head=4, norm_num_groups=3, residual_connection=True,
        rescale_output_factor=1.7, qk_norm="layer_norm", bias=True,
    ).eval()  # fmt: skip
    states, context = torch.randn(2, 12, 4, 2), torch.randn(2, 5, 6)
    mask = torch.zeros(2, 1, 5)
    mask[:, :, 3:] = -1e4
    with torch.no_grad():
        plain = layer(states, encoder_hidden_states=context, attention_mask=mask)
        recorder = MapRecorder(torch.nn.Module(), 1, (4, 2), recording=True)
        layer.set_processor(_Recording(recorder, last=False))
        torch.testing.assert_close(
            layer(states, encoder_hidden_states=context, attention_mask=mask), plain, atol=CLOSE, rtol=0
        )


def layout(**parts: Any) -> Any:
    """A UNet of which only the blocks matter."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            **{"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "layers_per_block": 1}
            | parts
        )


def test_the_grid_is_read_from_the_model() -> None:
    small = {"block_out_channels": (8,) * 4, "attention_head_dim": 4}
    sd15 = layout(**small, sample_size=64, layers_per_block=2)
    assert map_factor(sd15) == 4
    assert sum(item.factor == 4 for item in map_layers(sd15)) == 5
    assert [item.factor for item in map_layers(sd15)] == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    assert map_factor(layout(**small, sample_size=96)) == 4  # Stable Diffusion 2 at 768 pixels
    xl = layout(
        block_out_channels=(8, 8, 8), attention_head_dim=4, sample_size=128, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
    )  # fmt: skip
    assert map_factor(xl) == 4
    paths = [item.path for item in map_layers(xl) if item.factor == 4]
    counts = {start: sum(path.startswith(start) for path in paths) for start in ("down_blocks.2", "mid", "up_blocks.0")}
    assert counts == {"down_blocks.2": 20, "mid": 10, "up_blocks.0": 30}
    both = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
    shapes = layout(sample_size=16, attention_head_dim=2, down_block_types=both[0], up_block_types=both[1])
    assert map_factor(shapes) == 1
    assert map_factor(shapes, 2) == 2
    with pytest.raises(ComposeRefused, match="4 times coarser"):
        map_factor(shapes, 4)


def test_layers_that_form_no_map_are_refused(unet: Any) -> None:
    recorder = MapRecorder(unet, 2, (8, 8))
    unet.fuse_qkv_projections()
    try:
        with pytest.raises(ComposeRefused, match="FusedAttnProcessor"), recorder.installed():
            pass
    finally:
        unet.unfuse_qkv_projections()

    class XFormersAttnProcessor:
        pass

    layer = unet.get_submodule(recorder.layers[0])
    before, layer.processor = layer.processor, XFormersAttnProcessor()
    try:
        with pytest.raises(ComposeRefused, match="XFormers"), recorder.installed():
            pass
    finally:
        layer.processor = before
