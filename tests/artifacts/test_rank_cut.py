"""The adapter of a smaller rank inside a larger one: its bytes, its configuration, and the mark that allows it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.errors import FileBroken, RequestInvalid
from artifacts.intake import inspect, receive
from artifacts.layout import read_layout
from artifacts.manifest import NestedRanks
from artifacts.nested_ranks import NESTED_KEY, mark_of
from artifacts.rank_cut import Pieces, Run, write_cut
from artifacts.upload import IntakeLimits

PATHS = ("layers.0.q_proj", "layers.1.q_proj")
RANK, D_IN, D_OUT = 6, 7, 5


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path in PATHS:
        found[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, D_IN, generator=generator).to(dtype)
        found[f"base_model.model.{path}.lora_B.weight"] = torch.randn(D_OUT, RANK, generator=generator).to(dtype)
    return found


def write(
    folder: Path,
    *,
    ranks: tuple[int, ...] = (1, 2, 4, 6),
    mode: Any = "alpha_over_b",
    mark: str | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    folder.mkdir(parents=True)
    text = mark_of(NestedRanks(ranks, mode)) if mark is None else mark
    held = {"format": "pt", NESTED_KEY: text, **(metadata or {})}
    save_file(tensors() if weights is None else weights, folder / "adapter_model.safetensors", held)
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def cut(folder: Path, rank: int) -> Path:
    target = folder.with_name(f"{folder.name}-{rank}")
    write_cut(read_layout(folder), rank, target)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_holds_the_first_components_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = write(tmp_path / "whole", weights=tensors(dtype))
    for rank in (1, 2, 4, 6):
        found = load_file(cut(whole, rank) / "adapter_model.safetensors")
        assert found.keys() == tensors().keys()
        for name, value in tensors(dtype).items():
            assert torch.equal(found[name], value[:rank] if "lora_A" in name else value[:, :rank])


@pytest.mark.parametrize(
    ("mode", "alphas", "scalings"),
    [("alpha_over_b", [12, 12, 12, 12], [12.0, 6.0, 3.0, 2.0]), ("constant", [2, 4, 8, 12], [2.0] * 4)],
)
def test_alpha_gives_the_scaling_that_the_rank_was_trained_with(
    tmp_path: Path, mode: str, alphas: list[float], scalings: list[float]
) -> None:
    whole = write(tmp_path / "whole", mode=mode)
    for rank, alpha, scaling in zip((1, 2, 4, 6), alphas, scalings, strict=True):
        folder = cut(whole, rank)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], type(config["lora_alpha"])) == (rank, alpha, int)
        manifest = inspect(folder)
        assert {module.scaling for module in manifest.modules} == {scaling}
        assert {module.rank for module in manifest.modules} == {rank}
        assert manifest.mergeable


def test_an_alpha_that_is_no_whole_number_stays_exact(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", mode="constant", lora_alpha=5)
    assert json.loads((cut(whole, 1) / "adapter_config.json").read_text())["lora_alpha"] == 5 / 6


def test_a_cut_can_be_cut_again(tmp_path: Path) -> None:
    for mode in ("alpha_over_b", "constant"):
        whole = write(tmp_path / mode, mode=mode)
        at_once, twice = cut(whole, 2), cut(cut(whole, 4), 2)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (at_once / name).read_bytes() == (twice / name).read_bytes()
        nested = inspect(at_once).report.nested
        assert nested == NestedRanks((1, 2), mode)  # type: ignore[arg-type]


def test_whole_modules_come_along(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": torch.ones(3, 4)}
    whole = write(tmp_path / "whole", weights=tensors() | head, modules_to_save=["score"])
    found = load_file(cut(whole, 2) / "adapter_model.safetensors")
    assert torch.equal(found["base_model.model.score.weight"], torch.ones(3, 4))


def test_a_configuration_inside_the_file_is_that_of_the_cut(tmp_path: Path) -> None:
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "target_modules": ["q_proj"]}
    whole = write(tmp_path / "whole", metadata={"lora_adapter_metadata": json.dumps(document)})
    (whole / "adapter_config.json").unlink()
    folder = cut(whole, 2)
    inside = json.loads(read_layout(folder).header.metadata["lora_adapter_metadata"])
    assert inside == document | {"r": 2} == json.loads((folder / "adapter_config.json").read_text())


def test_intake_knows_the_mark_and_it_makes_another_adapter(tmp_path: Path) -> None:
    marked = inspect(write(tmp_path / "marked"))
    plain = write(tmp_path / "plain")
    save_file(tensors(), plain / "adapter_model.safetensors", {"format": "pt"})
    unmarked = inspect(plain)
    assert (marked.method, unmarked.method) == ("dylora", "lora")
    assert marked.report.nested == NestedRanks((1, 2, 4, 6), "alpha_over_b")
    assert unmarked.report.nested is None
    assert marked.weights_digest == unmarked.weights_digest
    assert marked.identity_digest != unmarked.identity_digest
    files = [(path.name, path) for path in sorted((tmp_path / "marked").iterdir())]
    assert inspect(receive(files, tmp_path / "in", IntakeLimits())).report.nested == marked.report.nested


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mark": "no json"}, "is not valid JSON"),
        ({"mark": "[1]"}, "not an object"),
        ({"mark": '{"ranks":[1]}'}, "exactly the fields ranks and scale_mode"),
        ({"mark": '{"ranks":[],"scale_mode":"constant"}'}, "list of integers from 1"),
        ({"mark": '{"ranks":[0,6],"scale_mode":"constant"}'}, "list of integers from 1"),
        ({"mark": '{"ranks":[true,6],"scale_mode":"constant"}'}, "list of integers from 1"),
        ({"mark": '{"ranks":[2,2,6],"scale_mode":"constant"}'}, "must rise"),
        ({"mark": '{"ranks":[6],"scale_mode":"root"}'}, "one of alpha_over_b, constant"),
        ({"ranks": (1, 8)}, "its largest rank is 8, and r in the configuration is 6"),
        ({"use_rslora": True}, "only a plain LoRA"),
        ({"alpha_pattern": {"layers.0.q_proj": 3}}, "alpha_pattern"),
        ({"r": 5, "rank_pattern": {"q_proj": 6}}, "rank_pattern"),
    ],
)
def test_a_mark_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write(tmp_path / "whole", **changes)
    with pytest.raises(FileBroken, match=NESTED_KEY) as caught:
        inspect(folder)
    assert words in caught.value.detail
    assert caught.value.hint


def test_other_ranks_and_other_adapters_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    with pytest.raises(RequestInvalid, match="not trained for rank 3") as caught:
        cut(whole, 3)
    assert "1, 2, 4, 6" in caught.value.errors[0].message
    save_file(tensors(), whole / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RequestInvalid, match="not trained for smaller ranks"):
        cut(whole, 2)


def test_what_is_kept_is_the_same_however_it_is_asked_for_and_read() -> None:
    data = bytes(range(200))
    pieces = Pieces((Run(3, 5, 5), Run(20, 2, 6, rows=7), Run(64, 64, 64), Run(150, 3, 10, rows=4)))
    whole = data[3:8] + b"".join(data[20 + 6 * row : 22 + 6 * row] for row in range(7)) + data[64:128]
    whole += b"".join(data[150 + 10 * row : 153 + 10 * row] for row in range(4))
    assert pieces.size == len(whole)
    for size in (1, 4, 7, 1000):
        for start, stop in [*pairwise(range(0, len(whole), 6)), (0, len(whole)), (94, 95), (17, 80)]:
            first, last = pieces.hull(start, stop)
            chunks = [data[at : min(at + size, last)] for at in range(first, last, size)]
            assert b"".join(pieces.sift(chunks, start, stop)) == whole[start:stop], (start, stop, size)
