"""LyCORIS' convolutions as LoRAs: ΔW is what PEFT's own functions make of the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import FileBroken, MergeRefused
from merge.conversion import convert_to_lora

STEM, PATH = "lora_unet_conv_in", "unet.conv_in"
SHAPE = (320, 4, 3, 3)
POINT, POINT_PATH = "lora_unet_down_blocks_0_attentions_0_proj_in", "unet.down_blocks.0.attentions.0.proj_in"
ALPHA = 3.0
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape) / 4


def plain_loha() -> tuple[Tensors, Tensor]:
    made = {f"hada_w{n}_{part}": random(*shape) for n in "12" for part, shape in (("a", (320, 2)), ("b", (2, 36)))}
    W = loha.make_weight(*(made[f"hada_w{n}_{part}"] for n in "12" for part in "ab"), torch.tensor(ALPHA / 2))
    return made, W.reshape(SHAPE)


def loha_with_cores() -> tuple[Tensors, Tensor]:
    made = {}
    for n in "12":
        made |= {f"hada_t{n}": random(2, 2, 3, 3), f"hada_w{n}_a": random(2, 320), f"hada_w{n}_b": random(2, 4)}
    order = [made[f"hada_{name}"] for name in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")]
    return made, loha.make_weight_cp(*order, torch.tensor(ALPHA / 2))


def lokr_with_a_core() -> tuple[Tensors, Tensor]:
    made = {"lokr_w1": random(16, 2), "lokr_w2_a": random(2, 20), "lokr_w2_b": random(2, 2)}
    made["lokr_t2"] = random(2, 2, 3, 3)
    two = lokr.make_weight_cp(made["lokr_t2"], made["lokr_w2_a"], made["lokr_w2_b"])
    return made, lokr.make_kron(made["lokr_w1"], two, ALPHA / 2)


def whole_lokr() -> tuple[Tensors, Tensor]:
    made = {"lokr_w1": random(16, 2), "lokr_w2": random(20, 2, 3, 3)}
    return made, lokr.make_kron(made["lokr_w1"], made["lokr_w2"], 1.0)


def flat_lokr() -> tuple[Tensors, Tensor]:
    made = {"lokr_w1": random(16, 2), "lokr_w2_a": random(20, 2), "lokr_w2_b": random(2, 18)}
    two = (made["lokr_w2_a"] @ made["lokr_w2_b"]).reshape(20, 2, 3, 3)
    return made, lokr.make_kron(made["lokr_w1"], two, ALPHA / 2)


def converted(folder: Path, stem: str, made: Tensors) -> Adapter:
    tensors = {f"{stem}.{name}": tensor for name, tensor in made.items()}
    tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors")
    report = convert_to_lora(folder / "x.safetensors", folder / "out")
    assert report.exact
    return Adapter.open(folder / "out")


@pytest.mark.parametrize("make", [plain_loha, loha_with_cores, lokr_with_a_core, whole_lokr, flat_lokr])
def test_the_product_is_what_peft_makes_of_it(tmp_path: Path, make: Callable[[], tuple[Tensors, Tensor]]) -> None:
    torch.manual_seed(0)
    made, expected = make()
    adapter = converted(tmp_path, STEM, made)
    module, found = adapter.modules[PATH], adapter[PATH]
    assert (module.kind, module.a_shape[1:], module.b_shape[2:]) == ("conv", SHAPE[1:], (1, 1))
    delta = (found.scaling * found.B @ found.A).reshape(SHAPE)
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_convolution_of_one_point_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = {f"hada_w{n}_{part}": random(*shape) for n in "12" for part, shape in (("a", (320, 2)), ("b", (2, 320)))}
    adapter = converted(tmp_path, POINT, made)
    assert adapter.modules[POINT_PATH].a_shape == (4, 320, 1, 1)


def test_a_convolution_whose_kernel_nothing_tells_is_refused(tmp_path: Path) -> None:
    made = {"lokr_w1": random(16, 2), "lokr_w2": random(20, 2, 3, 3)}
    save_file({f"unet.no_such_layer.{name}": tensor for name, tensor in made.items()}, tmp_path / "x.safetensors")
    with pytest.raises(MergeRefused, match="no model whose modules are listed"):
        convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out")


BROKEN = {
    "a core of another rank": (loha_with_cores, {"hada_t1": (3, 2, 3, 3)}, r"core hada_t1 of the shape \(3, 2, 3, 3\)"),
    "a core without a kernel": (lokr_with_a_core, {"lokr_t2": (2, 2, 3)}, r"core lokr_t2 of the shape \(2, 2, 3\)"),
    "a vector": (whole_lokr, {"lokr_w1": (16,)}, r"lokr_w1 has the shape \(16,\)"),
    "nothing": (whole_lokr, {"lokr_w1": (16, 0)}, r"lokr_w1 has the shape \(16, 0\)"),
    "another rank": (plain_loha, {"hada_w2_a": (320, 3)}, "hada_w2_a has 3 columns, hada_w2_b has 2 rows"),
    "another product": (plain_loha, {"hada_w2_b": (2, 35)}, "products are 320×36 and 320×35"),
    "another kernel": (
        loha_with_cores,
        {"hada_t1": (2, 2, 2, 2), "hada_t2": (2, 2, 2, 2)},
        "ΔW is 320×16, the convolution",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_do_not_fit_each_other_are_named(tmp_path: Path, name: str) -> None:
    make, shapes, told = BROKEN[name]
    made, _ = make()
    with pytest.raises((MergeRefused, FileBroken), match=told):
        converted(tmp_path, STEM, made | {role: torch.ones(shape) for role, shape in shapes.items()})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"lokr_w1": (1, 2**12), "lokr_w2": (1, 2**12)}, "1×16777216; forms with a side above 1048576"),
        ({"lokr_w1": (64, 64), "lokr_w2": (2**10, 2**10)}, "rank 65536 exactly"),
        ({"lokr_w1": (2**8, 2**8), "lokr_w2": (2**4, 2**12)}, "takes 17246978048 bytes"),
        ({"lokr_w1": (1, 1), "lokr_w2_a": (2, 1), "lokr_w2_b": (2, 2**11), "lokr_t2": (2, 2, 1, 2**10)}, "1×2097152"),
    ],
)
def test_small_tensors_of_a_large_product_are_refused_before_it_is_made(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], told: str
) -> None:
    with pytest.raises(MergeRefused, match=told):
        converted(tmp_path, "unet.no_such_layer", {role: torch.ones(shape) for role, shape in shapes.items()})


def test_a_kernel_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises((MergeRefused, FileBroken), match="320×16, the"):
        converted(tmp_path, STEM, {"lokr_w1": random(16, 2), "lokr_w2": random(20, 2, 2, 2)})
