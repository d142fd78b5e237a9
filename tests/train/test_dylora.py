"""DyLoRA against exact answers: every rank is an adapter, and a step trains what it should and nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts.errors import RequestInvalid
from artifacts.layout import read_layout
from artifacts.rank_cut import write_cut
from train.catalog import parse_parameters
from train.methods.dylora import Dylora, DyloraLinear, area
from train.options.common import Circumstances, Target
from train.options.dylora import DyloraOptions
from train.protocol import MethodContext
from train.settings import TrainingSettings
from train.targets import check_method

RANK, WIDE, NARROW = 6, 12, 10
TOLERANCE = 1e-5
STEPS = 12


class Net(nn.Module):
    """Two layers with something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDE, NARROW)
        self.second = nn.Linear(NARROW, WIDE)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


def base() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def rows(seed: int = 1) -> Tensor:
    return torch.randn(16, WIDE, generator=torch.Generator().manual_seed(seed))


def prepared(**parameters: Any) -> tuple[Dylora, nn.Module]:
    """The method and its model, with factors that are not zero."""
    parameters.setdefault("rank", RANK)
    options = parse_parameters("dylora", parameters)
    assert isinstance(options, DyloraOptions)
    method = Dylora(options)
    settings = TrainingSettings(steps=STEPS)
    targets = ["second", "first"]
    model = method.prepare(base(), MethodContext(targets, STEPS, lambda: iter(()), settings, seed=5, task_type=None))
    return method, model.train()


def fill(method: Dylora, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(method):
        layer.lora_B.data.normal_(0, 0.1, generator=generator)


def layers(method: Dylora) -> list[DyloraLinear]:
    return [layer for layer in method.layers.values() if isinstance(layer, DyloraLinear)]


def draw(method: Dylora, model: nn.Module, wanted: int) -> None:
    """Begin steps until this rank is drawn."""
    for step in range(10_000):
        method.before_step(model, step)
        if method.metrics()["rank"] == wanted:
            return
    raise AssertionError(f"rank {wanted} was never drawn")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(1)).square().mean()


def optimizer_of(method: Dylora, model: nn.Module, decay: float = 0.1) -> torch.optim.AdamW:
    trained = [value for value in model.parameters() if value.requires_grad]
    made = torch.optim.AdamW(trained, lr=1e-2, weight_decay=decay)
    method.schedule(made, method.context.settings, STEPS)
    return made


def train_step(method: Dylora, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> int:
    """One step with two micro-batches; returns the rank that was drawn."""
    method.before_step(model, step)
    for part in rows(step).chunk(2):
        (loss_of(model, part) / 2).backward()
    method.before_update(model, step)
    optimizer.step()
    method.after_update(model, step)
    optimizer.zero_grad()
    return int(method.metrics()["rank"])


def cut(folder: Path, rank: int) -> Path:
    target = folder.parent / f"rank-{rank}"
    write_cut(read_layout(folder), rank, target)
    return target


@pytest.mark.parametrize("mode", ["alpha_over_b", "constant"])
def test_at_first_every_rank_is_the_base_model(mode: str) -> None:
    method, model = prepared(scale_mode=mode)
    expected = base()(rows())
    for rank in range(1, RANK + 1):
        draw(method, model, rank)
        assert torch.equal(model.train()(rows()), expected)
        with method.at_rank(rank):
            assert torch.equal(model.eval()(rows()), expected)


@pytest.mark.parametrize("mode", ["alpha_over_b", "constant"])
def test_a_training_step_at_a_rank_computes_what_peft_does_with_the_cut_file(tmp_path: Path, mode: str) -> None:
    method, model = prepared(scale_mode=mode, alpha=7.0)
    fill(method)
    method.export(model, tmp_path / "whole")
    outputs = []
    for rank in range(1, RANK + 1):
        draw(method, model, rank)
        trained = model.train()(rows())
        loaded = PeftModel.from_pretrained(base(), str(cut(tmp_path / "whole", rank))).eval()
        torch.testing.assert_close(trained, loaded(rows()), rtol=0, atol=TOLERANCE)
        with method.at_rank(rank):
            torch.testing.assert_close(model.eval()(rows()), loaded(rows()), rtol=0, atol=TOLERANCE)
        outputs.append(trained.detach())
    assert all(float((one - other).abs().max()) > 0.01 for one, other in pairwise(outputs))
    whole = PeftModel.from_pretrained(base(), str(tmp_path / "whole")).eval()
    torch.testing.assert_close(whole(rows()), outputs[-1], rtol=0, atol=TOLERANCE)


def test_a_file_cut_by_hand_that_keeps_the_scaling_of_the_whole_is_too_weak(tmp_path: Path) -> None:
    """Why a rank is always cut by the service: only alpha/b gives what was trained."""
    method, model = prepared()
    fill(method)
    method.export(model, tmp_path / "whole")
    exact = load_file(cut(tmp_path / "whole", 2) / "adapter_model.safetensors")
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for path, layer in method.layers.items():
        a, b = (exact[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        by_hand = whole[f"base_model.model.{path}.lora_B.weight"][:, :2] @ layer.lora_A.detach()[:2] * 16.0 / RANK
        torch.testing.assert_close(by_hand * RANK / 2, 16.0 / 2 * b @ a, rtol=1e-5, atol=1e-7)


def test_the_scaling_is_that_of_the_authors_wrapper() -> None:
    """Their code scales by alpha/r and wraps A and B with √(r/b) each; one root alone gives something else."""
    method, model = prepared()
    fill(method)
    (layer,) = [item for path, item in method.layers.items() if path == "first"]
    x = rows()
    for rank in range(1, RANK + 1):
        draw(method, model, rank)
        root = (RANK / rank) ** 0.5
        product = x @ (layer.lora_A[:rank] * root).T @ (layer.lora_B[:, :rank] * root).T
        torch.testing.assert_close(layer.train().adapter(x), 16.0 / RANK * product, rtol=0, atol=TOLERANCE)
        if rank < RANK:
            difference = layer.adapter(x) - 16.0 / RANK * product / root
            assert float(difference.detach().abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("ranks", [None, [2, 3, 6]])
def test_frozen_gradients_are_those_of_all_at_the_trained_components_and_zero_elsewhere(
    ranks: list[int] | None,
) -> None:
    (frozen, one), (free, other) = prepared(ranks=ranks), prepared(ranks=ranks, frozen=False)
    fill(frozen)
    fill(free)
    before = 0
    for rank in ranks or range(1, RANK + 1):
        found = []
        for method, model in ((frozen, one), (free, other)):
            draw(method, model, rank)
            model.zero_grad()
            loss_of(model, rows()).backward()
            found.append(layers(method))
        for mine, all_of_them in zip(*found, strict=True):
            for dimension, name in enumerate(("lora_A", "lora_B")):
                got, full = (getattr(layer, name).grad.movedim(dimension, 0) for layer in (mine, all_of_them))
                assert torch.equal(got[before:rank], full[before:rank])
                assert (got[before:rank].abs().amax(dim=1) > 0).all()
                assert not got[:before].any() and not got[rank:].any()
                assert not full[rank:].any()
                assert before == 0 or (full[:before].abs().amax(dim=1) > 0).all()
        before = rank


def test_with_one_rank_and_nothing_frozen_it_is_lora_to_the_bit() -> None:
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["first", "second"])
    plain = get_peft_model(base(), config)
    plain.train()
    method, model = prepared(rank=4, min_rank=4, frozen=False, dropout=0.1)
    inner = plain.base_model.model
    for path, layer in method.layers.items():
        layer.lora_A.data.copy_(inner.get_submodule(path).lora_A["default"].weight)
    results = []
    for trained in (plain, model):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        torch.manual_seed(7)
        for step in range(5):
            method.before_step(model, step)
            loss_of(trained, rows(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for path, layer in method.layers.items():
        results += [(layer.lora_A, inner.get_submodule(path).lora_A["default"].weight)]
        results += [(layer.lora_B, inner.get_submodule(path).lora_B["default"].weight)]
    assert all(torch.equal(mine, theirs) and mine.abs().max() > 0 for mine, theirs in results)


@pytest.mark.parametrize("scope", ["strict", "dense"])
def test_strict_leaves_other_components_to_the_bit_and_dense_does_not(scope: str) -> None:
    method, model = prepared(update_scope=scope)
    fill(method)
    optimizer = optimizer_of(method, model)
    drawn = [train_step(method, model, optimizer, step) for step in range(STEPS)]  # warms the moments
    before = [value.detach().clone() for layer in layers(method) for value in (layer.lora_A, layer.lora_B)]
    rank = train_step(method, model, optimizer, STEPS)
    after = [value for layer in layers(method) for value in (layer.lora_A, layer.lora_B)]
    others = [component for component in range(RANK) if component != rank - 1]
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        old, new = old.movedim(place % 2, 0), new.movedim(place % 2, 0)
        assert not torch.equal(old[rank - 1], new[rank - 1])
        assert [torch.equal(old[item], new[item]) for item in others] == [scope == "strict"] * len(others)
    assert method.report(model)["drawn"] == {str(r): [*drawn, rank].count(r) for r in range(1, RANK + 1)}


def test_strict_is_one_optimiser_for_each_rank() -> None:
    """A component moves as if it were a parameter of its own that the optimiser sees only when it is trained."""
    method, model = prepared(update_scope="strict")
    fill(method)
    optimizer = optimizer_of(method, model)
    layer = layers(method)[0]
    rows_of_a = [nn.Parameter(layer.lora_A.detach()[item].clone()) for item in range(RANK)]
    apart = torch.optim.AdamW(rows_of_a, lr=1e-2, weight_decay=0.1)
    for step in range(2 * STEPS):
        method.before_step(model, step)
        loss_of(model, rows(step)).backward()
        rank = int(method.metrics()["rank"])
        assert layer.lora_A.grad is not None
        rows_of_a[rank - 1].grad = layer.lora_A.grad[rank - 1].clone()
        method.before_update(model, step)
        optimizer.step()
        method.after_update(model, step)
        apart.step()
        optimizer.zero_grad()
        apart.zero_grad(set_to_none=True)
    for item, value in enumerate(rows_of_a):
        torch.testing.assert_close(layer.lora_A[item], value, rtol=0, atol=1e-6)


def test_merged_at_one_rank_and_taken_out_after_another_was_chosen(tmp_path: Path) -> None:
    method, model = prepared()
    fill(method)
    method.export(model, tmp_path / "whole")
    plain = base()
    loaded = PeftModel.from_pretrained(plain, str(cut(tmp_path / "whole", 2)), adapter_name="two")
    loaded.load_adapter(str(cut(tmp_path / "whole", 5)), adapter_name="five")
    original = base().first.weight
    layer = loaded.base_model.model.first
    layer.merge(adapter_names=["two"])
    merged = layer.base_layer.weight.detach().clone()
    assert float((merged - original).abs().max()) > 0.01
    layer.set_adapter("five")
    with_current = merged - layer.get_delta_weight("five").detach()
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, original, rtol=0, atol=TOLERANCE)
    # What the authors' layer does, which takes the rank of now and not that of the merge:
    assert float((with_current - original).abs().max()) > 100 * TOLERANCE


def test_evaluation_shows_the_largest_rank_whatever_was_drawn() -> None:
    method, model = prepared()
    fill(method)
    model.eval()
    outputs = []
    for rank in (1, RANK):
        draw(method, model, rank)
        outputs += [model(rows()), model(rows())]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    with method.at_rank(1):
        once, again = model(rows()), model(rows())
    assert torch.equal(once, again)
    assert not torch.equal(once, outputs[0])
    assert torch.equal(model(rows()), outputs[0])


def test_ranks_are_drawn_as_often_as_their_weights_say() -> None:
    weights = [4.0, 0.0, 2.0, 1.0, 0.5, 2.5]
    method, model = prepared(rank=8, min_rank=3, distribution=weights)
    drawn: Counter[int] = Counter()
    for step in range(10_000):
        method.before_step(model, step)
        drawn[int(method.metrics()["rank"])] += 1
    assert sorted(drawn) == [3, 5, 6, 7, 8]
    expected = {rank: 10_000 * weight / 10 for rank, weight in zip(range(3, 9), weights, strict=True) if weight}
    chi_squared = sum((drawn[rank] - expected[rank]) ** 2 / expected[rank] for rank in expected)
    assert chi_squared < 18.5  # 4 degrees of freedom: exceeded once in a thousand
    uniform, model = prepared(rank=8)
    counts = Counter(int(_drawn(uniform, model)) for _ in range(10_000))
    assert (min(counts), max(counts)) == (1, 8)
    assert sum((count - 1250) ** 2 / 1250 for count in counts.values()) < 24.3  # 7 degrees of freedom


def _drawn(method: Dylora, model: nn.Module) -> float:
    method.before_step(model, 0)
    return method.metrics()["rank"]


def test_micro_batches_share_one_draw_and_the_report_has_every_rank(trainings: Any) -> None:
    parameters = {"rank": 8, "ranks": [2, 4, 8], "scale_mode": "constant"}
    report, adapter, watcher = trainings.run(
        "dylora", parameters, seed=4, steps=6, evaluation={"exact_match": True, "max_rows": 2, "max_new_tokens": 2}
    )
    drawn = [int(watcher.points[step]["rank"]) for step in sorted(watcher.points)]
    assert len(drawn) == 6 == sum(report.own["drawn"].values())  # of two forward passes each
    assert set(drawn) == {2, 4, 8}
    assert report.own["drawn"] == {str(rank): drawn.count(rank) for rank in (2, 4, 8)}
    table = report.own["evaluation"]["ranks"]
    assert [row["rank"] for row in table] == [2, 4, 8]
    assert all({"loss", "perplexity", "exact_match"} <= row.keys() for row in table)
    assert len({row["loss"] for row in table}) == 3
    assert table[-1]["loss"] == pytest.approx(report.evaluation["after"]["loss"], rel=1e-4)
    assert 0 <= report.own["evaluation"]["area"]["exact_match"] <= 1
    assert any("will be drawn in about 2.0 of the 6 steps" in warning for warning in report.warnings)
    nested = read_layout(adapter).header.metadata["rankwise_dylora"]
    assert nested == '{"ranks":[2,4,8],"scale_mode":"constant"}'


def test_the_area_is_a_mean_over_the_logarithm_of_the_rank() -> None:
    assert area((1, 2, 4, 8), [0.5] * 4) == 0.5
    assert area((1, 2, 8), [0.0, 1.0, 1.0]) == pytest.approx((0.5 + 2.0) / 3)
    assert area((4,), [0.25]) == 0.25


@pytest.mark.parametrize(
    ("parameters", "pointer", "words"),
    [
        ({"rank": 4, "min_rank": 5}, "min_rank", "5 is above rank, which is 4"),
        ({"rank": 0}, "rank", "greater than or equal to 1"),
        ({"min_rank": 0}, "min_rank", "greater than or equal to 1"),
        ({"alpha": 0.0}, "alpha", "greater than 0"),
        ({"alpha": float("inf")}, "alpha", "finite"),
        ({"dropout": 1.0}, "dropout", "less than 1"),
        ({"ranks": [1, 4, 2, 8]}, "ranks", "must rise"),
        ({"ranks": [1, 2, 4]}, "ranks", "must end with rank, which is 8: components 5 to 8 would never be trained"),
        ({"ranks": [1, 8], "min_rank": 2}, "ranks", "between min_rank and rank, 2 and 8"),
        ({"ranks": [1, 9]}, "ranks", "between min_rank and rank, 1 and 8"),
        ({"distribution": [1.0, 2.0]}, "distribution", "has 2 weights for 8 ranks"),
        ({"distribution": [0.0] * 8}, "distribution", "all weights are 0"),
        ({"distribution": [1.0] * 7 + [0.0]}, "distribution", "the largest rank has weight 0"),
        ({"distribution": [-1.0] * 8}, "distribution", "greater than or equal to 0"),
        ({"update_scope": "strict", "frozen": False}, "update_scope", "strict needs frozen"),
        ({"scale_mode": "root"}, "scale_mode", "alpha_over_b"),
        ({"frozen": 1}, "frozen", "boolean"),
    ],
)
def test_what_can_not_be_trained_is_refused_where_it_stands(
    parameters: dict[str, Any], pointer: str, words: str
) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("dylora", parameters)
    (finding,) = caught.value.errors
    assert finding.pointer == f"/parameters/{pointer}"
    assert words in finding.message


def test_a_rank_above_a_side_of_a_layer_is_refused_with_its_name() -> None:
    known = Circumstances([Target("layers.0.q_proj", 16, 4)], TrainingSettings(steps=100), 100)
    with pytest.raises(RequestInvalid, match=r"Rank 8 is above 4, the smaller side of layers.0.q_proj"):
        check_method(parse_parameters("dylora", {}), known)
    options = parse_parameters("dylora", {"rank": 4})
    check_method(options, known)
    assert options.warnings(known) == []
