"""LoftQ: the levels, what the rounds win, and an adapter that brings its quantised base with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from artifacts.errors import BaseMismatch, RequestInvalid
from artifacts.intake import inspect
from train import declared
from train.catalog import parse_parameters
from train.loftq_layer import LoftqLinear
from train.normal_float import levels, middles, nearest, rounded

NF4 = (
    -1.0,
    -0.6961928,
    -0.5250731,
    -0.3949175,
    -0.2844414,
    -0.1847734,
    -0.0910500,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.3379152,
    0.4407098,
    0.5626170,
    0.7229568,
    1.0,
)
"""As published with QLoRA, arXiv:2305.14314, appendix E."""


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(384, 384, generator=torch.Generator().manual_seed(0))


def layer(weight: torch.Tensor, rank: int, bits: int, iterations: int, scaling: float = 2.0) -> LoftqLinear:
    base = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        base.weight.copy_(weight)
    made = LoftqLinear(base, rank, scaling, bits, iterations)
    made.decompose()
    made.quantise()
    return made


def error(made: LoftqLinear, weight: torch.Tensor) -> float:
    return float((made.lost(weight)[1] / weight.double().square().sum()) ** 0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_levels_are_distinct_and_hold_zero_and_both_ends(bits: int) -> None:
    found = levels(bits)
    assert len(found) == 2**bits
    assert bool((found[1:] > found[:-1]).all())
    assert (float(found[0]), float(found[2 ** (bits - 1) - 1]), float(found[-1])) == (-1.0, 0.0, 1.0)


def test_four_bits_are_those_of_qlora() -> None:
    torch.testing.assert_close(levels(4), torch.tensor(NF4), rtol=0, atol=2e-7)


def test_quantising_twice_is_quantising_once(weight: torch.Tensor) -> None:
    once = rounded(weight, 4)
    assert torch.equal(rounded(once, 4), once)
    assert all(len(block.unique()) <= 16 for block in once.view(-1, 64))


def test_zeros_and_short_blocks_stay_what_they_are() -> None:
    assert torch.equal(rounded(torch.zeros(5, 7), 2), torch.zeros(5, 7))
    odd = torch.full((3, 27), 0.25)
    assert torch.equal(rounded(odd, 3), odd)


@pytest.mark.parametrize(
    ("bits", "rank", "plain", "one", "five"),
    # of a Gaussian matrix of this size; with 2 bits and rank 32 the rounds win most
    [(4, 8, 0.0920, 0.0884, 0.0816), (2, 32, 0.5632, 0.4732, 0.4444)],
)
def test_the_rounds_win_what_they_should(
    weight: torch.Tensor, bits: int, rank: int, plain: float, one: float, five: float
) -> None:
    close = {"rel": 0.02}
    norm = float(weight.norm())
    assert float((weight - rounded(weight, bits)).norm()) / norm == pytest.approx(plain, **close)
    assert error(layer(weight, rank, bits, 1), weight) == pytest.approx(one, **close)
    assert error(layer(weight, rank, bits, 5), weight) == pytest.approx(five, **close)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_start_is_the_best_low_rank_part_of_what_q_loses(weight: torch.Tensor, iterations: int) -> None:
    """Eckart–Young: what is left has the singular values behind the rank, whatever the scaling."""
    small = weight[:48, :64]
    made = layer(small, 6, 3, iterations, scaling=0.5)
    left = small - made.weight.detach()
    tail = torch.linalg.svdvals(left)[6:].square().sum().sqrt()
    assert float((left - made.delta()).norm()) == pytest.approx(float(tail), rel=1e-4)
    x = torch.randn(3, 64)
    expected = x @ (made.weight + made.delta()).T + made.base.bias  # type: ignore[union-attr, operator]
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-5)


def test_with_one_round_q_is_plain_quantisation(weight: torch.Tensor) -> None:
    assert torch.equal(layer(weight[:32, :64], 4, 4, 1).weight, rounded(weight[:32, :64], 4))
    assert not torch.equal(layer(weight[:32, :64], 4, 4, 3).weight, rounded(weight[:32, :64], 4))


def test_dropout_is_refused_for_the_factors_hold_base_weights() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("loftq", {"dropout": 0.1})
    assert caught.value.errors[0].pointer == "/parameters/dropout"


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trainings import Trainings

    trainings = Trainings(tmp_path_factory.mktemp("loftq"), tiny_base)
    return trainings, *trainings.run("loftq", {"rank": 4, "bits": 3, "iterations": 3}, steps=2)


def test_the_adapter_says_what_it_needs_and_is_not_merged(trained: Any) -> None:
    _, report, adapter, _ = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["quantisation"] == {"type": "normal_float", "bits": 3, "block": 64, "iterations": 3}
    manifest = inspect(adapter)
    assert (manifest.method, manifest.mergeable, manifest.rank) == ("loftq", False, 4)
    told = report.own["quantisation"]
    assert 0 < told["relative_error_with_factors"] < 0.9 * told["relative_error"] < 0.3
    assert report.reload["largest_difference"] <= 1e-4


def test_without_quantising_the_base_it_is_another_model(trained: Any) -> None:
    """What a loader does that takes the factors for a plain LoRA."""
    trainings, _, adapter, _ = trained
    ids = torch.arange(40).view(1, -1)
    right = declared.load(trainings.load_base(), adapter)
    wrong = declared.load(trainings.load_base(), adapter)
    for path, module in trainings.load_base().named_modules():
        if isinstance(wrong.get_submodule(path), LoftqLinear):
            with torch.no_grad():
                wrong.get_submodule(path).weight.copy_(module.weight)
    with torch.no_grad():
        assert float((right(ids).logits - wrong(ids).logits).abs().max()) > 0.1


def test_folded_it_is_the_same_model_without_us(trained: Any) -> None:
    trainings, _, adapter, _ = trained
    ids = torch.arange(40).view(1, -1)
    model = declared.load(trainings.load_base(), adapter)
    with torch.no_grad():
        expected = model(ids).logits
        folded = declared.fold(model)
        assert not any(isinstance(module, LoftqLinear) for module in folded.modules())
        torch.testing.assert_close(folded(ids).logits, expected, rtol=0, atol=1e-4)


def test_another_base_is_refused(trained: Any, tmp_path: Path) -> None:
    trainings, _, adapter, _ = trained
    other = trainings.load_base()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(BaseMismatch, match="are not those that the adapter was trained on"):
        declared.load(other, adapter)


def test_weights_that_are_no_numbers_are_refused(trained: Any, tiny_base: Path) -> None:
    trainings, *_ = trained

    def broken() -> Any:
        model = type(trainings).load_base(trainings)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        return model

    from train.catalog import find_method
    from train.protocol import MethodContext
    from train.settings import TrainingSettings

    context = MethodContext(["model.layers.1.mlp.up_proj"], 1, lambda: iter(()), TrainingSettings(steps=1))
    method = find_method("loftq").load(parse_parameters("loftq", {"rank": 4}))
    with pytest.raises(RequestInvalid, match=r"model.layers.1.mlp.up_proj has NaN"):
        method.prepare(broken(), context)


def test_peft_can_not_start_loftq_without_bitsandbytes() -> None:
    """Why this one is ours. Fails when PEFT learns it: then compare the two."""
    from peft.utils.loftq_utils import loftq_init

    with pytest.raises(ValueError, match="bitsandbytes"):
        loftq_init(torch.randn(8, 8), num_bits=4, reduced_rank=2)


def test_tensors_of_another_layer_are_refused(trained: Any, tmp_path: Path) -> None:
    trainings, _, adapter, _ = trained
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {
        "lora_A",
        "lora_B",
        "left_out_A",
        "left_out_B",
    }
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    kept = {key: value for key, value in tensors.items() if not key.endswith("left_out_A")}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RequestInvalid, match="not those of the adapter's layers"):
        declared.load(trainings.load_base(), tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_nearest_level_is_found_as_by_trying_all_middles(bits: int) -> None:
    """Beside every middle, at it, and beyond the levels."""
    middle = middles(bits)
    beside = [torch.nextafter(middle, torch.full_like(middle, side)) for side in (-2.0, 2.0)]
    drawn = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([middle, *beside, levels(bits), drawn, torch.tensor([-torch.inf, torch.inf, 3e38])])
    assert torch.equal(nearest(values, bits).long(), torch.bucketize(values, middle))
    assert 0 <= int(nearest(torch.tensor([torch.nan]), bits)) < 2**bits
