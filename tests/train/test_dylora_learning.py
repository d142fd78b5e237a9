"""What DyLoRA is for, measured: every rank is good, LoRA cut to a smaller rank is not, and the order is learned."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from nested_teacher import eckart_young, error, learn
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_lm import SmallLanguageModel
from tiny_base import sums
from torch import Tensor, nn
from transformers import AutoTokenizer

from artifacts.layout import read_layout
from artifacts.rank_cut import write_cut
from train.methods.dylora import area
from train.quiet import peft_deprecations_ignored
from train.settings import CausalLmTask
from train.tasks.causal_lm import row_losses
from train.tasks.causal_rows import encode_row
from train.tasks.text_batches import padding_of

pytestmark = pytest.mark.slow
RANKS = (1, 2, 4, 8)
WEIGHTS = "adapter_model.safetensors"


def cut_factors(mode: str = "alpha_over_b", **parameters: Any) -> list[float]:
    """‖T − ΔW‖² at the ranks 1, 2, 4 and 8 after 600 steps."""
    factors = learn("dylora", {"scale_mode": mode, **parameters}, 600)
    return [error(factors, rank, 16.0 / (rank if mode == "alpha_over_b" else 8)) for rank in RANKS]


def test_the_first_component_is_the_best_one_and_that_of_lora_is_not() -> None:
    frozen = cut_factors()
    assert frozen[0] <= 1.15 * eckart_young(1)
    assert frozen == sorted(frozen, reverse=True)
    plain = learn("lora", {"rank": 8, "alpha": 16.0}, 600)
    by_scale = [[error(plain, rank, scaling(rank)) for rank in RANKS] for scaling in (lambda b: 16 / b, lambda _: 2.0)]
    for errors in by_scale:  # whichever scaling it is cut with
        assert errors[0] >= 1.5 * frozen[0]
        assert errors[-1] < 1 < frozen[-1]  # at its own rank it is the better one


def test_only_a_constant_scaling_reaches_the_best_at_every_rank() -> None:
    published, constant = cut_factors(frozen=False), cut_factors("constant", frozen=False)
    assert published[-1] > 5 > 2 > constant[-1]
    assert constant[2] < published[2]
    for rank, found in zip(RANKS, constant, strict=True):
        assert found <= 1.25 * eckart_young(rank) + 2


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """DyLoRA and LoRA of rank 8 after the same steps on the same rows, and what loads and measures them."""
    from trainings import Trainings

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    trainings = Trainings(tmp_path_factory.mktemp("ranks"), tiny_base)
    rows = [encode_row(row, tokenizer, CausalLmTask()) for row in sums(8)[::3]]
    found: dict[str, Any] = {"trainings": trainings, "rows": rows, "padding": padding_of(tokenizer)}
    common = {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"]}
    for method in ("dylora", "lora"):
        _, found[method], _ = trainings.run(
            method, common, steps=200, learning_rate=0.02, evaluation={"validation_fraction": 0}
        )
    return found


def loss_of(trained: dict[str, Any], adapter: Path) -> float:
    with peft_deprecations_ignored():
        model = PeftModel.from_pretrained(trained["trainings"].load_base(), str(adapter)).eval()
    losses = row_losses(model, trained["rows"], trained["padding"])
    return sum(losses) / sum(row.counted for row in trained["rows"])


def cut(adapter: Path, rank: int, target: Path) -> Path:
    write_cut(read_layout(adapter), rank, target)
    return target


def marked(adapter: Path, target: Path, mode: str, order: list[int] | None = None) -> Path:
    """A copy that claims to be DyLoRA's, its components in another order if one is given."""
    target.mkdir()
    tensors = load_file(adapter / WEIGHTS)
    for name, value in tensors.items() if order else ():
        tensors[name] = (value[order] if ".lora_A." in name else value[:, order]).contiguous()
    mark = f'{{"ranks":[1,2,4,8],"scale_mode":"{mode}"}}'
    save_file(tensors, target / WEIGHTS, {"rankwise_dylora": mark})
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return target


def test_a_language_model_at_rank_one_beats_lora_cut_to_rank_one(trained: dict[str, Any], tmp_path: Path) -> None:
    curve = [loss_of(trained, cut(trained["dylora"], rank, tmp_path / f"dylora-{rank}")) for rank in RANKS]
    plain = []
    for mode in ("alpha_over_b", "constant"):
        whole = marked(trained["lora"], tmp_path / mode, mode)
        plain.append(loss_of(trained, cut(whole, 1, tmp_path / f"{mode}-1")))
    print({"dylora": curve, "lora cut to 1": plain, "lora": loss_of(trained, trained["lora"])})
    assert curve[0] < min(plain) - 0.1
    assert all(later <= earlier + 0.1 for earlier, later in pairwise(curve))


@pytest.mark.timeout(600)
def test_smollm2_at_rank_one_beats_lora_cut_to_rank_one() -> None:
    """The first layers of it, on q and v; the same steps and rows for both."""
    words = SmallLanguageModel.load("orders", rows=64)
    base = words.loss(words.model)
    common: dict[str, Any] = {"steps": 200, "learning_rate": 3e-3, "linear": True, "targets": ("q_proj", "v_proj")}
    nested = words.train("dylora", {"rank": 8, "alpha": 16.0, "ranks": list(RANKS)}, **common)
    curve, hits = [], []
    for rank in RANKS:
        with nested.method.at_rank(rank):
            curve.append(words.loss(nested.model))
            hits.append(words.accuracy(nested.model))
    plain = words.train("lora", {"rank": 8, "alpha": 16.0}, **common)
    cut: dict[str, list[tuple[float, float]]] = {}
    for mode in ("alpha_over_b", "constant"):
        for rank in RANKS:
            model = cut_to(rank, plain.model, 8 / rank if mode == "alpha_over_b" else 1.0)
            cut.setdefault(mode, []).append((words.loss(model), words.accuracy(model)))
    areas = {mode: area(RANKS, [accuracy for _, accuracy in found]) for mode, found in cut.items()}
    print({"base": base, "dylora": curve, "area": area(RANKS, hits), "lora cut": cut, "areas of lora": areas})
    learned = base - curve[0]
    for found in cut.values():
        assert found[0][0] - curve[0] > 0.05 * learned
    # Flat or falling: what a larger rank loses on these 16 rows is at most a fortieth of what was learned.
    assert all(later <= earlier + learned / 40 for earlier, later in pairwise(curve))
    assert area(RANKS, hits) > max(areas.values()) + 0.1


def cut_to(rank: int, model: nn.Module, factor: float) -> nn.Module:
    """A copy of PEFT's model whose LoRA has its first components alone, B multiplied by `factor`."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in found.named_parameters():
            if ".lora_B." in name:
                value[:, rank:] = 0
                value *= factor
    return found


def test_the_order_of_the_components_was_learned(trained: dict[str, Any], tmp_path: Path) -> None:
    """The same shuffle of A's rows and B's columns changes nothing at the full rank and much below it."""
    order = [5, 3, 7, 0, 6, 2, 4, 1]
    harm = {}
    for method in ("dylora", "lora"):
        straight = marked(trained[method], tmp_path / method, "alpha_over_b")
        shuffled = marked(trained[method], tmp_path / f"{method}-shuffled", "alpha_over_b", order)
        assert loss_of(trained, straight) == pytest.approx(loss_of(trained, shuffled), rel=1e-4)
        losses = [
            [loss_of(trained, cut(adapter, rank, tmp_path / f"{adapter.name}-{rank}")) for rank in (1, 2, 4)]
            for adapter in (straight, shuffled)
        ]
        harm[method] = [other - mine for mine, other in zip(*losses, strict=True)]
    print(harm)
    assert min(harm["dylora"]) > 0.1
    assert sum(harm["lora"]) / 3 < sum(harm["dylora"]) / 3 / 2


PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(24).reshape(2, 12)
for folder in sys.argv[2:]:
    model = PeftModel.from_pretrained(base, folder).eval()
    torch.save(model(ids).logits.detach(), folder + "/logits.pt")
    base = model.unload()
"""


def test_stock_peft_loads_the_whole_and_every_rank_in_a_new_process(
    trained: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    folders = {rank: cut(trained["dylora"], rank, tmp_path / f"rank-{rank}") for rank in range(1, 9)}
    whole = marked(trained["dylora"], tmp_path / "whole", "alpha_over_b")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_base), str(whole), *map(str, folders.values())],
        check=True,
        cwd=tmp_path,
    )
    ids = torch.arange(24).reshape(2, 12)
    for rank, folder in folders.items():
        model = trained["trainings"].load_base()
        for name, value in by_hand(trained["dylora"], rank).items():
            model.get_parameter(f"{name}.weight").data += value
        expected = model(ids).logits
        found = torch.load(folder / "logits.pt")
        limit = 1e-4 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    assert torch.equal(torch.load(whole / "logits.pt"), torch.load(folders[8] / "logits.pt"))


def by_hand(adapter: Path, rank: int) -> dict[str, Tensor]:
    """Module → 16/b·B[:, :b]·A[:b]."""
    tensors = load_file(adapter / WEIGHTS)
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = 16 / rank * b[:, :rank] @ a[:rank]
    assert found
    assert all(math.isfinite(float(value.sum())) for value in found.values())
    return found
