"""Adapters of LyCORIS and kohya's trainers that are full, or need the base's weights, against naive formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import FileBroken, MergeRefused
from merge import nearest_lora
from merge.conversion import convert_to_lora

STEM, PATH = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"),
)
CONV, CONV_PATH, KERNEL = "lora_unet_conv_in", "unet.conv_in", (320, 4, 3, 3)
SIDE = 320
Tensors = dict[str, Tensor]


def random(*shape: int, size: float = 0.1) -> Tensor:
    return torch.randn(shape) * size


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def weights() -> Tensors:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return {PATH: random(SIDE, SIDE), CONV_PATH: random(*KERNEL)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, weights: Tensors) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    stored = {f"{path.removeprefix('unet.')}.weight": tensor for path, tensor in weights.items()}
    save_file(stored, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def written(folder: Path, stem: str, parts: Tensors) -> Path:
    tensors = {f"{stem}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def delta(folder: Path, path: str) -> Tensor:
    factors = Adapter.open(folder)[path]
    return factors.scaling * factors.B.double() @ factors.A.double()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    wanted = wanted.double().flatten(1)
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


# What LyCORIS' forms add, each one line after another from its definition.


def row_norms(W: Tensor) -> Tensor:
    return torch.stack([row.norm() for row in W])


def input_norms(W: Tensor) -> Tensor:
    return torch.stack([W[:, column].norm() for column in range(W.shape[1])])


def dora_of_outputs(W: Tensor) -> tuple[Tensors, Tensor]:
    taps = W.shape[2:]
    down, up, m = random(2, *W.shape[1:]), random(SIDE, 2, *([1] * len(taps))), row_norms(W) * 1.3
    merged = W + 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(W)
    scale = (m / row_norms(merged)).view(-1, *[1] * (W.ndim - 1))
    shaped = m.view(-1, *[1] * (W.ndim - 1))
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0), "dora_scale": shaped}, (
        merged * scale - W
    )


def dora_of_inputs(W: Tensor) -> tuple[Tensors, Tensor]:
    made, _ = dora_of_outputs(W)
    m = input_norms(W) * 0.8
    merged = W + 0.5 * (made["lora_up.weight"].flatten(1) @ made["lora_down.weight"].flatten(1)).view_as(W)
    shape = (1, -1, *[1] * (W.ndim - 2))
    made["dora_scale"] = m.view(shape)
    return made, merged * (m / input_norms(merged)).view(shape) - W


def loha_dora(W: Tensor) -> tuple[Tensors, Tensor]:
    flat = W.flatten(1)
    made = {f"hada_w{n}_{part}": random(*shape, size=0.4) for n in "12"
            for part, shape in (("a", (SIDE, 2)), ("b", (2, flat.shape[1])))}  # fmt: skip
    change = (made["hada_w1_a"] @ made["hada_w1_b"]) * (made["hada_w2_a"] @ made["hada_w2_b"]) * 0.5
    m = input_norms(W)
    merged = W + change.view_as(W)
    shape = (1, -1, *[1] * (W.ndim - 2))
    made |= {"alpha": torch.tensor(1.0), "dora_scale": m.view(shape)}
    return made, merged * (m / input_norms(merged)).view(shape) - W


def full_dora(W: Tensor) -> tuple[Tensors, Tensor]:
    diff, m = random(*W.shape), row_norms(W)
    merged, shape = W + diff, (-1, *[1] * (W.ndim - 1))
    return {"diff": diff, "dora_scale": m.view(shape)}, merged * (m / row_norms(merged)).view(shape) - W


def rotations(blocks: Tensor, limit: float = 0.0) -> Tensor:
    Q = blocks - blocks.transpose(-1, -2)
    if limit and float(Q.norm()) > limit:
        Q = Q * limit / Q.norm()
    eye = torch.eye(Q.shape[-1])
    found: Tensor = (eye + Q) @ torch.linalg.inv(eye - Q)
    return found


def block_diagonal(blocks: Tensor) -> Tensor:
    count, size, _ = blocks.shape
    found = torch.zeros(count * size, count * size)
    for at, block in enumerate(blocks):
        found[at * size : (at + 1) * size, at * size : (at + 1) * size] = block
    return found


def oft(W: Tensor, alpha: float = 0.0) -> tuple[Tensors, Tensor]:
    blocks, rescale = random(40, 8, 8), 1 + random(SIDE, *[1] * (W.ndim - 1))
    R = block_diagonal(rotations(blocks, alpha * SIDE))
    turned = (R.T @ W.flatten(1)).view_as(W) * rescale
    return {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(alpha)}, turned - W


def constrained_oft(W: Tensor) -> tuple[Tensors, Tensor]:
    return oft(W, 0.01)


def boft(W: Tensor) -> tuple[Tensors, Tensor]:
    blocks, size = random(3, 80, 4, 4), 4
    turned = W.flatten(1)
    for stage, R in enumerate(rotations(blocks)):
        run = 2**stage * (size // 2)
        near = torch.arange(SIDE).view(-1, 2, run).transpose(1, 2).flatten()  # outputs in the order that blocks have
        mixed = block_diagonal(R) @ turned[near]
        turned = torch.empty_like(turned)
        turned[near] = mixed
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, turned.view_as(W) - W


def ia3_of_inputs(W: Tensor) -> tuple[Tensors, Tensor]:
    shape = (1, -1, *[1] * (W.ndim - 2)) if W.ndim > 2 else (-1,)
    w = random(W.shape[1])
    change = torch.stack([W[:, column] * w[column] for column in range(W.shape[1])], dim=1)
    return {"weight": w.view(shape), "on_input": torch.tensor(1)}, change


def ia3_of_outputs(W: Tensor) -> tuple[Tensors, Tensor]:
    w = random(W.shape[0])
    shape = (1, -1, *[1] * (W.ndim - 2)) if W.ndim > 2 else (-1,)
    change = torch.stack([row * value for row, value in zip(W, w, strict=True)])
    return {"weight": w.view(shape), "on_input": torch.tensor(0)}, change


def glora(W: Tensor, *, old: bool = False) -> tuple[Tensors, Tensor]:
    c_in, point = W.shape[1], [1] * (W.ndim - 2)
    L_a, R_a = random(c_in, 2), random(2, c_in)
    L_b, R_b = random(SIDE, 2), random(2, *W.shape[1:])
    change = 0.25 * (torch.einsum("oi...,ij->oj...", W, L_a @ R_a) + (L_b @ R_b.flatten(1)).view_as(W))
    one, two = ("2", "1") if old else ("1", "2")
    parts = {f"a{one}.weight": L_a.view(c_in, 2, *point), f"a{two}.weight": R_a.view(2, c_in, *point)}
    parts |= {f"b{one}.weight": L_b.view(SIDE, 2, *point), f"b{two}.weight": R_b, "alpha": torch.tensor(0.5)}
    return parts, change


def old_glora(W: Tensor) -> tuple[Tensors, Tensor]:
    return glora(W, old=True)


OF_WEIGHTS = [dora_of_outputs, dora_of_inputs, loha_dora, full_dora, oft, constrained_oft, boft, ia3_of_inputs]
OF_WEIGHTS += [ia3_of_outputs, glora, old_glora]


@pytest.mark.parametrize(("stem", "path"), [(STEM, PATH), (CONV, CONV_PATH)])
@pytest.mark.parametrize("make", OF_WEIGHTS)
def test_what_needs_weights_is_exact_at_its_own_rank(
    tmp_path: Path,
    pipeline: Path,
    weights: Tensors,
    make: Callable[[Tensor], tuple[Tensors, Tensor]],
    stem: str,
    path: str,
) -> None:
    made, wanted = make(weights[path])
    file = written(tmp_path, stem, made)
    with pytest.raises(MergeRefused, match="depends on the weights") as refused:
        convert_to_lora(file, tmp_path / "none")
    assert refused.value.errors[0].pointer == "/base_model"
    report = convert_to_lora(file, tmp_path / "out", base=pipeline, rank=None if "lora" in make.__name__ else SIDE)
    assert_close(delta(tmp_path / "out", path), wanted)
    assert report.exact
    assert report.relative_error < 1e-5
    (module,) = report.modules
    assert module.rank <= {"glora": 4, "old_glora": 4}.get(make.__name__, SIDE) or path == CONV_PATH
    described = Adapter.open(tmp_path / "out").modules[path]
    assert (described.kind == "conv") == (path == CONV_PATH)


@pytest.mark.parametrize(("stem", "path"), [(STEM, PATH), (CONV, CONV_PATH)])
def test_a_full_difference_is_cut_to_the_best_of_a_rank(tmp_path: Path, weights: Tensors, stem: str, path: str) -> None:
    diff = random(*weights[path].shape)
    file = written(tmp_path, stem, {"diff": diff, "diff_b": torch.zeros(SIDE)})
    report = convert_to_lora(file, tmp_path / "out", rank=5)
    values = torch.linalg.svdvals(diff.double().flatten(1))
    best = float(values[5:].norm() / values.norm())
    found = delta(tmp_path / "out", path)
    error = float((found - diff.double().flatten(1)).norm() / values.norm())
    assert error == pytest.approx(best, rel=1e-5)
    assert report.relative_error == pytest.approx(error, rel=1e-4)
    assert (report.source, report.rank, report.exact) == ("full", 5, False)


@pytest.mark.parametrize("largest", [nearest_lora.MAX_WHOLE_SIDE, 100])
def test_a_difference_of_low_rank_is_found_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr("merge.nearest_lora.MAX_WHOLE_SIDE", largest)
    monkeypatch.setattr("merge.nearest_lora.MAX_EXACT_RANK", 20)
    diff = random(SIDE, 7) @ random(7, SIDE)
    file = written(tmp_path, STEM, {"diff": diff})
    report = convert_to_lora(file, tmp_path / "out")
    assert (report.rank, report.exact, report.modules[0].exact_rank) == (7, True, 7)
    assert report.relative_error < 1e-6
    assert_close(delta(tmp_path / "out", PATH), diff, 1e-6)
    file = written(tmp_path, STEM, {"diff": diff + random(SIDE, SIDE, size=1e-4)})
    with pytest.raises(MergeRefused, match="above 20") as refused:
        convert_to_lora(file, tmp_path / "again")
    assert refused.value.errors[0].pointer == "/rank"
    report = convert_to_lora(file, tmp_path / "cut", rank=7)
    assert not report.exact
    assert 1e-4 < report.relative_error < 1e-2


def test_one_file_may_hold_several_types(tmp_path: Path, pipeline: Path, weights: Tensors) -> None:
    pair = {
        "lora_down.weight": random(3, *KERNEL[1:]),
        "lora_up.weight": random(SIDE, 3, 1, 1),
        "alpha": torch.tensor(6.0),
    }
    made, wanted = ia3_of_inputs(weights[PATH])
    tensors = {f"{CONV}.{name}": tensor for name, tensor in pair.items()}
    tensors |= {f"{STEM}.{name}": tensor for name, tensor in made.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    report = convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out", base=pipeline)
    assert report.source == "lycoris"
    assert_close(delta(tmp_path / "out", PATH), wanted)
    product = pair["lora_up.weight"].flatten(1) @ pair["lora_down.weight"].flatten(1)
    assert_close(delta(tmp_path / "out", CONV_PATH), 2.0 * product)
    convolution = Adapter.open(tmp_path / "out").modules[CONV_PATH]
    assert (convolution.kind, convolution.a_shape[1:], convolution.b_shape[2:]) == ("conv", KERNEL[1:], (1, 1))


def test_halves_that_change_places(tmp_path: Path) -> None:
    stem, path = "lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    diff, fused = random(16, 4) @ random(4, 8), random(24, 2) @ random(2, 8)
    save_file({f"{stem}.diff": diff, f"{qkv}.diff": fused}, tmp_path / "x.safetensors")
    convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out", rank=4)
    assert_close(delta(tmp_path / "out", path), torch.cat([diff[8:], diff[:8]]))
    block = "transformer.transformer_blocks.0.attn"
    assert_close(torch.cat([delta(tmp_path / "out", f"{block}.to_{name}") for name in "qkv"]), fused)


def test_rows_of_unequal_modules_are_split_by_their_sides(tmp_path: Path) -> None:
    """The first layer of a single block is queries, keys, values and the first of an MLP of four times their width."""
    diff = random(14, 2) @ random(2, 8)
    save_file({"lora_unet_single_blocks_0_linear1.diff": diff}, tmp_path / "x.safetensors")
    convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out", rank=4)
    block = "transformer.single_transformer_blocks.0"
    parts = [delta(tmp_path / "out", f"{block}.{name}") for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert [len(part) for part in parts] == [2, 2, 2, 8]
    assert_close(torch.cat(parts), diff)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_a_difference_tells_its_kernel_where_no_list_does(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    diff = random(6, 4, *kernel)
    save_file({"unet.no_such_layer.diff": diff}, tmp_path / "x.safetensors")
    convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out")
    (path,) = Adapter.open(tmp_path / "out")
    module = Adapter.open(tmp_path / "out").modules[path]
    assert (module.kind, module.a_shape[1:]) == (("conv", (4, 3, 2)) if kernel else ("linear", (4,)))
    assert_close(delta(tmp_path / "out", path), diff)


NORM = "lora_unet_down_blocks_0_resnets_0_norm1"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{STEM}.diff": (SIDE, SIDE), f"{STEM}.diff_b": (SIDE,)}, r"diff_b was trained"),
        ({f"{STEM}.diff": (SIDE, SIDE), f"{NORM}.w_norm": (SIDE,), f"{NORM}.b_norm": (SIDE,)}, "holds norm besides"),
        ({f"{STEM}.set_weight": (SIDE, SIDE)}, "another form than LyCORIS'"),
        ({f"{STEM}.diff": (SIDE,)}, "neither of a matrix"),
        ({f"{CONV}.diff": (320, 4, 1, 1)}, "320×4, the"),
        ({f"{STEM}.oft_blocks": (30, 8, 8)}, r"30 blocks of 8 outputs, the weight of the base model is \(320, 320"),
        ({f"{STEM}.oft_diag": (SIDE,)}, "another form"),
        ({f"{STEM}.on_input": (), f"{STEM}.weight": (300,)}, "300 scales of inputs"),
        ({f"{STEM}.a1.weight": (320, 2), f"{STEM}.a2.weight": (2, 320), f"{STEM}.b1.weight": (320, 2),
          f"{STEM}.b2.weight": (2, 300)}, "b1 and b2 of shapes"),
        ({f"{STEM}.lora_down.weight": (2, SIDE), f"{STEM}.lora_up.weight": (SIDE, 2), f"{STEM}.dora_scale": (1, 9)},
         "magnitudes of shape"),
        ({f"{STEM}.lora_down.weight": (2, 768), f"{STEM}.lora_up.weight": (SIDE, 2), f"{STEM}.dora_scale": (SIDE, 1)},
         "ΔW is 320×768"),
        ({f"{STEM.replace('attn1', 'attn2')}.oft_blocks": (40, 8, 8)}, "has no layer unet"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.oft_blocks": (384, 8, 8)}, "has no layer text_encoder"),
    ],
)  # fmt: skip
def test_what_no_lora_is_or_does_not_fit_is_refused_by_name(
    tmp_path: Path, pipeline: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises((MergeRefused, FileBroken), match=message) as caught:
        convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out", base=pipeline, rank=4)
    assert any(name in caught.value.detail for name in ("unet.", "text_encoder.", STEM)), "which module"
    assert not (tmp_path / "out").exists()


def test_an_unconstrained_oft_of_kohyas_trainer_is_refused(tmp_path: Path, pipeline: Path) -> None:
    parts = {"oft_blocks": random(40, 8, 8), "alpha": torch.tensor(0.0)}
    file = written(tmp_path, STEM.replace("lora_", "oft_"), parts)
    with pytest.raises(MergeRefused, match="kohya's trainer"):
        convert_to_lora(file, tmp_path / "out", base=pipeline, rank=4)
