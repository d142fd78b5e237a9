"""LoHa and LoKr files of LyCORIS become plain LoRAs as PEFT's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import FileBroken, MergeRefused
from artifacts.layout import read_layout
from merge.conversion import convert_to_lora

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
BLOCK = "transformer.transformer_blocks.0.attn"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def loha(stem: str, d_out: int, d_in: int, rank: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = (torch.randn(*shape) for shape in ((d_out, rank), (rank, d_in), (d_out, rank), (rank, d_in)))
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
    return {f"{stem}.{name}": value for name, value in tensors.items()}, (a @ b) * (c @ d) / rank


def converted(tensors: dict[str, Tensor], folder: Path) -> Adapter:
    save_file(tensors, folder / "a.safetensors")
    report = convert_to_lora(folder / "a.safetensors", folder / "out")
    assert report.exact
    return Adapter.open(folder / "out")


def delta(adapter: Adapter, path: str) -> Tensor:
    factors = adapter[path]
    return factors.scaling * factors.B @ factors.A


def test_the_rows_of_a_fused_loha_are_split(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors, expected = loha(QKV, 24, 8)
    adapter = converted(tensors, tmp_path)
    found = torch.cat([delta(adapter, f"{BLOCK}.to_{name}") for name in "qkv"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factored", [False, True])
def test_lokr_is_scaled_only_where_a_factor_has_a_rank(tmp_path: Path, factored: bool) -> None:
    torch.manual_seed(1)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    w1, left, right = torch.randn(2, 2), torch.randn(4, 2), torch.randn(2, 4)
    tensors = {f"{stem}.lokr_w1": w1, f"{stem}.alpha": torch.tensor(1.0 if factored else 9999999827968.0)}
    if factored:
        tensors |= {f"{stem}.lokr_w2_a": left, f"{stem}.lokr_w2_b": right}
    else:
        tensors |= {f"{stem}.lokr_w2": left @ right}
    expected = torch.kron(w1, left @ right) * (0.5 if factored else 1.0)
    found = delta(converted(tensors, tmp_path), f"{BLOCK}.to_out.0")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mixtures_and_what_does_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = loha(CONV, 320, 2889)
    save_file(tensors, tmp_path / "conv.safetensors")
    with pytest.raises(MergeRefused, match=r"320×2889, the convolution of the model is"):
        convert_to_lora(tmp_path / "conv.safetensors", tmp_path / "out")
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    dora = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "dora_scale": torch.ones(8, 1)}
    save_file({f"{stem}.{name}": value for name, value in dora.items()}, tmp_path / "dora.safetensors")
    with pytest.raises(MergeRefused, match="depends on the weights"):
        convert_to_lora(tmp_path / "dora.safetensors", tmp_path / "out")
    tensors, _ = loha(QKV, 24, 8)
    tensors["lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"] = torch.randn(8)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(MergeRefused, match=r"norm besides|could not be told"):
        convert_to_lora(tmp_path / "mixed.safetensors", tmp_path / "out")


def lokr(stem: str) -> dict[str, Tensor]:
    return {f"{stem}.lokr_w1": torch.randn(2, 2), f"{stem}.lokr_w2": torch.randn(4, 4)}


PROJ = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        (f"{PROJ}.scalar", (1,)),
        (f"{PROJ}.scale", (8,)),
        (f"{PROJ}.diff", (8, 8)),
        (f"{PROJ}.weight", (8, 8)),
        (f"{PROJ}.hada_w1_a", (8, 2)),
        (f"{PROJ}.inner.diff_m", (8,)),
        ("diffusion_model.double_blocks.0.img_attn.norm.key_norm.weight", (8,)),
    ],
)
@pytest.mark.parametrize("kind", ["lokr", "loha", "lora"])
def test_what_stands_beside_a_form_is_never_passed_over(
    tmp_path: Path, kind: str, other: str, shape: tuple[int, ...]
) -> None:
    tensors = {"lokr": lokr(PROJ), "loha": loha(PROJ, 8, 8)[0]}.get(kind, {})
    if kind == "lora":  # a pair in a file that is no plain LoRA
        tensors = lokr(PROJ.replace("img", "txt"))
        tensors |= {f"{PROJ}.lora_down.weight": torch.randn(2, 8), f"{PROJ}.lora_up.weight": torch.randn(8, 2)}
    elif other.endswith(".hada_w1_a") and kind == "loha":
        other = f"{PROJ}.lokr_w1"
    path = tmp_path / "x.safetensors"
    save_file(tensors | {other: torch.ones(shape)}, path)
    try:
        layout = read_layout(path)
    except FileBroken as error:  # what shows another type of which the rest is missing
        assert PROJ in error.detail
        return
    assert layout.refusals
    assert not layout.facts.exact_as_lora.able
    with pytest.raises(MergeRefused) as caught:
        convert_to_lora(path, tmp_path / "out")
    assert other.rpartition(".")[2] in caught.value.detail
    assert not (tmp_path / "out").exists()
