"""IncreLoRA: the exact promises of its layers, its growth, its scores and its exports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from growing_toys import Maps, drive, prepared, settings_of, taught
from peft import PeftModel
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.heat_map import HeatMap
from train.growing_layers import GrowingLinear, distance_from_orthonormal
from train.options.increlora import IncreloraOptions
from train.quiet import peft_deprecations_ignored

RANDOM: dict[str, Any] = {"target_rank": 2, "alpha": 8.0}


def random_layer(rank: int = 2, largest: int = 6, reserve: int = 2, d_out: int = 7, d_in: int = 6) -> GrowingLinear:
    """With a λ for every component that counts."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(d_in, d_out)
    layer = GrowingLinear(
        base,
        rank=rank,
        largest=largest,
        reserve=reserve,
        reserve_weight=1e-5,
        alpha=8.0,
        dropout=0.0,
        generator=generator,
    )
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.normal_(generator=generator)
        layer.lora_lambda[:rank].normal_(generator=generator)
    return layer


def delta(layer: GrowingLinear, first: int = 0, last: int | None = None) -> Tensor:
    """ΔW of components first to last, (d_out, d_in), in float64."""
    rows = slice(first, layer.live if last is None else last)
    a, b, weights = (value.detach()[rows].double() for value in (layer.lora_A, layer.lora_B, layer.lora_lambda))
    return layer.scaling * (b * weights[:, None]).T @ a


# --- the layer


def test_at_the_start_nothing_changes_but_for_what_is_in_advance() -> None:
    model = Maps()
    method = prepared(model, **RANDOM)
    for layer in method.growing.values():
        x = torch.randn(9, layer.d_in)
        added = layer(x) - layer.base(x)
        a, b = layer.lora_A[layer.rank : layer.live], layer.lora_B[layer.rank : layer.live]
        bound = 1e-5 * 8.0 * (a.norm(dim=1) * b.norm(dim=1)).sum() * x.norm(dim=1)
        assert bool((added.norm(dim=1) <= bound + 1e-9).all())
        assert float(delta(layer).norm()) > 0
        layer.silence_reserve()
        assert torch.equal(layer(x), layer.base(x))


def test_the_weight_in_advance_is_fixed_while_its_vectors_learn_and_trains_once_it_counts() -> None:
    model = Maps(2)
    method = prepared(model, **RANDOM, interval=3, wait=0, layers_per_round=2, total_rank=6, increment=2)
    layer = next(iter(method.growing.values()))
    start = [value.detach().clone() for value in (layer.lora_A, layer.lora_B, layer.lora_lambda)]
    seen: dict[int, Tensor] = {}

    def watch(step: int) -> None:
        assert layer.lora_lambda.grad is not None
        seen[step] = layer.lora_lambda.detach().clone()
        if step < 3:
            assert not layer.lora_lambda.grad[1:].any()
            assert torch.equal(seen[step][1:3], torch.full((2,), 1e-5))
        else:
            assert layer.rank == 3
            assert float(layer.lora_lambda.grad[1:3].abs().max()) > 0 or step == 3

    drive(method, model, taught(model, [3, 3]), 6, watch=watch)
    assert torch.equal(seen[3][1:3], torch.full((2,), 1e-5))  # counts, and joins behind this step
    assert bool((layer.lora_lambda[1:3] != 1e-5).all())
    for now, before in ((layer.lora_A, start[0]), (layer.lora_B, start[1])):
        assert bool((now.detach() != before)[:3].all())


@pytest.mark.parametrize("gain", [1, 2])
def test_growth_shrinks_the_update_as_the_authors_do_or_keeps_it(gain: int) -> None:
    layer = random_layer()
    before, old = delta(layer), delta(layer, 0, 2)
    layer.grow(gain)
    shrunk = (2 + 1e-5) / (2 + gain + 1e-5)
    torch.testing.assert_close(delta(layer, 0, 4), before * shrunk, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer.scaling, 8.0 / (2 + gain + 1e-5))
    layer.rescale(gain)
    torch.testing.assert_close(delta(layer, 0, 2), old, rtol=0, atol=1e-6 * float(old.abs().max()))


@pytest.mark.parametrize("how", ["rescale", "official"])
def test_a_round_of_a_training_keeps_the_update_or_lets_it_shrink(how: str) -> None:
    model = Maps(2)
    parameters = {"target_rank": 2, "increment": 1, "layers_per_round": 2, "interval": 3, "wait": 0}
    method = prepared(model, **parameters, **({} if how == "rescale" else {"on_growth": how}))
    losses = taught(model, [3, 3])
    layers = list(method.growing.values())
    before: list[Tensor] = []

    def kept(step: int) -> list[Tensor]:
        """The losses, after a note of ΔW as the step finds it."""
        if step == 3:
            before[:] = [delta(layer, 0, 1) for layer in layers]
        return losses(step)

    found: list[Tensor] = []
    drive(method, model, kept, 4, watch=lambda step: found.extend(delta(x, 0, 1) for x in layers if step == 3))
    assert [layer.rank for layer in layers] == [2, 2]
    share = 1.0 if how == "rescale" else (1 + 1e-5) / (2 + 1e-5)
    for old, new in zip(before, found, strict=True):
        assert float(old.norm()) > 0
        torch.testing.assert_close(new, share * old, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reserve_counts", [True, False])
def test_the_forward_pass_is_the_sum_of_all_live_components(reserve_counts: bool) -> None:
    layer = random_layer()
    if not reserve_counts:
        layer.silence_reserve()
    x = torch.randn(3, 4, 6)
    expected = x.double() @ (layer.weight.double() + delta(layer)).T + layer.base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_leaves_the_branch_exact() -> None:
    layer = random_layer()
    x = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch = layer.adapter(x)
    assert branch.dtype is torch.float32
    torch.testing.assert_close(branch, layer.adapter(x), rtol=0, atol=0)


def test_the_distance_from_orthonormal_sees_two_equal_directions() -> None:
    assert float(distance_from_orthonormal(torch.eye(3, 5))) == 0
    twice = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert float(distance_from_orthonormal(twice)) == pytest.approx(2**0.5)
    assert sum(float(distance_from_orthonormal(row[None])) for row in twice) == 0  # one by one nothing is seen
    layer = random_layer()
    live = [layer.lora_A.detach()[:4], layer.lora_B.detach()[:4]]
    wanted = sum(float((m @ m.T - torch.eye(4)).square().sum().sqrt()) for m in live)
    assert layer.orthogonality().item() == pytest.approx(wanted, rel=1e-6)


def test_the_regulariser_is_the_mean_over_all_matrices() -> None:
    model = Maps()
    method = prepared(model, **RANDOM, orthogonality=0.3)
    found = method.extra_loss(model)
    wanted = sum(layer.orthogonality().item() for layer in method.growing.values()) / 6
    assert found is not None
    assert found.item() == pytest.approx(0.3 * wanted, rel=1e-6)
    assert prepared(Maps(), **RANDOM, orthogonality=0.0).extra_loss(model) is None


# --- the score


def dense_gradient(layer: GrowingLinear, batches: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """∂L/∂ΔW by autograd, from a ΔW that is one matrix."""
    matrix = delta(layer).float().requires_grad_()
    total = sum(loss(layer.base(x) + x @ matrix.T) for x in batches)
    (found,) = torch.autograd.grad(total, matrix)
    return found


@pytest.mark.parametrize(("rows", "kept"), [(1, "pieces"), (40, "product")])
def test_the_score_is_that_of_the_whole_step_whatever_is_kept(
    rows: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two forward passes, in tiles of two rows, with both ways to keep the gradient."""
    monkeypatch.setattr("train.update_importance.TILE", 12)
    layer = random_layer()
    batches = [torch.randn(rows, 6), torch.randn(rows, 6)]

    def loss(y: Tensor) -> Tensor:
        return y.square().mean() + y.sin().sum()

    wanted = dense_gradient(layer, batches, loss)
    layer.scored = "gradient"
    for x in batches:
        loss(layer(x)).backward()
    assert (layer._gradient._product is None) is (kept == "pieces")
    found = float(layer.importance())
    assert found == pytest.approx(float((delta(layer).float() * wanted).abs().sum()), rel=1e-4)
    only_last = dense_gradient(layer, batches[1:], loss)
    assert found != pytest.approx(float((delta(layer).float() * only_last).abs().sum()), rel=1e-2)
    layer.forget_gradients()
    assert float(layer.importance()) == 0


def test_the_sum_over_the_matrix_is_the_sum_over_the_weights() -> None:
    """Σ ΔW∘∂L/∂ΔW = Σ λᵢ·∂L/∂λᵢ, also of the components in advance."""
    layer = random_layer()
    batches = [torch.randn(4, 6), torch.randn(2, 6)]

    def loss(y: Tensor) -> Tensor:
        return y.square().sum()

    signed = float((delta(layer).float() * dense_gradient(layer, batches, loss)).sum())
    layer.scored = "lambda"
    for x in batches:
        loss(layer(x)).backward()
    weights = layer.lora_lambda.detach()[: layer.live]
    assert float((weights * layer.weight_gradient()).sum()) == pytest.approx(signed, rel=1e-5)
    assert float(layer.importance()) == pytest.approx(abs(signed), rel=1e-5)
    assert layer.lora_lambda.grad is not None
    torch.testing.assert_close(layer.weight_gradient()[:2], layer.lora_lambda.grad[:2])
    assert not layer.lora_lambda.grad[2:].any()
    assert bool((layer.weight_gradient()[2:] != 0).all())


@pytest.mark.parametrize("score", ["gradient", "lambda"])
def test_a_batch_in_parts_scores_as_the_batch(score: str) -> None:
    found = []
    for parts in (1, 4):
        model = Maps()
        method = prepared(model, **RANDOM, score=score, orthogonality=0.0)
        for layer in method.growing.values():
            layer.lora_lambda.data[: layer.rank] = 0.3
        x, y = (torch.randn(3, 8, size, generator=torch.Generator().manual_seed(size)) for size in (5, 6))

        def losses(step: int, x: Tensor = x, y: Tensor = y, parts: int = parts, model: Maps = model) -> list[Tensor]:
            pieces = zip(x.chunk(parts, 1), y.chunk(parts, 1), strict=True)
            return [(model(a) - b).square().mean() for a, b in pieces]

        drive(method, model, losses, 1)
        found.append(method.importance.mean)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert min(found[0].values()) > 0


def test_the_norm_of_the_score_is_the_root_of_the_entries_or_their_number() -> None:
    means = {}
    for norm in ("root", "mean"):
        model = Maps()
        method = prepared(model, **RANDOM, score_norm=norm)
        for layer in method.growing.values():
            layer.lora_lambda.data[: layer.rank] = 0.3
        drive(method, model, taught(model, [1, 1, 1]), 1)
        means[norm] = method.importance.mean
    assert means["root"] == pytest.approx({path: value * 30**0.5 for path, value in means["mean"].items()})


def test_nothing_is_kept_where_nothing_is_scored() -> None:
    model = Maps()
    method = prepared(model, **RANDOM, interval=4, wait=4, score_steps=2)
    scored = []
    drive(
        method,
        model,
        taught(model, [1, 1, 1]),
        10,
        watch=lambda step: scored.append(any(layer._gradient._entries for layer in method.growing.values())),
    )
    assert scored == [step in {7, 8} for step in range(10)]


# --- the growth


def test_the_budget_is_met_exactly_and_then_nothing_moves_it() -> None:
    model = Maps(3)
    method = prepared(model, total_rank=8, increment=2, layers_per_round=2, interval=3)
    totals: list[int] = []
    shown: list[tuple[float, float]] = []

    def watch(step: int) -> None:
        totals.append(sum(layer.rank for layer in method.growing.values()))
        shown.append(tuple(method.metrics().values()))  # type: ignore[arg-type]

    drive(method, model, taught(model, [2, 2, 2]), 16, watch=watch)
    assert totals == [3] * 6 + [7] * 3 + [8] * 7  # the first round is at twice the interval
    assert [step for step, _ in method.history] == [6, 9]
    assert shown[-1] == (8.0, max(layer.rank for layer in method.growing.values()))
    for layer in method.growing.values():
        assert layer.rank >= 1
        assert not layer.lora_lambda[layer.rank :].any()


def test_every_group_of_the_optimiser_has_a_schedule_of_its_own() -> None:
    model = Maps(3)
    method = prepared(model, total_rank=7, increment=2, layers_per_round=1, interval=4, wait=0)
    rates: list[list[float]] = []

    def watch(step: int) -> None:
        assert method.groups is not None
        rates.append([group["lr"] for group in method.groups.optimizer.param_groups])

    drive(method, model, taught(model, [2, 2, 2]), 40, watch=watch)
    assert method.groups is not None
    joined = [group["start"] for group in method.groups.optimizer.param_groups]
    assert joined == [0, 4, 8]
    for number, start in enumerate(joined):
        own = [rate[number] for rate in rates[start:]]
        assert own[:3] == pytest.approx([0.0, 0.005, 0.01])
        assert max(own) == pytest.approx(0.01)
        assert own == pytest.approx([*own[:3], *(0.01 * (40 - start - u) / (38 - start) for u in range(3, len(own)))])
    assert [group["lr"] for group in method.groups.optimizer.param_groups] == [0.0, 0.0, 0.0]


def test_without_room_to_grow_it_is_a_lora_with_a_diagonal() -> None:
    model = Maps(2)
    method = prepared(model, initial_rank=2, target_rank=2, orthogonality=0.0, alpha=4.0)
    assert method.spent
    layers = list(method.growing.values())
    plain = [
        [value.detach()[:2].clone().requires_grad_() for value in (p.lora_A, p.lora_B, p.lora_lambda)] for p in layers
    ]
    optimizer = torch.optim.AdamW([value for layer in plain for value in layer], lr=0.01, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    xs, ys = torch.randn(2, 8, 5), torch.randn(2, 8, 6)
    drive(method, model, lambda _: [(model(xs) - ys).square().mean()], 12, schedule="constant", warmup_steps=0)
    for _ in range(12):
        outputs = [
            layer.base(x) + (x @ a.T * weights * (4.0 / (2 + 1e-5))) @ b
            for layer, x, (a, b, weights) in zip(layers, xs, plain, strict=True)
        ]
        (torch.stack(outputs) - ys).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert method.history == []
    for layer, values in zip(layers, plain, strict=True):
        for found, wanted in zip((layer.lora_A, layer.lora_B, layer.lora_lambda), values, strict=True):
            torch.testing.assert_close(found[:2], wanted, rtol=1e-4, atol=1e-6)
    assert any(float(layer.lora_lambda.detach()[:2].abs().max()) > 0.05 for layer in layers)


# --- the exports


@pytest.fixture
def grown(tiny_base: Path) -> Iterator[tuple[Any, Any]]:
    """The tiny base model with unlike ranks and random components, and the method that made it."""
    from transformers import AutoModelForCausalLM

    from train.methods.increlora import Increlora
    from train.protocol import MethodContext

    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    targets = sorted(path for path, _ in model.named_modules() if path.endswith(("q_proj", "v_proj", "down_proj")))
    method = Increlora(IncreloraOptions(target_rank=4))
    method.prepare(model, MethodContext(targets, 40, lambda: iter(()), settings_of()))
    for number, layer in enumerate(method.growing.values()):
        layer.grow(number % 4)
        with torch.no_grad():
            layer.lora_A.normal_()
            layer.lora_B.normal_()
            layer.lora_lambda[: layer.rank].normal_(0, 0.05)
        layer.silence_reserve()
    yield model, method


@pytest.mark.parametrize("form", ["padded", "patterns"])
def test_both_exports_are_the_components_that_count(
    grown: tuple[Any, Any], tiny_base: Path, tmp_path: Path, form: str
) -> None:
    from transformers import AutoModelForCausalLM

    model, method = grown
    method.options = IncreloraOptions(target_rank=4, export=form)
    ids = torch.tensor([[5, 60, 70, 9, 33]])
    with torch.no_grad():
        wanted = model(ids).logits
    method.export(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with peft_deprecations_ignored():
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert float((loaded.get_base_model()(ids).logits - wanted).abs().max()) <= 1e-4

    opened = Adapter.open(tmp_path)
    ranks = {path: layer.rank for path, layer in method.growing.items()}
    assert len(set(ranks.values())) > 1
    for path, factors in opened.items():
        found = factors.scaling * factors.B.double() @ factors.A.double()
        layer = method.growing[path]
        scale = float(delta(layer, 0, layer.rank).abs().max())
        tolerance = 1e-5 if form == "patterns" else 1e-6  # patterns leave out what the scaling adds to the rank
        torch.testing.assert_close(found, delta(layer, 0, layer.rank), rtol=0, atol=tolerance * scale)
        assert factors.A.shape[0] == (ranks[path] if form == "patterns" else max(ranks.values()))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {}
    if form == "padded":
        assert (config["rank_pattern"], config["r"], config["lora_alpha"]) == ({}, 4, 4)
    else:
        assert config["rank_pattern"] == {"^" + path.replace(".", r"\."): rank for path, rank in ranks.items()}
        assert config["lora_alpha"] == 16


def test_a_training_that_grows_goes_on_in_the_middle_of_it_and_shows_its_ranks(trainings: Any) -> None:
    parameters = {"target_rank": 2, "layers_per_round": 5, "interval": 2, "wait": 2, "score": "lambda", "dropout": 0.1}
    settings: dict[str, Any] = {"steps": 12, "warmup_steps": 1, "learning_rate": 0.05}
    report, adapter, whole = trainings.run(
        "increlora", parameters | {"on_growth": "official"}, **settings, checkpoint_steps=7
    )
    assert [round_["step"] for round_ in report.own["growth"]] == [4, 6, 8]
    again, resumed, watcher = trainings.run(
        "increlora", parameters | {"on_growth": "official"}, **settings, resume=whole.checkpoints[7]
    )
    assert again.own == report.own
    assert watcher.points == {at: values for at, values in whole.points.items() if at > 7}
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (adapter / name).read_bytes()

    ranks = report.own["ranks"]
    assert sum(ranks.values()) == report.own["total_rank"] == report.own["budget"] == 28
    assert whole.points[12]["total_rank"] == 28
    factors = dict(Adapter.open(adapter).items())
    wanted = sum(
        (rank + 1) * (factors[path].A.shape[1] + factors[path].B.shape[0]) + rank for path, rank in ranks.items()
    )
    assert report.trainable_parameters == wanted  # the room for what never came is not counted
    picture = HeatMap.of(report.own["pictures"][0])
    assert list(picture.rows) == ["model.layers.0", "model.layers.1"]
    shown = {
        f"{row}.{column}": value
        for row, values in zip(picture.rows, picture.values, strict=True)
        for column, value in zip(picture.columns, values, strict=True)
    }
    assert shown == ranks
    assert any("grow during 67 %" in text for text in report.warnings)


def test_a_training_that_ends_early_drops_what_is_in_advance() -> None:
    model = Maps()
    method = prepared(model, **RANDOM, interval=30)
    drive(method, model, taught(model, [1, 1, 1]), 3)
    assert not method.spent
    method.settle(model)
    for layer in method.growing.values():
        torch.testing.assert_close(delta(layer), delta(layer, 0, layer.rank), rtol=0, atol=0)
