"""A merge from files to a file: what stock PEFT makes of it, kinds of modules, precision, and what goes wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import DiskFull, MergeRefused, ReloadMismatch
from artifacts.export import PeftWriter
from artifacts.intake import inspect
from artifacts.layout import LINEAGE_KEY
from merge.catalog import METHODS, parse_parameters
from merge.comparison import Candidate, compare_files
from merge.engine import merge_files
from merge.plan import MergeInput
from merge.reload import TOLERANCE, Probe, check_reload

PATH = "layers.0.proj"
Write = Callable[..., Path]


def factors(seed: int, r: int = 4, d_in: int = 24, d_out: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


class Base(nn.Module):
    """One layer of each kind that an adapter can target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 5, (3, 2), padding=1)
        self.proj = nn.Linear(8, 7)

    def forward(self, ids: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embed(ids), self.conv(image), self.proj(x)


def peft_adapter(base: nn.Module, directory: Path, seed: int, **config: Any) -> Path:
    """An adapter with random factors, made and saved by stock PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["embed", "conv", "proj"]
    settings: dict[str, Any] = {"r": 2, "target_modules": targets, "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, LoraConfig(**settings))
    model.save_pretrained(directory, save_embedding_layers=False)
    # PEFT writes a flag about initialisation that says nothing about the trained factors.
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    model.unload()
    return directory


@pytest.mark.parametrize("method", sorted(METHODS))
def test_stock_peft_computes_base_plus_delta(method: str, tmp_path: Path, as_input: Any) -> None:
    """Linear, convolution and embedding; two ranks, one of them rank-stabilised."""
    from peft import PeftModel

    torch.manual_seed(0)
    base = Base()
    first = peft_adapter(base, tmp_path / "first", 1, lora_alpha=3)
    second = peft_adapter(base, tmp_path / "second", 2, r=3, lora_alpha=2, use_rslora=True)
    inputs = [as_input(first, 1.0), as_input(second, 0.7)]
    options = parse_parameters(method, {"output_dtype": "float32"})
    merge_files(inputs, method, options, tmp_path / "out")
    merged = Adapter.open(tmp_path / "out")
    deltas = {path: merged[path].scaling * merged[path].B @ merged[path].A for path in merged}
    if METHODS[method].capabilities.exact_sum:
        sources = [(Adapter.open(first), 1.0), (Adapter.open(second), 0.7)]
        for path, delta in deltas.items():
            exact = sum(w * a[path].scaling * a[path].B @ a[path].A for a, w in sources)
            torch.testing.assert_close(delta, exact, rtol=1e-5, atol=1e-5)

    batch = torch.tensor([[1, 4, 10]]), torch.randn(2, 3, 9, 9), torch.randn(4, 8)
    with torch.no_grad():
        plain = base(*batch)
        expected = (
            plain[0] + deltas["embed"].T[batch[0]],
            plain[1] + nn.functional.conv2d(batch[1], deltas["conv"].view(5, 3, 3, 2), padding=1),
            plain[2] + batch[2] @ deltas["proj"].T,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base, tmp_path / "out")
        for result, wanted in zip(model(*batch), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


class TestThePrecisionOfTheOutput:
    @pytest.mark.parametrize(
        ("asked", "expected"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("auto", "BF16")]
    )
    def test_is_what_was_asked(self, asked: str, expected: str, write_adapter: Write, merge: Any) -> None:
        A, B = factors(1)
        sources = [
            write_adapter("half", {PATH: (A.bfloat16(), B.bfloat16())}),
            write_adapter("full", {PATH: factors(2)}),
        ]
        _, report = merge(sources, "cat", output_dtype=asked)
        assert report.dtype == expected
        assert (report.rounding_error > 0) == (expected != "F32")
        assert report.rounding_error < 0.01

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.float64, "F32"),
            (torch.float32, "F32"),
            (torch.float16, "F16"),
            (torch.bfloat16, "BF16"),
            (torch.float8_e4m3fn, "BF16"),
        ],
    )
    def test_is_that_of_the_first_where_it_holds_the_values(
        self, dtype: torch.dtype, expected: str, write_adapter: Write, merge: Any
    ) -> None:
        A, B = factors(1)
        sources = [write_adapter("one", {PATH: (A.to(dtype), B.to(dtype))}), write_adapter("two", {PATH: factors(2)})]
        assert merge(sources, "cat", output_dtype="auto")[1].dtype == expected

    @pytest.mark.parametrize("method", ["cat", "linear", "lego"])
    @pytest.mark.parametrize("dtypes", [("float8_e4m3fn", "float32"), ("bfloat16", "float8_e5m2", "float8_e4m3fn")])
    def test_of_the_inputs_may_differ(
        self, dtypes: tuple[str, ...], method: str, write_adapter: Write, merge: Any, dense_delta: Any
    ) -> None:
        pairs = [tuple(factor.to(getattr(torch, name)) for factor in factors(1)) for name in dtypes]
        sources = [write_adapter(f"a{i}", {PATH: pair}) for i, pair in enumerate(pairs)]
        result, report = merge(sources, method, **({"rank": 4 * len(dtypes)} if method == "lego" else {}))
        exact = torch.stack([B.double() @ A.double() for A, B in pairs]).sum(0)
        # as many clusters as components: each is one, but for the gain of the output
        gain = len(dtypes) ** -0.5 if method == "lego" else 1.0
        torch.testing.assert_close(result[PATH], exact * gain, rtol=1e-5, atol=1e-5)
        assert report.rank == 4 * len(dtypes)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
    def test_a_shared_lora_a_may_be_stored_otherwise(
        self, dtype: torch.dtype, write_adapter: Write, merge: Any
    ) -> None:
        A = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
        sources = [
            write_adapter("one", {PATH: (A.to(dtype), torch.ones(3, 1).to(dtype))}),
            write_adapter("two", {PATH: (A, torch.ones(3, 1))}),
            write_adapter("other", {PATH: (A + 1e-4, torch.ones(3, 1))}),
        ]
        assert merge(sources[:2], "linear")[1].rank == 1
        assert merge(sources, "linear")[1].rank == 3

    def test_float64_on_request(self, write_adapter: Write, merge: Any, dense_delta: Any) -> None:
        sources = [write_adapter(f"a{i}", {PATH: factors(i)}) for i in range(2)]
        double, _ = merge(sources, "svd", rank=8, compute_dtype="float64")
        exact = dense_delta(sources[0], PATH) + dense_delta(sources[1], PATH)
        torch.testing.assert_close(double[PATH], exact, rtol=1e-6, atol=1e-6)

    def test_an_overflow_is_an_error_not_an_infinity(self, write_adapter: Write, merge: Any, tmp_path: Path) -> None:
        A, B = factors(1)
        source = write_adapter("large", {PATH: (A * 1e6, B)})
        with pytest.raises(ReloadMismatch, match="differs by"):
            merge([source], "cat", output_dtype="float16")


class TestTheFile:
    def test_lineage_and_configuration_are_inside(self, write_adapter: Write, as_input: Any, tmp_path: Path) -> None:
        sources = [write_adapter(f"a{i}", {PATH: factors(i)}, use_rslora=True, task_type="CAUSAL_LM") for i in range(2)]
        lineage = {"method": "cat", "note": "ä"}
        options = parse_parameters("cat", {})
        merge_files([as_input(s) for s in sources], "cat", options, tmp_path / "out", lineage=lineage)
        with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata[LINEAGE_KEY]) == lineage
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert json.loads(metadata["lora_adapter_metadata"]) == config
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
        assert config["task_type"] == "CAUSAL_LM"
        assert config["target_modules"] == ["proj"]
        alone = tmp_path / "alone.safetensors"
        alone.write_bytes((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
        assert Adapter.open(alone)[PATH].rank == 8

    @pytest.mark.parametrize(
        "condition",
        [
            {"layers_to_transform": [1]},
            {"layers_to_transform": [1], "layers_pattern": "layers"},
            {"exclude_modules": ["other"]},
            {"target_modules": r".*\.1\.proj"},
            {"target_modules": ["proj", "absent"]},
        ],
    )
    def test_conditions_on_layers_become_full_paths(
        self, condition: dict[str, Any], write_adapter: Write, merge: Any, tmp_path: Path
    ) -> None:
        plain = write_adapter("plain", {"model.layers.1.proj": factors(2)})
        one = write_adapter("one", {"model.layers.1.proj": factors(1)}, **condition)
        for number, sources in enumerate(([one], [plain, one], [plain]), start=1):
            merge(sources, "cat")
            config = json.loads((tmp_path / f"merged-{number}" / "adapter_config.json").read_text())
            assert config["target_modules"] == (["model.layers.1.proj"] if one in sources else ["proj"])
            assert config["layers_to_transform"] is None

    def test_the_base_model_is_that_of_the_first_that_takes_part(
        self, write_adapter: Write, as_input: Any, tmp_path: Path
    ) -> None:
        told = {"revision": "v1", "fan_in_fan_out": False, "base_model_name_or_path": "acme/base"}
        sources = [
            as_input(write_adapter("none", {PATH: factors(0)}, revision="v0"), 0.0),
            as_input(write_adapter("first", {PATH: factors(1)}, **told), 2.0),
            as_input(write_adapter("second", {PATH: factors(2)}, fan_in_fan_out=True), 1.0),
        ]
        report = merge_files(sources, "cat", parse_parameters("cat", {"normalize": True}), tmp_path / "out").to_dict()
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["revision"], config["fan_in_fan_out"]) == ("v1", True)
        assert config["base_model_name_or_path"] == "acme/base"
        assert report["adapters"] == [
            {"id": name, "name": name, "weight": weight, "effective_weight": pytest.approx(weight / 3)}
            for name, weight in (("none", 0.0), ("first", 2.0), ("second", 1.0))
        ]

    def test_dropped_modules_are_not_targeted(self, write_adapter: Write, merge: Any, tmp_path: Path) -> None:
        one = write_adapter("one", {"a.proj": factors(1), "b.proj": factors(2)})
        two = write_adapter("two", {"a.proj": factors(3)})
        _, report = merge([one, two], "cat", missing_modules="intersection")
        assert report.to_dict()["dropped_modules"] == ["b.proj"]
        config = json.loads((tmp_path / "merged-1" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["a.proj"]


class TestWhatGoesWrong:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_non_finite_numbers_name_module_and_adapter(
        self, value: float, method: str, write_adapter: Write, merge: Any, tmp_path: Path
    ) -> None:
        A, B = factors(1)
        A[2, 3] = value
        sources = [write_adapter("fine", {PATH: factors(2)}), write_adapter("bad", {PATH: (A, B)})]
        with pytest.raises(MergeRefused, match=r"layers.0.proj holds NaN .* positions \[1\]"):
            merge(sources, method)
        assert not list((tmp_path / "merged-1").iterdir())

    def test_a_cancelled_merge_leaves_no_file(self, write_adapter: Write, as_input: Any, tmp_path: Path) -> None:
        class CancelError(Exception):
            pass

        def stop(fraction: float, message: str) -> None:
            raise CancelError

        source = write_adapter("one", {f"layers.{i}.proj": factors(i) for i in range(5)})
        with pytest.raises(CancelError):
            merge_files([as_input(source)], "cat", parse_parameters("cat", {}), tmp_path / "out", progress=stop)
        assert not list((tmp_path / "out").iterdir())

    def test_a_full_disk_is_named(
        self, write_adapter: Write, merge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import errno
        import os

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFull, match=r"adapter_model.safetensors"):
            merge([write_adapter("one", {PATH: factors(1)})], "cat")
        assert not list((tmp_path / "merged-1").iterdir())

    def test_the_reload_check_sees_a_changed_tensor(self, write_adapter: Write) -> None:
        A, B = factors(1)
        directory = write_adapter("one", {PATH: (A, B)})
        probe = Probe.of(PATH, A, B, A, B)
        rounding, difference = check_reload(directory, [probe], lambda: None)
        assert rounding == 0.0
        assert difference < 1e-6
        weights = directory / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors[f"base_model.model.{PATH}.lora_B.weight"] *= 1.001
        save_file(tensors, weights)
        with pytest.raises(ReloadMismatch, match="differs by"):
            check_reload(directory, [probe], lambda: None)
        with pytest.raises(ReloadMismatch, match="does not hold"):
            check_reload(directory, [Probe.of("elsewhere", A, B, A, B)], lambda: None)

    def test_the_reload_check_forgives_rounding_of_large_terms_that_cancel(self, write_adapter: Write) -> None:
        """In float32, as of PiSSA: nothing of ΔW is more exact than the terms whose difference it is."""
        A, B = factors(1)
        near = B + 1e-5 * torch.randn(B.shape, generator=torch.Generator().manual_seed(2))
        both_A, both_B = torch.cat([A, A]), torch.cat([near, -B], dim=1)
        directory = write_adapter("one", {PATH: (both_A, both_B)}, r=both_A.shape[0], lora_alpha=both_A.shape[0])
        order = torch.randperm(both_A.shape[0], generator=torch.Generator().manual_seed(3))
        other_A, other_B = both_A[order].contiguous(), both_B[:, order].contiguous()
        _, difference = check_reload(directory, [Probe.of(PATH, other_A, other_B, other_A, other_B)], lambda: None)
        assert difference > TOLERANCE

    def test_the_engine_really_reloads(self, write_adapter: Write, merge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A writer that stores the wrong thing is found out."""
        original = PeftWriter.write

        def wrong(self: Any, path: str, A: Tensor, B: Tensor, bias: Tensor | None = None) -> None:
            original(self, path, A, B.flip(0), bias)

        monkeypatch.setattr("merge.engine.PeftWriter.write", wrong)
        with pytest.raises(ReloadMismatch):
            merge([write_adapter("one", {PATH: factors(1)})], "cat")


def test_progress_goes_up_to_one(write_adapter: Write, as_input: Any, tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    source = write_adapter("one", {f"layers.{i}.proj": factors(i) for i in range(6)})
    options = parse_parameters("lego", {})
    merge_files(
        [as_input(source)], "lego", options, tmp_path / "out", progress=lambda part, told: seen.append((part, told))
    )
    modules = [(pytest.approx(0.95 * n / 6), f"Merged {n} of 6 modules") for n in range(1, 7)]
    assert seen == [*modules, (0.95, "Reading back"), (1.0, "Merged")]


def test_progress_of_a_comparison(write_adapter: Write, as_input: Any, tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    source = write_adapter("one", {f"layers.{i}.proj": factors(i) for i in range(3)})
    both = [Candidate(label, "svd", parse_parameters("svd", {"rank": rank})) for label, rank in (("a", 1), ("b", 2))]
    compare_files([as_input(source)], both, tmp_path / "out", progress=lambda part, told: seen.append((part, told)))
    assert seen == [
        *((pytest.approx(0.95 * n / 3), f"Merged {n} of 3 modules 2 times") for n in range(1, 4)),
        (0.95, "Reading back a"),
        (pytest.approx(0.975), "Reading back b"),
        (1.0, "Compared"),
    ]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_check_sees_the_plan_before_anything_is_written(
    method: str, write_adapter: Write, as_input: Any, tmp_path: Path
) -> None:
    source = as_input(write_adapter("one", {PATH: factors(1)}))
    options = parse_parameters(method, {})

    def refuse(plan: Any) -> None:
        raise MergeRefused(f"rank {plan.output_rank}")

    with pytest.raises(MergeRefused, match="rank 4"):
        merge_files([source], method, options, tmp_path / "out", check=refuse)
    with pytest.raises(MergeRefused, match="rank 4"):
        compare_files([source], [Candidate("a", method, options)], tmp_path / "out", check=refuse)
    assert not (tmp_path / "out").exists()


def test_the_report_is_json(write_adapter: Write, merge: Any) -> None:
    sources = [
        write_adapter(f"a{i}", {PATH: factors(i), "zero": (factors(i)[0], torch.zeros(16, 4))}) for i in range(2)
    ]
    _, report = merge(sources, "lego", rank=4)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["reload_check"]["passed"] is True
    zero = next(module for module in document["modules"] if module["path"] == "zero")
    assert zero["energy_kept"] is None
    assert any(warning.startswith("zero_delta") for warning in document["warnings"])
    assert document["total"]["interference"][0][0] == 1.0


def test_what_peft_would_not_load_of_an_adapter_is_told_in_the_report(
    tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    factors = {path: (torch.ones(2, 6), torch.ones(8, 2)) for path in ("layers.0.q_proj", "layers.0.o_proj")}
    sources = [write_adapter("one", factors, target_modules=["q_proj"]), write_adapter("two", factors)]
    inputs = [(MergeInput.of(inspect(path), path.name, path.name, None), path) for path in sources]
    report = merge_files(inputs, "cat", parse_parameters("cat", {}), tmp_path / "out").to_dict()
    (told,) = (text for text in report["warnings"] if text.startswith("not_selected"))
    assert told.startswith("not_selected: adapter 'one': 1 modules are not selected by target_modules")
    assert "'layers.0.o_proj'" in told
