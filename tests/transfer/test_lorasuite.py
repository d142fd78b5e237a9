"""LoRASuite: assignments against brute force, the formulas against dense matrices, and a whole transfer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import load, order, write_llama
from transfers import SEEDS, Pair

from artifacts.errors import TransferRefused
from transfer.layer_matching import assign, cosine, linear_cka, match_heads, monotone_match
from transfer.methods.lorasuite import LayerPair, LoraSuiteBase, read_base, transplant, word_bridge
from transfer.weight_protocol import Delta

TEXTS = [order(number)[0] for number in range(6)]


def test_cka_knows_rotations() -> None:
    draws = np.random.default_rng(0)
    one = draws.normal(size=(40, 6))
    turned = one @ np.linalg.qr(draws.normal(size=(6, 6)))[0] * 3 + 5
    assert linear_cka(one, turned) == pytest.approx(1.0)
    assert linear_cka(one, draws.normal(size=(40, 4))) < 0.5
    assert linear_cka(one, np.ones((40, 2))) == 0.0


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 3)])
def test_layers_are_matched_best_in_order(shape: tuple[int, int]) -> None:
    draws = np.random.default_rng(sum(shape))
    for _ in range(10):
        gain = draws.normal(size=shape)
        found = monotone_match(gain)
        size = min(shape)
        best = max(
            sum(gain[row, column] for row, column in zip(rows, columns, strict=True))
            for rows in itertools.combinations(range(shape[0]), size)
            for columns in itertools.combinations(range(shape[1]), size)
        )
        assert sum(gain[pair] for pair in found) == pytest.approx(best)
        assert found == sorted(found)
        assert len(found) == size


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 5), (1, 4)])
def test_heads_are_assigned_best(shape: tuple[int, int]) -> None:
    draws = np.random.default_rng(sum(shape))
    for _ in range(10):
        gain = draws.normal(size=shape)
        found = assign(gain)
        assert len(set(found)) == shape[0]
        best = max(
            sum(gain[row, column] for row, column in enumerate(columns))
            for columns in itertools.permutations(range(shape[1]), shape[0])
        )
        assert sum(gain[row, column] for row, column in enumerate(found)) == pytest.approx(best)


def test_fewer_source_heads_serve_several() -> None:
    found = match_heads(np.random.default_rng(0).normal(size=(5, 2)))
    assert sorted(set(found)) == [0, 1]
    assert max(found.count(0), found.count(1)) == 3


def test_the_cosine_is_that_of_whole_products() -> None:
    draws = np.random.default_rng(0)
    a, b, c, d = (draws.normal(size=(width, 9)) for width in (3, 3, 4, 4))
    one, other = a.T @ b, c.T @ d
    wanted = (one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other))
    assert cosine((a, b), (c, d)) == pytest.approx(wanted)
    assert cosine((a, b), (0 * c, d)) == 0.0


def base_of(folder: Path, layers: set[int] | None = None) -> LoraSuiteBase:
    model, tokenizer = load(folder)
    return read_base(model, tokenizer, TEXTS, 3, layers)


@pytest.fixture(scope="module")
def bases(pair: Pair) -> tuple[LoraSuiteBase, LoraSuiteBase]:
    return base_of(pair.source), base_of(pair.target)


def test_the_bridge_maps_words_in_common(bases: tuple[LoraSuiteBase, LoraSuiteBase]) -> None:
    source, target = bases
    bridge = word_bridge(source, target)
    assert bridge.shape == (32, 40)
    common = sorted(source.vocabulary.keys() & target.vocabulary.keys())
    own = source.words[[source.vocabulary[word] for word in common]].double()
    other = target.words[[target.vocabulary[word] for word in common]].double()
    torch.testing.assert_close(bridge.double(), torch.linalg.pinv(own) @ other, atol=1e-4, rtol=1e-3)
    assert torch.equal(word_bridge(source, source), torch.eye(32))
    few = LoraSuiteBase(target.weights, target.words, {"a": 1}, target.heads, target.states, target.prefix)
    with pytest.raises(TransferRefused, match="words in common; 32 are needed"):
        word_bridge(source, few)


def delta(sides: tuple[int, ...], rank: int = 3) -> Delta:
    return Delta(torch.randn(sides[0], rank), torch.randn(rank, sides[1]))


def dense(layer: LayerPair, source: LoraSuiteBase, target: LoraSuiteBase, rest: str, own: Delta) -> torch.Tensor:
    """The formulas, head by head, with whole matrices."""
    W_s, W_t = source.weights[f"model.layers.0.{rest}"], target.weights[f"model.layers.1.{rest}"]
    W_s, W_t, bridge = W_s.double(), W_t.double(), word_bridge(source, target).double()
    change = (own.B @ own.A).double()
    if rest.startswith("mlp"):
        if rest.endswith("down_proj"):
            return bridge.T @ change @ torch.linalg.pinv(bridge.T @ W_s, rtol=1e-5) @ W_t
        return W_t @ torch.linalg.pinv(W_s @ bridge, rtol=1e-5) @ change @ bridge
    one, other = source.heads, target.heads
    blocks: dict[int, list[torch.Tensor]] = {}
    for head, matched in enumerate(layer.heads):
        if rest.endswith("o_proj"):
            columns = slice(matched * one.width, (matched + 1) * one.width)
            P = W_s[:, columns].T @ bridge @ W_t[:, head * other.width : (head + 1) * other.width]
            blocks.setdefault(head, []).append(bridge.T @ change[:, columns] @ P)
            continue
        row, column = (head, matched) if rest.endswith("q_proj") else (head // 4, matched // 2)
        rows = slice(column * one.width, (column + 1) * one.width)
        P = W_s[rows] @ bridge @ W_t[row * other.width : (row + 1) * other.width].T
        blocks.setdefault(row, []).append(P.T @ change[rows] @ bridge)
    means = [torch.stack(blocks[number]).mean(0) for number in sorted(blocks)]
    return torch.cat(means, dim=1 if rest.endswith("o_proj") else 0)


@pytest.mark.parametrize(
    "rest",
    [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")],
)
def test_factors_give_what_whole_matrices_give(bases: tuple[LoraSuiteBase, LoraSuiteBase], rest: str) -> None:
    source, target = bases
    layer = LayerPair(source, target, 0, 1, word_bridge(source, target))
    own = delta(tuple(source.weights[f"model.layers.0.{rest}"].shape))
    (path, found), *others = layer.moved({rest: own}).items()
    assert path == f"model.layers.1.{rest}"
    assert not others
    assert found.A.shape[0] == 3
    wanted = dense(layer, source, target, rest, own)
    assert wanted.shape == target.weights[path].shape
    scale = float(wanted.abs().max())
    torch.testing.assert_close((found.B @ found.A).double() / scale, wanted / scale, atol=1e-4, rtol=1e-3)


def test_heads_that_changed_places_are_found(tmp_path: Path) -> None:
    """The same base with its groups of heads in another order, and its two layers as they were."""
    first = base_of(write_llama(tmp_path / "one"))
    weights: dict[str, Any] = dict(first.weights)
    for name, weight in first.weights.items():
        leaf = name.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj", "v_proj"):
            weights[name] = torch.cat(list(weight.chunk(2))[::-1])
        elif leaf == "o_proj":
            weights[name] = torch.cat(list(weight.chunk(2, dim=1))[::-1], dim=1)
    second = LoraSuiteBase(weights, first.words, first.vocabulary, first.heads, first.states, first.prefix)
    layer = LayerPair(first, second, 0, 0, word_bridge(first, second))
    assert layer.heads == [2, 3, 0, 1]
    _, pairs = transplant({"model.layers.0.self_attn.q_proj": delta((32, 32))}, first, second)
    assert pairs == [(0, 0), (1, 1)]


def test_nothing_to_move_is_told(bases: tuple[LoraSuiteBase, LoraSuiteBase]) -> None:
    with pytest.raises(TransferRefused, match="No adapted layer"):
        transplant({"model.embed_tokens": delta((4, 4))}, *bases)


@pytest.mark.parametrize("keep_scale", [True, False])
def test_a_transfer_starts_from_the_weights_and_learns(pair: Pair, tmp_path: Path, keep_scale: bool) -> None:
    training = {"steps": 2, "learning_rate": 1e-4, "batch_size": 4}
    found = pair.run(
        tmp_path, "lorasuite", changes={"inputs": TEXTS}, training=training, keep_scale=keep_scale, target_parameters={}
    )
    assert found.report["inputs"]["used"] == 6
    assert found.report["inputs"]["layers"] == [[0, 0], [1, 1]]
    assert found.report["training"]["steps"] == 2
    assert found.report["training"]["target_modules"] == 14
    again = pair.run(
        tmp_path, "lorasuite", changes={"inputs": TEXTS}, training=training, keep_scale=keep_scale, target_parameters={}
    )
    assert again.report == found.report
    assert (tmp_path / "start" / "adapter_config.json").exists()


def test_it_needs_inputs(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(TransferRefused, match="three different inputs"):
        pair.run(tmp_path, "lorasuite", changes={"inputs": SEEDS[:2]}, target_parameters={})
