"""SMoRA: the exact promises of its gates, its balance bias, its forward and backward pass, and its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_nets import Net, in_batches, prepare, regression_rows
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from artifacts.errors import BaseMismatch, NotMergeable
from artifacts.intake import inspect
from train import declared
from train.methods.smora import load_of
from train.smora_layer import Shape, SmoraLinear, Tally

D_IN, D_OUT, RANK, ACTIVE = 11, 9, 8, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(
    rank: int = RANK, active: int = ACTIVE, partition: int = 1, *, in_gate: bool = False, trained: bool = True
) -> SmoraLinear:
    """A layer in evaluation mode; `trained` gives it a B and a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = SmoraLinear(nn.Linear(D_IN, D_OUT), Shape(rank, active, 5.0, partition, in_gate))
    if trained:
        layer.lora_B.data.normal_(generator=generator(1))
        layer.lora_bias.data.normal_(0, 0.05, generator=generator(2))
    return layer.eval()


def tokens(count: int = 40, seed: int = 3) -> Tensor:
    return torch.randn(count, D_IN, generator=generator(seed))


def gates_of(layer: SmoraLinear, x: Tensor) -> Tensor:
    return layer.gates(functional.linear(x, layer.lora_router))


def sparse(layer: SmoraLinear, x: Tensor) -> Tensor:
    """The layer as its definition has it, token by token: gathered rows of A and columns of B."""
    shape = layer.shape
    q = torch.sigmoid(x @ layer.lora_router.T).repeat_interleave(shape.partition, -1)
    order = q + layer.lora_bias.repeat_interleave(shape.partition)
    out = []
    for token, own, by in zip(x, q, order, strict=True):
        chosen = by.topk(shape.active).indices
        values = by[chosen] if shape.bias_in_gate else own[chosen]
        gates = shape.active * values / values.sum()
        inner = layer.lora_A[chosen] @ token
        out.append(shape.alpha / shape.active * layer.lora_B[:, chosen] @ (gates * inner))
    return layer.base(x) + torch.stack(out)  # type: ignore[no-any-return]


def test_at_the_start_it_is_the_base_layer() -> None:
    layer, x = made(trained=False), tokens()
    assert torch.equal(layer(x), layer.base(x))


def test_with_all_components_and_a_constant_router_it_is_a_lora() -> None:
    layer, x = made(active=RANK), tokens()
    layer.lora_router.data.zero_()
    expected = layer.base(x) + 5.0 / RANK * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_gate", [False, True])
def test_exactly_k_gates_of_a_token_are_open_and_they_sum_to_k(in_gate: bool) -> None:
    layer, x = made(in_gate=in_gate), tokens()
    gates = gates_of(layer, x).detach()
    assert bool(((gates > 0).sum(-1) == ACTIVE).all())
    assert float(gates.min()) == 0
    torch.testing.assert_close(gates.sum(-1), torch.full((len(x),), float(ACTIVE)), rtol=0, atol=1e-6)
    order = torch.sigmoid(x @ layer.lora_router.T) + layer.lora_bias
    assert torch.equal(gates > 0, order >= order.topk(ACTIVE).values[:, -1:])


def test_gates_survive_logits_that_no_sigmoid_can_tell_from_0() -> None:
    layer = made()
    logits = torch.full((4, RANK), -200.0) - torch.arange(RANK)
    gates = layer.gates(logits)
    torch.testing.assert_close(gates.sum(-1), torch.full((4,), float(ACTIVE)))


@pytest.mark.parametrize(("rank", "active", "partition"), [(8, 3, 1), (8, 4, 2), (8, 1, 1), (6, 6, 3)])
@pytest.mark.parametrize("in_gate", [False, True])
def test_the_masked_form_is_the_sparse_one_forwards_and_backwards(
    rank: int, active: int, partition: int, in_gate: bool
) -> None:
    layer, x = made(rank, active, partition, in_gate=in_gate), tokens()
    names = ("lora_A", "lora_B", "lora_router")
    weights = torch.randn(len(x), D_OUT, generator=generator(4))
    found = {}
    for name, forward in (("masked", layer), ("sparse", lambda given: sparse(layer, given))):
        layer.zero_grad()
        y = forward(x)
        (y * weights).sum().backward()
        found[name] = (y.detach(), [getattr(layer, part).grad.clone() for part in names])
    torch.testing.assert_close(found["masked"][0], found["sparse"][0], rtol=0, atol=1e-5)
    for name, one, other in zip(names, found["masked"][1], found["sparse"][1], strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm()) + 1e-5, name


def test_what_is_off_gets_no_gradient_and_what_is_on_does() -> None:
    layer, x = made(), tokens(1)
    layer(x).square().sum().backward()
    on = gates_of(layer, x)[0] > 0
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert layer.lora_router.grad is not None
    for gradient in (layer.lora_A.grad, layer.lora_B.grad.T, layer.lora_router.grad):
        assert torch.equal(gradient.abs().sum(-1) > 0, on)
    assert not layer.lora_bias.requires_grad


def test_the_order_of_the_components_means_nothing() -> None:
    layer, other, x = made(), made(), tokens()
    order = torch.randperm(RANK, generator=generator(6))
    with torch.no_grad():
        other.lora_A.copy_(layer.lora_A[order])
        other.lora_B.copy_(layer.lora_B[:, order])
        other.lora_router.copy_(layer.lora_router[order])
        other.lora_bias.copy_(layer.lora_bias[order])
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=1e-5)


def test_large_partitions_are_a_mixture_of_loras_of_which_one_is_on() -> None:
    experts, size = 4, 2
    layer, x = made(experts * size, size, size), tokens()
    expected = layer.base(x)
    first = (torch.sigmoid(x @ layer.lora_router.T) + layer.lora_bias).argmax(-1)
    for number in range(experts):
        part = slice(number * size, (number + 1) * size)
        lora = 5.0 / size * (x @ layer.lora_A[part].T) @ layer.lora_B[:, part].T
        expected = expected + lora * (first == number)[:, None]
    assert len(first.unique()) > 1
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    layer, x = made(), tokens()
    order = torch.randperm(len(x), generator=generator(7))
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x[:5].view(1, 5, D_IN))[0], layer(x)[:5], rtol=0, atol=1e-6)


def test_bfloat16_keeps_choice_and_bias_in_full_precision() -> None:
    layer = made().to(torch.float32)
    layer.base.to(torch.bfloat16)
    layer.lora_bias.fill_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens().to(torch.bfloat16)).dtype == torch.bfloat16
    layer.balance(torch.arange(RANK), 1e-5)
    # bfloat16 has nothing between 1 and 1.0078
    assert float((layer.lora_bias - 1.0).abs().max()) == pytest.approx(1e-5, rel=0.05)


# --- the balance


def counting(layer: SmoraLinear, mask: Tensor | None = None) -> None:
    layer.tally = Tally(counting=True, mask=mask, gates=True)


def test_the_bias_moves_by_one_step_against_the_load() -> None:
    layer = made(trained=False)
    layer.balance(torch.tensor([9, 1, 4, 4, 3, 5, 2, 4]), 0.25)
    assert layer.lora_bias.tolist() == [-0.25, 0.25, 0, 0, 0.25, -0.25, 0.25, 0]


def test_what_counts_are_the_tokens_that_are_no_padding() -> None:
    layer, x = made(), tokens(12).view(3, 4, D_IN)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    counting(layer, mask)
    layer(x)
    gates = gates_of(made(), x[mask.bool()])
    assert torch.equal(layer.counts, (gates > 0).sum(0))
    assert layer.tokens == 7
    torch.testing.assert_close(layer.gate_sums, gates.detach().double().sum(0), rtol=1e-6, atol=1e-6)
    layer.clear()
    layer(x[0])  # of another shape: there is no mask for it
    assert int(layer.counts.sum()) == 4 * ACTIVE


def routed_net(**parameters: Any) -> tuple[Any, Net]:
    model = Net()
    rows = regression_rows()
    method = prepare("smora", {"rank": 6, "active_rank": 2, **parameters}, model, in_batches(rows))
    return method, model


def step(method: Any, model: Net, rows: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    for part in rows:
        with method.forward_pass(part):
            loss = model(**part).loss
        loss.backward()
    optimizer.step()
    method.after_update(model, 0)
    optimizer.zero_grad()


def test_in_a_step_of_several_passes_the_bias_moves_once_and_the_optimiser_does_not_know_it() -> None:
    """Balanced in the forward pass, it would move up to four times as far."""
    method, model = routed_net(bias_update_rate=0.01)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"{path}.lora_{part}" for path in ("first", "second") for part in ("A", "B", "router")}
    rows = list(in_batches(regression_rows(), 6)())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(method, model, rows, optimizer)
    for layer in method.routed.values():
        assert layer.lora_bias.abs().max() == pytest.approx(0.01)
        assert {round(value, 6) for value in layer.lora_bias.tolist()} <= {-0.01, 0.0, 0.01}
        assert int(layer.counts.sum()) == 0
    assert method.metrics()["load_max_over_mean"] > 1
    before = {path: layer.lora_bias.clone() for path, layer in method.routed.items()}
    model.eval()
    model(**regression_rows())  # an evaluation
    assert all(int(layer.counts.sum()) == 0 for layer in method.routed.values())
    step(method, model, [], optimizer)
    assert all(torch.equal(layer.lora_bias, before[path]) for path, layer in method.routed.items())


def test_a_rank_without_rows_counts_nothing() -> None:
    method, model = routed_net()
    with method.forward_pass({}, idle=True):
        model(**regression_rows())
    assert all(int(layer.counts.sum()) == 0 for layer in method.routed.values())


def test_a_rate_of_zero_balances_nothing() -> None:
    method, model = routed_net(bias_update_rate=0.0)
    step(method, model, [regression_rows()], torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(not layer.lora_bias.any() for layer in method.routed.values())


def test_computing_activations_again_changes_no_gradient_and_counts_nothing() -> None:
    found = []
    for again in (False, True):
        layer = made()
        counting(layer)
        x = tokens().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        layer.tally.counting = False
        assert y is not None
        y.square().sum().backward()
        assert layer.lora_router.grad is not None
        found.append((y.detach(), layer.lora_router.grad, x.grad, layer.counts))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert int(found[0][3].sum()) == 40 * ACTIVE


def test_the_load_is_told_by_its_largest_share() -> None:
    even = load_of(torch.tensor([[4, 4, 4, 4], [2, 2, 2, 2]]))
    assert even == {"load_max_over_mean": 1.0, "unused_experts": 0.0}
    skewed = load_of(torch.tensor([[16, 0, 0, 0], [2, 2, 2, 2]]))
    assert skewed == {"load_max_over_mean": 2.5, "unused_experts": 0.375}


# --- the adapter


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trainings import Trainings

    trainings = Trainings(tmp_path_factory.mktemp("smora"), tiny_base)
    return trainings, *trainings.run("smora", {"rank": 6, "active_rank": 2}, steps=3)


def test_the_adapter_holds_router_and_bias_and_is_read_back_exactly(trained: Any) -> None:
    _, report, adapter, watcher = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {"r": 6, "active_rank": 2, "lora_alpha": 4.0, "rank_partition": 1, "bias_in_gate": False}
    assert {name: config[name] for name in expected} == expected
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B", "lora_router", "lora_bias"}
    biases = [value for name, value in tensors.items() if name.endswith("lora_bias")]
    assert max(float(value.abs().max()) for value in biases) == pytest.approx(3e-3)
    assert report.reload["largest_difference"] <= 1e-5 < report.reload["effect"]
    manifest = inspect(adapter)
    assert (manifest.method, manifest.mergeable, manifest.rank) == ("smora", False, 6)
    assert watcher.points[3]["load_max_over_mean"] > 1


def test_activation_checkpointing_gives_the_same_adapter(trained: Any) -> None:
    trainings, _, adapter, _ = trained
    _, other, _ = trainings.run("smora", {"rank": 6, "active_rank": 2}, steps=3, gradient_checkpointing=True)
    name = "adapter_model.safetensors"
    one, two = (load_file(folder / name) for folder in (adapter, other))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7)


def test_shuffled_routers_are_another_model(trained: Any) -> None:
    """A loader that ignored the gates would not notice."""
    trainings, _, adapter, _ = trained
    model = declared.load(trainings.load_base(), adapter)
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        before = model(ids).logits
        for module in model.modules():
            if isinstance(module, SmoraLinear):
                module.lora_router.copy_(module.lora_router.roll(1, 0))
        assert float((model(ids).logits - before).abs().max()) > 1e-3


def test_there_is_nothing_to_fold_into_the_weights(trained: Any) -> None:
    trainings, _, adapter, _ = trained
    with pytest.raises(NotMergeable, match="no ΔW"):
        declared.fold(declared.load(trainings.load_base(), adapter))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"active_rank": 7}, "7 of 6 ranks can not be active"),
        ({"rank_partition": 4}, "in groups of 4"),
        ({"r": True}, "whole numbers"),
        ({"active_rank": None}, "whole numbers"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"bias_in_gate": 1}, "bias_in_gate"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    trained: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    trainings, _, adapter, _ = trained
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(BaseMismatch, match=words):
        declared.load(trainings.load_base(), tmp_path)
