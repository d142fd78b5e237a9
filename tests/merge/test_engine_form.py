"""Adapters in the form of an engine: the same ΔW, and what is said before the work is what holds after it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.adapter import Adapter
from artifacts.compatibility import VLLM_RANKS, Engine, findings, loads
from artifacts.engine_outlook import parse_engine
from artifacts.errors import RequestInvalid
from artifacts.intake import inspect
from merge.catalog import parse_parameters
from merge.comparison import Candidate, compare_files
from merge.engine import merge_files
from merge.engine_form import _merged, check_merged, fit_engine
from merge.options import CatOptions
from merge.plan import MergeInput, at_least_rank, plan_merge

ENGINES: tuple[Engine, ...] = get_args(Engine)
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def factors(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, 12, generator=generator).to(dtype),
        torch.randn(10, rank, generator=generator).to(dtype),
    )


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    adapter = Adapter.open(directory)
    return {path: adapter[path].scaling * adapter[path].B.double() @ adapter[path].A.double() for path in adapter}


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        ("vllm", {"rank_pattern": {"v_proj": 2}, "lora_alpha": 3}),
        ("vllm", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 0.5}}),
        ("llama.cpp", {"rank_pattern": {"v_proj": 2}, "use_rslora": True}),
    ],
)
def test_ranks_and_scalings_become_one_and_the_delta_stays(
    write_adapter: Any, tmp_path: Path, engine: Engine, config: dict[str, Any]
) -> None:
    directory = write_adapter("uneven", {Q: factors(5, 1), V: factors(2, 2)}, **config)
    (directory / "README.md").write_text("# mine")
    assert not loads(findings(inspect(directory), engine)) or engine == "vllm"
    fitted, told = fit_engine(directory, engine, tmp_path / "fitted")
    assert fitted == tmp_path / "fitted"
    manifest = inspect(fitted)
    assert {(module.rank, module.scaling) for module in manifest.modules} == {(5, 1.0)}
    assert told["loads"]
    assert "multiplied into the factors" in told["adapted"][0]
    assert "1 of 2 modules are filled up to rank 5" in told["adapted"][1]
    assert [item["rule"] for item in told["findings"]] == (["llama-cpp-gguf"] if engine == "llama.cpp" else [])
    before, after = deltas(directory), deltas(fitted)
    assert before.keys() == after.keys()
    for path, delta in before.items():
        torch.testing.assert_close(after[path], delta, rtol=0, atol=1e-5)
    assert (fitted / "README.md").read_text() == "# mine"


def test_what_rounding_costs_is_told(write_adapter: Any, tmp_path: Path) -> None:
    halves = {path: factors(4, seed, torch.bfloat16) for path, seed in ((Q, 1), (V, 2))}
    directory = write_adapter("half", halves, lora_alpha=4, alpha_pattern={"q_proj": 3.3})
    fitted, told = fit_engine(directory, "vllm", tmp_path / "fitted")
    change = float(told["adapted"][0].split("rounding changed ΔW by ")[1].split(" ")[0])
    assert 1e-4 < change < 1e-2
    before, after = deltas(directory)[Q], deltas(fitted)[Q]
    assert 1e-4 < float((after - before).norm() / before.norm()) < 1e-2


def test_what_needs_nothing_is_left_as_it_is(write_adapter: Any, tmp_path: Path) -> None:
    plain = write_adapter("plain", {Q: factors(4, 1), V: factors(4, 2)}, lora_alpha=7)
    for engine in ("vllm", "peft", "llama.cpp"):
        directory, told = fit_engine(plain, engine, tmp_path / "other")
        assert directory == plain
        assert (told["loads"], told["adapted"]) == (True, [])
    saved = write_adapter("saved", {Q: factors(4, 1)}, modules_to_save=["score"], rank_pattern={"q_proj": 4})
    directory, told = fit_engine(saved, "vllm", tmp_path / "other")
    assert directory == saved
    assert (told["loads"], told["adapted"]) == (False, [])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["language", "biased", "large", "unet"])
def test_the_outlook_of_a_merge_is_what_its_file_shows(
    write_adapter: Any, tmp_path: Path, engine: Engine, kind: str
) -> None:
    rank = {"large": VLLM_RANKS[-1] // 2 + 1}.get(kind, 3)
    path = Q if kind != "unet" else "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    taken = []
    for number in (0, 1):
        directory = write_adapter(f"input-{number}", {path: factors(rank, number)}, lora_bias=kind == "biased")
        if kind == "biased":
            A, B = factors(rank, number)
            names = {"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": torch.ones(10)}
            tensors = {f"base_model.model.{path}.{name}": tensor for name, tensor in names.items()}
            save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        taken.append((MergeInput.of(inspect(directory), str(number), "x", None), directory))
    plan = plan_merge([item for item, _ in taken], "cat", CatOptions())
    merge_files(taken, "cat", CatOptions(), tmp_path / "merged")
    found = findings(inspect(tmp_path / "merged"), engine)
    if loads(found):
        check_merged(plan, engine)
        return
    with pytest.raises(RequestInvalid) as caught:
        check_merged(plan, engine)
    refusing = [item for item in found if item.level != "needs"]
    assert len(caught.value.errors) == len(refusing)
    for item, error in zip(refusing, caught.value.errors, strict=True):
        assert item.rule in error.message
        assert item.source in error.message


@pytest.mark.parametrize("kind", ["linear", "biased", "convolution"])
def test_a_planned_module_is_the_one_that_is_written(write_adapter: Any, tmp_path: Path, kind: str) -> None:
    taken = []
    for number, rank in enumerate((3, 2)):
        A, B = factors(rank, number)
        if kind == "convolution":
            A, B = A.reshape(rank, 3, 2, 2), B[:, :, None, None]
        directory = write_adapter(f"input-{number}", {Q: (A, B)}, lora_bias=kind == "biased")
        if kind == "biased":
            weights = directory / "adapter_model.safetensors"
            bias = {f"base_model.model.{Q}.lora_B.bias": torch.ones(10)}
            save_file({**load_file(weights), **bias}, weights, metadata={"format": "pt"})
        taken.append((MergeInput.of(inspect(directory), str(number), "x", None), directory))
    plan = plan_merge([item for item, _ in taken], "cat", CatOptions())
    merge_files(taken, "cat", CatOptions(), tmp_path / "merged")
    (written,) = inspect(tmp_path / "merged").modules
    (item,) = plan.modules
    planned = _merged(item.first, plan.output_rank, with_bias=kind == "biased")
    keys = {name: getattr(written, name) for name in ("a_key", "b_key", "bias_key")}
    assert replace(planned, **keys) == written
    assert (planned.bias_key is None) is (written.bias_key is None) is (kind != "biased")


@pytest.mark.parametrize("shared", [True, False])
def test_what_only_the_factors_tell_is_refused_before_the_work(
    write_adapter: Any, tmp_path: Path, shared: bool
) -> None:
    """Adapters that share lora_A, as those of FFA-LoRA do, are summed at their own rank; their headers do not tell."""
    rank = VLLM_RANKS[-1] // 2 + 1
    taken = []
    for number in (0, 1):
        A, B = factors(rank, 0 if shared else number)[0], factors(rank, number + 2)[1]
        directory = write_adapter(f"input-{number}", {Q: (A, B)})
        taken.append((MergeInput.of(inspect(directory), str(number), "x", None), directory))
    options = parse_parameters("linear", {})
    plan = plan_merge([item for item, _ in taken], "linear", options)
    assert plan.output_rank == 2 * rank
    check_merged(at_least_rank(plan, options), "vllm")  # it may be loaded
    check = partial(check_merged, engine="vllm")
    out = tmp_path / "merged"
    if shared:
        assert merge_files(taken, "linear", options, out, check=check).rank == rank
        assert loads(findings(inspect(out), "vllm"))
        return
    candidate = Candidate("linear", "linear", options)
    for merge in (
        lambda: merge_files(taken, "linear", options, out, check=check),
        lambda: compare_files(taken, [candidate], out, check=check),
    ):
        with pytest.raises(RequestInvalid, match="vllm would not load the result") as caught:
            merge()
        assert [item.pointer for item in caught.value.errors] == ["/parameters/rank"]
        assert not out.exists()


@pytest.mark.parametrize(
    ("parameters", "ranks", "config"),
    [
        ({"rank": "2r"}, (300, 300), {}),
        ({"norm_equalize": "module"}, (300, 300), {}),
        ({}, (300, 299), {}),
        ({}, (300, 300), {"lora_alpha": 7}),
    ],
)
def test_what_the_headers_tell_is_refused_from_them(
    write_adapter: Any, parameters: dict[str, Any], ranks: tuple[int, int], config: dict[str, Any]
) -> None:
    options = parse_parameters("linear", parameters)
    inputs = [
        MergeInput.of(
            inspect(write_adapter(str(number), {Q: factors(rank, number)}, **(config if number else {}))),
            str(number),
            "x",
            None,
        )
        for number, rank in enumerate(ranks)
    ]
    with pytest.raises(RequestInvalid, match="vllm would not load the result"):
        check_merged(at_least_rank(plan_merge(inputs, "linear", options), options), "vllm")


def test_an_engine_that_there_is_not() -> None:
    assert [parse_engine(name) for name in ENGINES] == list(ENGINES)
    with pytest.raises(RequestInvalid, match="there is no engine 'vLLM'"):
        parse_engine("vLLM")
