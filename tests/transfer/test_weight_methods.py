"""The methods that move weights without training: what their algebra promises, and whole transfers on tiny bases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load, load_adapted, write_adapter, write_llama

from artifacts.errors import NotMergeable, TransferRefused
from train.base_files import BaseFiles
from transfer.catalog import find_method, parse_parameters
from transfer.methods import copy, cross_lora, lora_x, prolora
from transfer.options import CopyOptions, CrossLoraOptions, LoraXOptions, ProloraOptions, WeightOptions
from transfer.subspaces import Subspace, SubspaceCache, decompose, similarity
from transfer.weight_protocol import Delta, Pair, Unfit
from transfer.weight_transfer import BaseWeights, WeightReport, move_weights, read_deltas


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def space(weight: torch.Tensor, rank: int) -> Subspace:
    """In float64, signs fixed."""
    found = decompose(weight, rank, "test")
    U, S, V = torch.linalg.svd(weight)[0][:, :rank], found.S.double(), torch.linalg.svd(weight)[2][:rank].T
    signs = torch.sign((U * found.U.double()).sum(0))
    return Subspace(U * signs, S, V * torch.sign((V * found.V.double()).sum(0)))


def pair(source: torch.Tensor, target: torch.Tensor, rank: int, delta: Delta) -> Pair:
    return Pair("layer", delta, tuple(target.shape), space(source, rank), space(target, rank))  # type: ignore[arg-type]


def delta(d_out: int, d_in: int, rank: int = 3) -> Delta:
    return Delta(matrix(d_out, rank), matrix(rank, d_in))


def whole(found: Delta) -> torch.Tensor:
    return found.B @ found.A


def test_the_alignment_of_cross_lora_is_the_target_basis_itself() -> None:
    source, target = space(matrix(20, 16), 6).U, space(matrix(28, 24), 6).U
    aligned = torch.linalg.lstsq(source.T, target.T).solution.T @ source
    assert float((aligned - target).abs().max()) < 1e-14
    # and its eq. 7 is no product when the widths differ
    own = delta(20, 16)
    with pytest.raises(RuntimeError, match="shape"):
        aligned.T @ whole(own)


@pytest.mark.parametrize("sides", [(28, 24), (12, 30), (20, 16)])
def test_cross_lora_carries_the_core_over_at_the_same_rank(sides: tuple[int, int]) -> None:
    own = delta(20, 16)
    made = pair(matrix(20, 16), matrix(*sides), 8, own)
    found = cross_lora.transport(made, CrossLoraOptions())
    assert found.A.shape[0] == 3
    assert whole(found).shape == sides
    assert torch.linalg.matrix_rank(whole(found)) <= 3
    assert made.source is not None
    assert made.target is not None
    core = made.source.U.T @ whole(own) @ made.source.V
    torch.testing.assert_close(whole(found), made.target.U @ core @ made.target.V.T)
    # the rank of the core is the rank that is left
    torch.testing.assert_close(made.target.U.T @ whole(found) @ made.target.V, core)


def test_lora_x_gives_everything_back_in_full_bases_of_a_square_weight() -> None:
    weight, own = matrix(18, 18), delta(18, 18)
    found = lora_x.transport(pair(weight, weight, 18, own), LoraXOptions(minimum_similarity=0.99))
    torch.testing.assert_close(whole(found), whole(own))


def test_lora_x_projects_onto_the_target() -> None:
    own = delta(18, 14)
    made = pair(matrix(18, 14), matrix(18, 14), 5, own)
    found = lora_x.transport(made, LoraXOptions())
    assert made.target is not None
    P, Q = made.target.U @ made.target.U.T, made.target.V @ made.target.V.T
    torch.testing.assert_close(whole(found), P @ whole(own) @ Q)
    with pytest.raises(Unfit, match=r"is below 0\.95"):
        lora_x.transport(made, LoraXOptions(minimum_similarity=0.95))


def test_lora_x_and_cross_lora_agree_where_both_widths_differ() -> None:
    made = pair(matrix(18, 14), matrix(24, 20), 5, delta(18, 14))
    torch.testing.assert_close(
        whole(lora_x.transport(made, LoraXOptions(minimum_similarity=1.0))),
        whole(cross_lora.transport(made, CrossLoraOptions())),
    )


def test_prolora_keeps_what_lies_on_one_side_and_drops_the_cross_terms() -> None:
    weight, own = matrix(40, 36), delta(40, 36)
    made = pair(weight, weight, 18, own)
    found = prolora.transport(made, ProloraOptions())
    assert made.source is not None
    P, Q = made.source.U @ made.source.U.T, made.source.V @ made.source.V.T
    one, other = torch.eye(40, dtype=torch.float64) - P, torch.eye(36, dtype=torch.float64) - Q
    torch.testing.assert_close(whole(found), P @ whole(own) @ Q + one @ whole(own) @ other)
    assert found.A.shape[0] == 6
    kept = found.energy / own.energy
    assert 0.3 < kept < 0.7  # about half of a random ΔW, in a transfer to itself


def test_prolora_needs_equal_widths_and_likeness() -> None:
    with pytest.raises(Unfit, match="widths differ"):
        prolora.transport(pair(matrix(18, 14), matrix(18, 15), 5, delta(18, 14)), ProloraOptions())
    with pytest.raises(Unfit, match="similarity 0"):
        prolora.transport(pair(matrix(18, 14), matrix(18, 14), 5, delta(18, 14)), ProloraOptions())


def test_copy_is_for_equal_shapes() -> None:
    own = delta(6, 5)
    assert copy.transport(Pair("layer", own, (6, 5), None, None), CopyOptions()) is own
    with pytest.raises(Unfit, match="6×5 in the source base, 6×4"):
        copy.transport(Pair("layer", own, (6, 4), None, None), CopyOptions())


def test_signs_are_fixed() -> None:
    weight = matrix(20, 16)
    found, turned = decompose(weight, 6, "a"), decompose(weight, 6, "b")
    for one, other in ((found.U, turned.U), (found.S, turned.S), (found.V, turned.V)):
        torch.testing.assert_close(one, other)
    largest = found.U.abs().argmax(dim=0)
    assert bool((found.U[largest, torch.arange(6)] > 0).all())
    full = decompose(weight, 99, "a")
    torch.testing.assert_close(full.U @ torch.diag(full.S) @ full.V.T, weight.float(), atol=1e-4, rtol=1e-4)
    assert similarity(found, found) == pytest.approx(1.0, abs=1e-5)
    assert similarity(found, decompose(matrix(21, 16), 6, "c")) is None


def test_a_decomposed_weight_is_kept(tmp_path: Path) -> None:
    cache = SubspaceCache(tmp_path, "a" * 64, 4)
    weight = matrix(8, 6).float()
    cache.add("x", weight)
    first = cache.get("x")
    cache.add("x", weight * 2)
    assert torch.equal(cache.get("x").S, first.S)
    assert not SubspaceCache(tmp_path, "b" * 64, 4).has("x")
    assert not SubspaceCache(tmp_path, "a" * 64, 5).has("x")
    assert [path.suffix for path in (tmp_path / ("a" * 32)).iterdir()] == [".safetensors"]


def test_energy_needs_no_matrix() -> None:
    own = delta(9, 7)
    assert own.energy == pytest.approx(float(whole(own).square().sum()))


def move(
    method: str, adapter: Path, source: Path, target: Path, folder: Path, **parameters: Any
) -> tuple[WeightReport, Path]:
    row, options = find_method(method), parse_parameters(method, parameters)
    assert isinstance(options, WeightOptions)
    one, other = (BaseWeights(BaseFiles(path.name, str(path)), f"{path.name:0<40}") for path in (source, target))
    output = folder / f"{method}-out"
    return move_weights(row.load(), options, adapter, one, other, folder / "cache", output), output


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same shape as `llama` with other weights."""
    return write_llama(tmp_path_factory.mktemp("continued"), seed=9)


def logits(base: Path, *adapters: Path) -> torch.Tensor:
    model, tokenizer = load_adapted(base, *adapters) if adapters else load(base)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([tokenizer("Please ship 4")["input_ids"]])).logits
    return found


def test_copying_onto_the_same_base_changes_nothing(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    report, output = move("copy", llama_adapter, llama, llama, tmp_path)
    torch.testing.assert_close(logits(llama, output), logits(llama, llama_adapter), atol=1e-5, rtol=1e-5)
    assert len(report.moved) == 4
    assert report.to_dict()["mean_energy_kept"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["lora-x", "prolora", "cross-lora"])
def test_a_full_basis_of_the_same_base_gives_the_adapter_back(
    method: str, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    """q_proj is square; of v_proj (16×32) the inputs have directions that no singular vector of full rank spans."""
    report, output = move(method, llama_adapter, llama, llama, tmp_path)
    before, after = read_deltas(llama_adapter), read_deltas(output)
    for path, own in before.items():
        if path.endswith("q_proj"):
            torch.testing.assert_close(whole(after[path]), whole(own), atol=1e-4, rtol=1e-3)
        else:
            assert after[path].energy < own.energy
    assert report.to_dict()["mean_similarity"] == pytest.approx(1.0, abs=1e-4)


def test_another_family_gets_what_has_a_namesake(llama: Path, gemma: Path, llama_adapter: Path, tmp_path: Path) -> None:
    report, output = move("cross-lora", llama_adapter, llama, gemma, tmp_path, basis_rank=12)
    assert len(report.moved) == 4
    difference = float((logits(gemma, output) - logits(gemma)).abs().max())
    assert 0 < difference < 100
    with pytest.raises(TransferRefused, match="4 of the adapter's 4 modules") as refused:
        move("prolora", llama_adapter, llama, gemma, tmp_path)
    assert refused.value.errors[0].message == "the widths differ"
    with pytest.raises(TransferRefused, match="32×32 in the source base, 64×40"):
        move("copy", llama_adapter, llama, gemma, tmp_path)


def test_layers_that_the_target_lacks_are_told(llama: Path, tmp_path: Path) -> None:
    short = write_llama(tmp_path / "short", layers=1)
    adapter = write_adapter(llama, tmp_path / "adapter", seed=4)
    report, output = move("lora-x", adapter, llama, short, tmp_path)
    assert sorted(report.left_out) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert report.to_dict()["left_out_modules"] == 2
    assert sorted(read_deltas(output)) == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    with pytest.raises(TransferRefused, match="has no such layer"):
        move("lora-x", adapter, llama, short, tmp_path, partial=False)


def test_independent_weights_are_unlike(llama: Path, continued: Path, llama_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferRefused, match="similarity 0"):
        move("prolora", llama_adapter, llama, continued, tmp_path, basis_rank=8)
    report, _ = move("prolora", llama_adapter, llama, continued, tmp_path, basis_rank=8, minimum_similarity=0.0)
    assert {module.rank for module in report.moved} == {8}
    assert all(module.similarity is not None and module.similarity < 0.8 for module in report.moved)


def test_an_adapter_that_is_no_plain_lora_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(NotMergeable, match="use_dora"):
        read_deltas(write_adapter(llama, tmp_path / "adapter", use_dora=True))


def test_pairs_are_values() -> None:
    made = Pair("layer", delta(4, 4), (4, 4), None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.path = "other"  # type: ignore[misc]
