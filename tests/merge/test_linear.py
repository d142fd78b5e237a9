"""Task arithmetic on deltas: exact by default, truncated on request, and biases summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.adapter import Adapter
from artifacts.base_model import BaseModelRef
from merge.catalog import parse_parameters
from merge.engine import merge_files, shared_rank
from merge.methods import linear

PATH = "layers.0.proj"
Write = Callable[..., Path]


def factors(seed: int, r: int = 3, d_in: int = 40, d_out: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


def test_it_has_no_cross_terms(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    sources = [write_adapter(f"a{i}", {PATH: factors(i)}) for i in range(2)]
    result, report = merge(sources, "linear", weights=[1.0, 0.5], scale=0.8)
    exact = 0.8 * (dense_delta(sources[0], PATH) + 0.5 * dense_delta(sources[1], PATH))
    torch.testing.assert_close(result[PATH], exact, rtol=1e-5, atol=1e-5)
    assert report.rank == 6
    A, B = ([factors(i)[side].double() for i in range(2)] for side in (0, 1))
    by_factors = (B[0] + 0.5**0.5 * B[1]) @ (A[0] + 0.5**0.5 * A[1]) * 0.8
    assert float((by_factors - exact).norm() / exact.norm()) > 0.3


def test_a_rank_truncates_like_svd(write_adapter: Write, merge: Any) -> None:
    sources = [write_adapter(f"a{i}", {PATH: factors(i)}) for i in range(2)]
    linear, report = merge(sources, "linear", rank=4)
    svd, _ = merge(sources, "svd", rank=4)
    assert report.rank == 4
    torch.testing.assert_close(linear[PATH], svd[PATH])


def test_biases_of_lora_b_are_summed(write_adapter: Write, merge: Any, tmp_path: Path) -> None:
    sources = []
    for i, alpha in enumerate((6.0, 1.5)):
        source = write_adapter(f"b{i}", {PATH: factors(i)}, lora_alpha=alpha, lora_bias=True)
        weights = source / "adapter_model.safetensors"
        bias = {f"base_model.model.{PATH}.lora_B.bias": torch.full((24,), 1.0 + i)}
        save_file({**load_file(weights), **bias}, weights)
        sources.append(source)
    for method in ("linear", "cat"):
        merge(sources, method, weights=[1.0, -2.0])
    for out in (tmp_path / "merged-1", tmp_path / "merged-2"):
        bias = load_file(out / "adapter_model.safetensors")[f"base_model.model.{PATH}.lora_B.bias"]
        # scalings 6/3 and 1.5/3, weights 1 and −2, biases 1 and 2
        torch.testing.assert_close(bias, torch.full((24,), 2.0 * 1 - 2 * 0.5 * 2))


def ffa_adapters(write_adapter: Write, modules: Sequence[str], **config: Any) -> list[Path]:
    """Three adapters with the same lora_A, as the runs of one FFA-LoRA family have."""
    shared = {path: factors(90 + number)[0] for number, path in enumerate(modules)}
    return [
        write_adapter(
            f"f{i}", {path: (shared[path], factors(i * 7 + n)[1]) for n, path in enumerate(modules)}, **config
        )
        for i in range(3)
    ]


def test_adapters_that_share_lora_a_keep_it_and_their_rank(
    write_adapter: Write, merge: Any, dense_delta: Any, tmp_path: Path
) -> None:
    """arXiv:2403.12313: ΔW is linear in lora_B, so the average of those is exact."""
    modules = ("layers.0.proj", "layers.1.proj")
    sources = ffa_adapters(write_adapter, modules)
    weights = [0.5, 0.75, -0.25]
    result, report = merge(sources, "linear", weights=weights)
    assert report.rank == 3
    for path in modules:
        exact = sum(w * dense_delta(source, path) for w, source in zip(weights, sources, strict=True))
        torch.testing.assert_close(result[path], exact, rtol=1e-5, atol=1e-5)
    written = load_file(tmp_path / "merged-1" / "adapter_model.safetensors")
    given = [load_file(source / "adapter_model.safetensors") for source in sources]
    for path in modules:
        name = f"base_model.model.{path}.lora_{{}}.weight"
        A, B = name.format("A"), name.format("B")
        # every row is there, bit for bit
        order = [int((written[A] == row).all(dim=1).nonzero()) for row in given[0][A]]
        mean = sum(w * file[B].double() for w, file in zip(weights, given, strict=True))
        torch.testing.assert_close(written[B][:, order].double(), mean, rtol=1e-6, atol=1e-6)
    assert [module.figures for module in report.modules] == [{"shared_lora_A": 1.0}] * 2
    assert report.totals()["relative_error"] < 1e-6
    assert report.to_dict()["total"]["figures"] == {"shared_lora_A": 1.0}
    at_rank, _ = merge(sources, "linear", weights=weights, rank=3)
    torch.testing.assert_close(at_rank[modules[0]], result[modules[0]])
    _, report = merge(sources, "linear", weights=weights, rank=2)
    assert report.totals()["relative_error"] > 0.01


def test_only_equal_bits_are_taken_for_the_same_lora_a(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    A = factors(50)[0]
    almost = A.clone()
    almost[0, 0] = torch.nextafter(almost[0, 0], torch.tensor(9.0))
    one = write_adapter("one", {PATH: (A, factors(1)[1])})
    two = write_adapter("two", {PATH: (almost, factors(2)[1])})
    scaled = write_adapter("scaled", {PATH: (A, factors(2)[1])}, lora_alpha=6.0)
    for other, rank, shared in ((two, 6, 2 / 3), (scaled, 6, None)):
        result, report = merge([one, other], "linear")
        exact = dense_delta(one, PATH) + dense_delta(other, PATH)
        assert report.rank == rank
        assert report.modules[0].figures.get("shared_lora_A") == (None if shared is None else pytest.approx(shared))
        torch.testing.assert_close(result[PATH], exact, rtol=1e-5, atol=1e-5)
    half = write_adapter("half", {PATH: (A, factors(3)[1]), "layers.1.proj": factors(4)})
    both = write_adapter("both", {PATH: (A, factors(5)[1]), "layers.1.proj": factors(6)})
    result, report = merge([half, both], "linear")
    assert report.rank == 6  # one module shares it, the other does not
    assert [(m.rank, m.padded, m.figures.get("shared_lora_A")) for m in report.modules] == [(3, 3, 1.0), (6, 0, None)]


def test_scaled_deltas_of_a_shared_lora_a_are_still_exact(write_adapter: Write, merge: Any) -> None:
    sources = ffa_adapters(write_adapter, [PATH])
    _, report = merge(sources, "linear", norm_equalize="adapter")
    assert report.rank == 9
    assert report.totals()["relative_error"] < 1e-6


def test_the_sign_of_a_scaling_does_not_matter_to_a_shared_lora_a(stack_of: Any) -> None:
    """Files with an alpha of their own for every module may have a negative one; its sign is folded into lora_B."""
    A, B, other = factors(1)[0], factors(2)[1], factors(3)[1]
    scalings = (2.0, -2.0)
    merged = linear.merge(stack_of([(A, B, 2.0), (A, other, -2.0)]), parse_parameters("linear", {}), 3)
    assert merged.A.shape == A.shape
    torch.testing.assert_close(merged.B @ merged.A, 2.0 * (B - other) @ A, rtol=1e-5, atol=1e-5)
    module = SimpleNamespace(path=PATH, rank=3)
    plan: Any = SimpleNamespace(modules=[SimpleNamespace(owners=[(0, module), (1, module)])])
    adapters: Any = {
        number: SimpleNamespace(factors=lambda _, s=s: SimpleNamespace(A=A, scaling=s))
        for number, s in enumerate(scalings)
    }
    assert shared_rank(plan, adapters) == 3


@pytest.mark.parametrize(
    ("known", "named"), [("acme/tiny", "acme/tiny"), ("/mnt/tiny", "/srv/models/tiny"), ("unknown", "/srv/models/tiny")]
)
def test_the_merged_adapter_calls_its_base_by_the_best_name_that_is_known(
    write_adapter: Write, as_input: Any, tmp_path: Path, known: str, named: str
) -> None:
    sources = [write_adapter(f"a{i}", {PATH: factors(i)}, base_model_name_or_path="/srv/models/tiny") for i in (0, 1)]
    inputs = [as_input(source, base=BaseModelRef.named(known)) for source in sources]
    merge_files(inputs, "linear", parse_parameters("linear", {}), tmp_path / "out")
    assert Adapter.open(tmp_path / "out").config.base_model == named
