"""`rankwise merge` on files: no service, the same checks and the same engine."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge.catalog import METHODS

TOLERANCE = 1e-5


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module → scaling·B·A of a PEFT directory without patterns."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix(".lora_A.weight"): scaling * tensors[key.replace("lora_A", "lora_B")].double() @ A.double()
        for key, A in tensors.items()
        if key.endswith(".lora_A.weight")
    }


def assert_sum(folder: Path, parts: list[tuple[float, Path]]) -> None:
    merged = deltas(folder)
    sources = [(weight, deltas(path)) for weight, path in parts]
    assert set(merged) == set(sources[0][1])
    for module, delta in merged.items():
        torch.testing.assert_close(
            delta, sum(weight * source[module] for weight, source in sources), atol=TOLERANCE, rtol=TOLERANCE
        )


def test_cat_is_the_exact_sum(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = adapters
    out = tmp_path / "out"
    result = cli("merge", first, second, "--method", "cat", "-o", out)
    assert result.code == 0, result.err
    assert_sum(out, [(1.0, first), (1.0, second)])
    assert "energy kept" in result.out
    assert str(out) in result.err


def test_weights_are_named_by_path_or_stem(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = adapters
    out = tmp_path / "out"
    arguments = ("--method", "svd", "--rank", "5", "--weight", f"{first}=0.5", "--weight", "second=-2")
    result = cli("merge", first, second, *arguments, "-o", out)
    assert result.code == 0, result.err
    assert_sum(out, [(0.5, first), (-2.0, second)])


def test_lego_writes_adapter_and_report(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("merge", *adapters, "--rank", "4", "--set", "seed=1", "--name", "both", "-o", out, "--json")
    assert result.code == 0, result.err
    report = result.json["report"]
    assert result.json["path"] == str(out)
    assert report["method"] == "lego"
    assert report["rank"] == 4
    assert report["parameters"]["seed"] == 1
    assert json.loads((out / "merge_report.json").read_text(encoding="utf-8")) == report
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_report.json",
    }


def test_a_merge_for_an_engine(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("merge", *adapters, "--method", "cat", "--target-engine", "llama.cpp", "-o", out)
    assert result.code == 0, result.err
    assert "llama.cpp  loads it" in result.out
    assert json.loads((out / "merge_report.json").read_text(encoding="utf-8"))["target_engine"]["loads"]
    other = tmp_path / "other"
    for engine, words in (("kohya", "kohya would not load the result"), ("vLLM", "there is no engine")):
        refused = cli("merge", *adapters, "--method", "cat", "--target-engine", engine, "-o", other)
        assert refused.code != 0
        assert words in refused.err
        assert not other.exists()


def test_the_inputs_stay_as_they_were(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for folder in adapters for path in folder.iterdir()}
    assert cli("merge", *adapters, "--method", "cat", "-o", tmp_path / "out").code == 0
    assert {path: path.read_bytes() for folder in adapters for path in folder.iterdir()} == before


def test_archives_are_taken(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = adapters
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for file in second.iterdir():
            stream.write(file, file.name)
    out = tmp_path / "out"
    result = cli("merge", first, archive, "--method", "cat", "--weight", "packed=3", "-o", out)
    assert result.code == 0, result.err
    assert_sum(out, [(1.0, first), (3.0, second)])


def test_a_merged_adapter_can_be_merged_again(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert cli("merge", *adapters, "--method", "cat", "-o", once).code == 0
    result = cli("merge", once, adapters[0], "--method", "cat", "-o", twice)
    assert result.code == 0, result.err
    assert_sum(twice, [(2.0, adapters[0]), (1.0, adapters[1])])


def test_paths_of_this_machine_stay_out_of_the_file(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("merge", *adapters, "--method", "cat", "-o", out).code == 0
    assert str(tmp_path).encode() not in (out / "adapter_model.safetensors").read_bytes()
    assert str(tmp_path) not in (out / "adapter_config.json").read_text(encoding="utf-8")


def test_an_empty_output_folder_is_used(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert cli("merge", *adapters, "--method", "cat", "-o", out).code == 0
    assert (out / "adapter_model.safetensors").is_file()


def test_a_full_output_folder_is_not_touched(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep me", encoding="utf-8")
    result = cli("merge", *adapters, "--method", "cat", "-o", out)
    assert result.code == 1
    assert "not empty" in result.err
    assert [file.name for file in out.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--method", "nope"), "invalid_request", "nope"),
        (("--method", "svd", "--rank", "6"), "rank_out_of_range", "/parameters/rank"),
        (("--method", "lego", "--set", "n_init=0"), "invalid_request", "/parameters/n_init"),
        (("--method", "lego", "--set", "colour=red"), "invalid_request", "/parameters/colour"),
        (("--method", "lego", "--weight", "first=-1"), "invalid_request", "negative"),
    ],
)
def test_a_refusal_says_what_and_leaves_nothing(
    cli: Callable[..., Any],
    adapters: tuple[Path, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: str,
    words: str,
) -> None:
    before = sorted(tmp_path.iterdir())
    result = cli("merge", *adapters, *arguments, "-o", tmp_path / "out", "--json")
    assert result.code == 1
    assert result.json["code"] == code
    assert words in result.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_value_of_every_parameter_is_refused_by_its_pointer(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    names = METHODS[method].options.model_fields
    foreign = "tail" if "tail" not in names else "epsilon"
    bad = [argument for name in names for argument in ("--set", f"{name}=[]")]
    result = cli(
        "merge", *adapters, "--method", method, *bad, "--set", f"{foreign}=0.5", "-o", tmp_path / "out", "--json"
    )
    assert (result.code, result.json["code"]) == (1, "invalid_request")
    assert {item["pointer"] for item in result.json["errors"]} == {f"/parameters/{name}" for name in (*names, foreign)}
    assert all(f"/parameters/{name}" in result.err for name in (*names, foreign))
    assert method in result.err
    assert not (tmp_path / "out").exists()


def test_a_broken_file_is_named(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = adapters
    weights = second / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    result = cli("merge", first, second, "--method", "cat", "-o", tmp_path / "out", "--json")
    assert result.code == 1
    assert result.json["code"] == "file_broken"
    assert str(second) in result.err
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_not_there(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    result = cli("merge", adapters[0], tmp_path / "nowhere", "-o", tmp_path / "out")
    assert result.code == 1
    assert "nowhere" in result.err


def test_a_folder_without_configuration(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    (adapters[1] / "adapter_config.json").unlink()
    result = cli("merge", *adapters, "-o", tmp_path / "out", "--json")
    assert result.json["code"] == "format_unknown"
    assert "adapter_config.json" in result.err


def test_the_same_input_twice(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    result = cli("merge", adapters[0], adapters[0], "-o", tmp_path / "out")
    assert result.code == 1
    assert "twice" in result.err


def test_different_bases_are_refused(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    config = adapters[1] / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("acme/tiny", "acme/other"), encoding="utf-8")
    result = cli("merge", *adapters, "--method", "cat", "-o", tmp_path / "out", "--json")
    assert result.code == 1
    assert result.json["code"] == "base_model_mismatch"


def test_an_output_that_can_not_be_made(cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder", encoding="utf-8")
    result = cli("merge", *adapters, "--method", "cat", "-o", blocker / "out")
    assert result.code == 1
    assert str(blocker) in result.err


def test_a_comparison_writes_every_merge_with_report_and_pictures(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    candidates = ("--candidate", "cat", "--candidate", "svd:rank=1", "--candidate", "svd:rank=2;normalize=true")
    result = cli("merge-compare", *adapters, *candidates, "--weight", "first=0.5", "-o", out, "--json")
    assert result.code == 0, result.err
    report = result.json["report"]
    assert report["ranking"] == ["cat", "svd 2", "svd"]
    assert json.loads((out / "comparison_report.json").read_text(encoding="utf-8")) == report
    assert {path.name for path in out.iterdir()} == {
        "cat",
        "svd",
        "svd-2",
        "comparison_report.json",
        "interference.svg",
        "errors.svg",
    }
    assert_sum(out / "cat", [(0.5, adapters[0]), (1.0, adapters[1])])
    shown = cli("merge-compare", *adapters, *candidates, "-o", tmp_path / "again")
    assert shown.code == 0, shown.err
    assert "ranked by relative_error" in shown.out


def test_a_comparison_that_is_refused_leaves_nothing(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cli("merge-compare", *adapters, "--candidate", "svd:rank=99", "-o", out)
    assert result.code == 1
    assert "rank_out_of_range" in result.err
    assert not out.exists()
    assert cli("merge-compare", *adapters, "--candidate", "cat").code == 2
