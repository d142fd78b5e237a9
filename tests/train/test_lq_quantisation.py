"""A base model in a few bits: codes, scales, the decomposition, the budget, and the written folder."""

from __future__ import annotations

import itertools
import json
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from artifacts.base_model import compare, inspect_base
from artifacts.errors import RequestInvalid
from train.base_files import BaseFiles
from train.normal_float import levels
from train.options.quantisation import QuantisationOptions
from train.quantised.allocation import BudgetTooSmallError, allocate
from train.quantised.bit_packing import looked_up, pack, packed_bytes, unpack
from train.quantised.block_format import PRESETS, BlockFormat, grid
from train.quantised.decomposition import Decomposition, decompose
from train.quantised.double_quantisation import packed, rounded, scales_of, unpacked
from train.quantised.engine import quantise_base
from train.quantised.fisher_weights import RowColumnWeights
from train.quantised.low_rank import LowRankFactors
from train.quantised.packed_linear import PackedLinear

SMALL = {"blocks": [16], "scales": [16]}
"""What fits the matrices of the tiny base model."""
OPTIONS: dict[str, Any] = {"rank": 4, "budget_bits": 2.75, "grid": SMALL}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(rank: int, weights: RowColumnWeights | None = None) -> LowRankFactors:
    return LowRankFactors(rank, oversampling=None, generator=torch.Generator(), weights=weights)


def quiet(fraction: float, message: str) -> None:
    assert 0 <= fraction <= 1
    assert message


# --- codes and scales


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packing_loses_nothing_and_wastes_less_than_a_byte(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([number % 2**bits for number in numbers], dtype=torch.uint8)
    stored = pack(codes, bits)
    assert len(stored) == packed_bytes(len(codes), bits) == -(-len(codes) * bits // 8)
    assert torch.equal(unpack(stored, bits, len(codes)), codes)
    table = drawn(2**bits)
    assert torch.equal(looked_up(stored, bits, len(codes), table), table[codes.long()])


def test_packing_is_little_endian() -> None:
    assert pack(torch.tensor([1, 2]), 4).tolist() == [0x21]
    word = sum(code << (3 * place) for place, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == list(word.to_bytes(3, "little"))


def test_the_published_grid_and_its_bits() -> None:
    every = grid(scale_dtypes=("bfloat16", "float16", "float32"))
    assert (len(every), len({form.bits_per_weight for form in every})) == (432, 184)
    assert every[0].bits_per_weight == pytest.approx(2.0322, abs=1e-4)
    assert every[-1].bits_per_weight == 8.625
    assert len(grid()) == 144
    assert PRESETS["nf4"][0].bits_per_weight == 4.126953125
    assert PRESETS["nf3"][0].bits_per_weight == 3.126953125


@pytest.mark.parametrize("form", [*grid()[::13], *(forms[0] for forms in PRESETS.values())])
def test_the_stored_bytes_are_what_the_formula_says(form: BlockFormat) -> None:
    weight = drawn(128, 128)
    stored = packed(weight, form)
    assert 8 * stored.counted_bytes == form.bits_of(weight.numel()) == form.bits_per_weight * weight.numel()
    assert torch.equal(unpacked(stored), rounded(weight, form))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantising_twice_is_quantising_once(bits: int) -> None:
    form = BlockFormat(bits, 8, "float32", 64, 256)
    once = rounded(drawn(128, 128), form)
    torch.testing.assert_close(rounded(once, form), once, rtol=0, atol=1e-6)


def test_a_weight_goes_to_the_level_that_is_nearest_by_the_scale_in_force() -> None:
    """By the scale before it was quantised itself, 2 bits for the scales lose a fifth more."""
    weight, form = drawn(128, 128), BlockFormat(3, 2, "float32", 64, 256)
    s = scales_of(weight, form).value(2).reshape(-1, 1)
    table = levels(3)
    distance = (weight.reshape(-1, 64, 1) / s[:, :, None] - table).abs()
    expected = (table[distance.argmin(dim=2)] * s).view_as(weight)
    torch.testing.assert_close(rounded(weight, form), expected, rtol=0, atol=1e-6)
    first = weight.reshape(-1, 64).abs().amax(1)[:, None, None]
    by_first = table[(weight.reshape(-1, 64, 1) / first - table).abs().argmin(2)]
    assert (weight - expected).norm() < 0.95 * (weight - (by_first * s).view_as(weight)).norm()


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(32, 32), torch.full((32, 32), -0.25), torch.full((4, 64), 3.0)],
    ids=["zero", "constant", "one"],
)
@pytest.mark.parametrize("form", [BlockFormat(2, 2, "float16", 16, 16), BlockFormat(3, 8, "float32", 16, 16)])
def test_matrices_without_variation_come_back_exactly(weight: Tensor, form: BlockFormat) -> None:
    assert torch.equal(unpacked(packed(weight, form)), weight)


def test_a_block_of_zeros_stays_one() -> None:
    weight = drawn(32, 32)
    weight[0, :16] = 0
    found = rounded(weight, BlockFormat(4, 8, "bfloat16", 16, 16))
    assert bool(found.isfinite().all())
    assert not found[0, :16].any()


# --- the decomposition


@pytest.mark.parametrize(("bits", "rank", "error", "polished"), [(4, 8, 0.0760, 0.0760), (2, 32, 0.4101, 0.4045)])
def test_a_gaussian_matrix_loses_what_it_should(bits: int, rank: int, error: float, polished: float) -> None:
    weight = drawn(384, 384)
    form = BlockFormat(bits, 8, "float32", 64, 256)
    norm = float(weight.norm())
    found = decompose(weight, form, exact(rank), iterations=30, polish=True)
    assert found.error / norm == pytest.approx(polished, rel=0.02)
    assert min(found.trace) / norm == pytest.approx(error, rel=0.02)


@pytest.fixture(scope="module")
def found() -> tuple[Tensor, BlockFormat, Decomposition]:
    weight, form = drawn(96, 128), BlockFormat(3, 8, "float32", 64, 64)
    return weight, form, decompose(weight, form, exact(6), iterations=100)


def test_the_error_falls_until_the_last_round_and_the_best_is_given(found: Any) -> None:
    weight, form, made = found
    *falling, last = made.trace
    assert falling == sorted(falling, reverse=True)
    assert last > falling[-1]
    assert made.error == min(made.trace)
    left = weight - rounded(made.quantised, form) - made.left @ made.right
    assert float(left.norm()) == pytest.approx(made.error, rel=1e-5)


def test_polishing_never_loses(found: Any) -> None:
    weight, form, made = found
    polished = decompose(weight, form, exact(6), iterations=100, polish=True)
    assert polished.error <= made.error
    assert torch.equal(rounded(polished.quantised, form), rounded(made.quantised, form))


def test_a_random_subspace_does_almost_as_well(found: Any) -> None:
    weight, form, made = found
    factors = LowRankFactors(6, oversampling=10, generator=torch.Generator().manual_seed(1))
    assert decompose(weight, form, factors, iterations=100).error < 1.03 * made.error


def test_formats_may_share_the_factors_that_they_begin_with() -> None:
    weight, form = drawn(64, 96), BlockFormat(3, 8, "float32", 16, 16)
    alone, start = (LowRankFactors(6, oversampling=10, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    expected = decompose(weight, form, alone, iterations=6).trace
    first = start(weight)
    for _ in range(2):
        assert decompose(weight, form, copy(start), iterations=6, first=first).trace == expected


def test_weighted_factors_are_the_best_for_a_fisher_of_rank_one() -> None:
    """‖√F∘(R − L1·L2)‖ is then the root of the singular values of √F∘R behind the rank."""
    residual = drawn(40, 56)
    fisher = drawn(40, 1, seed=1).exp() @ drawn(1, 56, seed=2).exp()
    weights = RowColumnWeights.of(fisher, "two-sided")
    left, right = exact(5, weights)(residual)
    tail = torch.linalg.svdvals(fisher.sqrt() * residual)[5:].square().sum().sqrt()
    assert float((fisher.sqrt() * (residual - left @ right)).norm()) == pytest.approx(float(tail), rel=1e-5)
    again = exact(5, RowColumnWeights.of(7 * fisher, "two-sided"))(residual)
    torch.testing.assert_close(again[0] @ again[1], left @ right, rtol=0, atol=1e-4)
    flat = exact(5, RowColumnWeights.of(torch.full((40, 56), 3.0), "two-sided"))(residual)
    plain = exact(5)(residual)
    torch.testing.assert_close(flat[0] @ flat[1], plain[0] @ plain[1], rtol=0, atol=3e-5)


@pytest.mark.parametrize("heuristic", ["two-sided", "row", "col"])
def test_rows_that_the_loss_does_not_feel_divide_by_no_zero(heuristic: Any) -> None:
    fisher = drawn(16, 24).square()
    fisher[3], fisher[:, 5] = 0, 0
    left, right = exact(4, RowColumnWeights.of(fisher, heuristic))(drawn(16, 24, seed=1))
    assert bool(left.isfinite().all())
    assert bool(right.isfinite().all())


def test_a_fisher_is_heeded() -> None:
    weight, form = drawn(64, 64), BlockFormat(3, 8, "float32", 16, 16)
    fisher = (3 * drawn(64, 1, seed=1)).exp() @ (3 * drawn(1, 64, seed=2)).exp()
    plain = decompose(weight, form, exact(8), iterations=20)
    left = weight - rounded(plain.quantised, form) - plain.left @ plain.right
    weights = RowColumnWeights.of(fisher, "two-sided")
    weighted = decompose(weight, form, exact(8, weights), iterations=20, fisher=fisher)
    assert weighted.error < 0.5 * float((fisher.sqrt() * left).norm())


# --- the budget


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(20, 160))
def test_the_integer_program_finds_what_trying_all_finds(seed: int, budget: int) -> None:
    generator = np.random.default_rng(seed)
    costs = generator.random((4, 5))
    costs[generator.random((4, 5)) < 0.2] = np.inf
    costs[:, 0] = np.where(np.isinf(costs[:, 0]), 1.0, costs[:, 0])
    sizes = generator.integers(1, 50, (4, 5))
    fitting = [
        sum(costs[row, option] for row, option in enumerate(choice))
        for choice in itertools.product(range(5), repeat=4)
        if sum(sizes[row, option] for row, option in enumerate(choice)) <= budget
    ]
    best = min(fitting, default=np.inf)
    if np.isinf(best):
        with pytest.raises(BudgetTooSmallError):
            allocate(costs, sizes, budget)
        return
    answer = allocate(costs, sizes, budget)
    assert answer.size <= budget
    assert answer.cost == pytest.approx(best, rel=1e-3)
    assert allocate(costs, sizes, budget + 20).cost <= answer.cost * (1 + 1e-3)


# --- a whole base model


@pytest.fixture(scope="module")
def quantised(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quantised") / "model"
    options = QuantisationOptions(**OPTIONS)
    return out, quantise_base(tiny_base, out, options, progress=quiet).to_dict()


def load(folder: Path, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    return BaseFiles("acme/tiny", str(folder)).load(AutoModelForCausalLM, "language model", dtype=dtype, device="cpu")


def test_the_budget_is_kept_and_better_used_than_by_one_format(quantised: Any) -> None:
    folder, report = quantised
    assert 2.5 < report["bits_per_weight"] <= 2.75
    assert report["allocation"]["cost"] < report["allocation"]["cost_of_best_single_format"]
    assert report["relative_error"] < 0.75 * report["relative_error_of_quantising_alone"]
    assert 8 * report["packed_bytes"] == report["bits_per_weight"] * report["weights"]
    assert report["matrices"] == len(report["modules"]) == 14
    assert len({tuple(item["format"]) for item in report["modules"]}) > 1
    assert report["model_bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_the_folder_loads_packed_and_computes_with_q(quantised: Any, tiny_base: Path) -> None:
    folder, report = quantised
    model, original = load(folder), load(tiny_base)
    packed_layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert sorted(packed_layers) == [item["path"] for item in report["modules"]]
    resident = sum(
        buffer.numel() * buffer.element_size() for layer in packed_layers.values() for buffer in layer.buffers()
    )
    assert resident <= 1.05 * report["weights"] * report["bits_per_weight"] / 8
    from safetensors.torch import load_file

    factors = load_file(folder / "start_factors.safetensors")
    dense = load(tiny_base)
    for item in report["modules"]:
        path = item["path"]
        layer, W = packed_layers[path], original.get_submodule(path).weight
        left = W - layer.weight - factors[f"{path}.L1"] @ factors[f"{path}.L2"]
        assert float(left.norm() / W.norm()) == pytest.approx(item["relative_error"], rel=1e-4)
        dense.get_submodule(path).weight.copy_(layer.weight)
    ids = torch.arange(1, 30)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
    half = load(folder, "bfloat16")
    path = next(iter(packed_layers))
    assert torch.equal(half.get_submodule(path).weight, packed_layers[path].weight), "the scales were cast"
    assert half.get_submodule(path).identity() == packed_layers[path].identity()


def test_the_same_again_gives_the_same_bytes(quantised: Any, tiny_base: Path, tmp_path: Path) -> None:
    folder, _ = quantised
    options = QuantisationOptions(**OPTIONS)
    quantise_base(tiny_base, tmp_path / "again", options, progress=quiet)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_it_is_another_base_model_with_the_same_layers(quantised: Any, tiny_base: Path) -> None:
    ref, original = inspect_base(quantised[0]), inspect_base(tiny_base)
    assert ref.fingerprint == original.fingerprint
    assert ref.weights_digest != original.weights_digest
    assert ref.quantisation is not None
    assert original.quantisation is None
    comparison = compare(ref, original)
    assert comparison.level == "shape"
    assert comparison.contradiction is not None


def test_gradients_pass_through_packed_weights(quantised: Any) -> None:
    layer = next(layer for layer in load(quantised[0]).modules() if isinstance(layer, PackedLinear))
    x = drawn(3, layer.in_features).requires_grad_()
    dense = layer.dense()
    ours, theirs = layer(x), nn.functional.linear(x, dense.weight, dense.bias)
    torch.testing.assert_close(ours, theirs)
    g = drawn(*ours.shape, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (ours, theirs)))


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a rank of the whole": ({"rank": 32, "budget_bits": 3, "grid": SMALL}, "/parameters/rank", "above 15"),
    "no whole blocks": ({"rank": 2, "preset": "nf4"}, "/parameters/target_modules", "fits no format"),
    "a budget too small": (
        {"rank": 2, "budget_bits": 2.1, "grid": SMALL},
        "/parameters/budget_bits",
        "smallest budget that these formats allow is 2.1875",
    ),
    "no such layer": ({"rank": 2, "target_modules": ["w_q"]}, "/parameters/target_modules/0", "no linear layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_quantised_is_told(tiny_base: Path, tmp_path: Path, name: str) -> None:
    given_, pointer, words = REFUSED[name]
    with pytest.raises(RequestInvalid) as caught:
        quantise_base(tiny_base, tmp_path / "out", QuantisationOptions(**given_), progress=quiet)
    assert caught.value.errors[0].pointer == pointer
    assert words in caught.value.errors[0].message
    assert not (tmp_path / "out").exists()


def test_what_is_quantised_is_not_quantised_again(quantised: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="quantised already"):
        quantise_base(quantised[0], tmp_path / "out", QuantisationOptions(rank=2), progress=quiet)


def test_weights_that_are_no_numbers_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    options = QuantisationOptions(rank=2, budget_bits=3, grid=SMALL)
    with pytest.raises(RequestInvalid, match=r"layers.1.mlp.up_proj has NaN or infinite weights"):
        quantise_base(tmp_path / "broken", tmp_path / "out", options, progress=quiet)


def test_a_budget_and_a_preset_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        QuantisationOptions(budget_bits=3, preset="nf4")


def test_a_codebook_of_another_version_is_refused(quantised: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(quantised[0], tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["codebook"] = "nf-v2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestInvalid, match="codebook 'nf-v2' is not known"):
        load(folder)


def test_the_fisher_is_the_sum_of_squared_gradients_of_single_rows(tiny_base: Path, tmp_path: Path) -> None:
    from tiny_base import sums, write_rows

    from train.data import DataFile
    from train.quantised.fisher_estimate import estimate_fisher, placed
    from train.settings import EvaluationSettings, TrainingSettings, parse_task
    from train.tasks.catalog import make_task
    from train.tasks.protocol import TaskContext

    context = TaskContext(BaseFiles("acme/tiny", str(tiny_base)), TrainingSettings(steps=1), "cpu", 0, tmp_path)
    task = make_task(parse_task("causal-lm"), context)
    data = DataFile(write_rows(tmp_path / "rows.jsonl", sums()), "jsonl")
    rows = task.read(data, EvaluationSettings(validation_fraction=0.0)).train[:5]
    path = "model.layers.1.mlp.up_proj"
    told: list[float] = []
    model = task.load()
    task.before_training(model)
    found = estimate_fisher(task, model, rows, placed(model, [path]), told.append)[path]
    expected = torch.zeros_like(found)
    whole: Any = task.load()
    weight = whole.get_submodule(path).weight.requires_grad_(True)
    for row in rows:
        batch = task.collate([row])
        (gradient,) = torch.autograd.grad(whole(**batch).loss, weight)
        expected += gradient.square()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)
    assert told == [0, 0.2, 0.4, 0.6, 0.8]
    assert not any(parameter.requires_grad for parameter in model.parameters())
