"""LoRASuite (arXiv:2505.13515): a start for a short training, computed from both bases' weights.

Widths are bridged by the words that both vocabularies have, layers are paired by the likeness of what they compute,
heads by that of their weights. The scale of ΔW is lost on the way (P is no rotation), so that the result needs its
training: it is no transfer by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from artifacts.errors import FieldError, TransferRefused
from transfer.bench import Bench
from transfer.candidates import Candidate, first_accepted, screen
from transfer.evaluation import layer_states
from transfer.layer_matching import cosine, linear_cka, match_heads, monotone_match
from transfer.options import LorasuiteOptions
from transfer.sources import Drawn, PromptSource
from transfer.weight_protocol import Delta
from transfer.weight_transfer import read_deltas, weight_of, write_factors

LAYER = re.compile(r"(?P<before>.*\blayers)\.(?P<number>\d+)\.(?P<rest>(?:self_attn|mlp)\.(?P<leaf>\w+))")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SMALLEST = 1e-5
"""Singular values below this share of the largest are rounding of float32 weights."""
_SPACES = str.maketrans({"Ġ": "▁"})


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of queries, and of keys and values, and their width."""

    queries: int
    values: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        text = config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(text.num_attention_heads, text.num_key_value_heads or text.num_attention_heads, width)

    def value_head(self, query: int) -> int:
        """The head of keys and values that a head of queries reads."""
        return query // (self.queries // self.values)

    def cut(self, weight: Tensor, head: int) -> Tensor:
        """A head's rows."""
        return weight[head * self.width : (head + 1) * self.width]


@dataclass(frozen=True, slots=True, eq=False)
class LoraSuiteBase:
    """What is needed of a base: weights by path in float32, the words' table and its vocabulary, and what each layer
    computes of the same texts, (texts, width) each."""

    weights: Mapping[str, Tensor]
    words: Tensor
    vocabulary: Mapping[str, int]
    heads: Heads
    states: Sequence[np.ndarray[Any, np.dtype[np.float64]]]
    prefix: str


class LoraSuite(PromptSource):
    """The inputs that were kept, or else the seeds, answered by the source adapter, after a start from the weights."""

    def draw(self, bench: Bench) -> Drawn:
        given = bench.inputs.inputs or bench.inputs.seeds
        screened = screen([Candidate(index, text, "stop") for index, text in enumerate(given)], ())
        count = cast("LorasuiteOptions", bench.options).samples
        kept = first_accepted(screened, set(range(len(given))), count)
        if len(kept) < 3:
            raise TransferRefused(
                "At least three different inputs are needed to pair the layers of the two bases.",
                hint="Give inputs that were kept, or seeds.",
                errors=[FieldError("/inputs", "at least 3")],
            )
        texts = [item.text for item in kept]
        deltas = read_deltas(bench.inputs.adapter)
        bench.observer.unit("move", "pairing layers and heads")
        with bench.resident.plain_source() as model:
            tokenizer = bench.resident.source_tokenizer()
            source = read_base(model.get_base_model(), tokenizer, texts, bench.options.answer_batch, _layers(deltas))
        target = read_base(
            bench.resident.target(), bench.resident.target_tokenizer(), texts, bench.options.answer_batch, None
        )
        moved, pairs = transplant(deltas, source, target)
        if cast("LorasuiteOptions", bench.options).keep_scale:
            moved = {path: _scaled(path, delta, pairs, deltas, source, target) for path, delta in moved.items()}
        folder = bench.inputs.folder / "start"
        write_factors(folder, moved, bench.inputs.target.files.name)
        report = {"inputs": len(given), "used": len(kept), "layers": [list(pair) for pair in pairs]}
        return Drawn(tuple(kept), report=report, start=folder)


def read_base(
    model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, layers: set[int] | None
) -> LoraSuiteBase:
    """Copy what is needed of these layers (None: of all)."""
    weights: dict[str, Tensor] = {}
    prefix = ""
    for name, module in model.named_modules():
        found = LAYER.fullmatch(name.replace(".base_layer", ""))
        if found is None or not isinstance(module, nn.Linear) or found["leaf"] not in (*ATTENTION, *MLP):
            continue
        prefix = found["before"]
        if layers is None or int(found["number"]) in layers:
            weights[found[0]] = weight_of(model, name).float().clone()
    if not weights:
        raise TransferRefused(
            "The layers of a base model have no names that LoRASuite knows.",
            hint="Take trans-lora, which needs no names.",
            errors=[FieldError("/parameters", "needs q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")],
        )
    return LoraSuiteBase(
        weights,
        model.get_input_embeddings().weight.detach().float().clone(),
        {word.translate(_SPACES): number for word, number in tokenizer.get_vocab().items()},
        Heads.of(model.config),
        layer_states(model, tokenizer, texts, batch_size),
        prefix,
    )


def transplant(
    deltas: Mapping[str, Delta], source: LoraSuiteBase, target: LoraSuiteBase
) -> tuple[dict[str, Delta], list[tuple[int, int]]]:
    """ΔW for every module of the target that is paired with an adapted one, and the pairs (source, target) of layers.

    Raises:
        TransferRefused: the vocabularies have too few words in common, or nothing is paired.
    """
    bridge = word_bridge(source, target)
    likeness = np.array([[linear_cka(one, other) for other in target.states] for one in source.states])
    pairs = monotone_match(likeness)
    moved: dict[str, Delta] = {}
    for one, other in pairs:
        own = {
            found["rest"]: delta
            for path, delta in deltas.items()
            if (found := LAYER.fullmatch(path)) and int(found["number"]) == one
        }
        if own:
            layer = LayerPair(source, target, one, other, bridge)
            moved.update(layer.moved(own))
    if not moved:
        raise TransferRefused(
            "No adapted layer of the source base is paired with one of the target.",
            errors=[FieldError("/adapter", "adapts no layer that LoRASuite moves")],
        )
    return moved, pairs


def word_bridge(source: LoraSuiteBase, target: LoraSuiteBase) -> Tensor:
    """W_x (h_s×h_t) with E_s·W_x ≈ E_t over the words that both have; the identity for equal widths.

    Raises TransferRefused where they have fewer words in common than the source is wide.
    """
    h_s, h_t = source.words.shape[1], target.words.shape[1]
    if h_s == h_t:
        return torch.eye(h_s)
    common = sorted(source.vocabulary.keys() & target.vocabulary.keys())
    if len(common) < h_s:
        raise TransferRefused(
            f"The two vocabularies have {len(common)} words in common; {h_s} are needed to bridge the widths.",
            hint="Take trans-lora.",
            errors=[FieldError("/target_model", "too few words in common")],
        )
    own = source.words[[source.vocabulary[word] for word in common]]
    other = target.words[[target.vocabulary[word] for word in common]]
    solution: Tensor = torch.linalg.lstsq(own.double(), other.double(), driver="gelsd").solution
    return solution.float()


class LayerPair:
    """One layer of either base, with a source head for every head of the target."""

    def __init__(self, source: LoraSuiteBase, target: LoraSuiteBase, one: int, other: int, bridge: Tensor) -> None:
        self._source, self._target, self._bridge = source, target, bridge
        self._own, self._other = f"{source.prefix}.{one}.", f"{target.prefix}.{other}."
        self.heads = self._match()

    def moved(self, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
        """End of the path (self_attn.q_proj) → ΔW of the source, to path → ΔW of the target; others are left out."""
        found = {}
        for rest, delta in deltas.items():
            leaf = rest.rpartition(".")[2]
            if leaf in ATTENTION[:3]:
                found[self._other + rest] = self._rows(rest, delta)
            elif leaf == "o_proj":
                found[self._other + rest] = self._columns(rest, delta)
            elif leaf in MLP:
                found[self._other + rest] = self._inner(rest, delta)
        return found

    def _match(self) -> list[int]:
        own, other = self._source.heads, self._target.heads
        gain = np.zeros((other.queries, own.queries))
        mine = [self._factors(self._source, self._own, own, head, self._bridge) for head in range(own.queries)]
        theirs = [self._factors(self._target, self._other, other, head, None) for head in range(other.queries)]
        for row, target in enumerate(theirs):
            for column, source in enumerate(mine):
                gain[row, column] = (cosine(source[:2], target[:2]) + cosine(source[2:], target[2:])) / 2
        return match_heads(gain)

    @staticmethod
    def _factors(
        base: LoraSuiteBase, prefix: str, heads: Heads, head: int, bridge: Tensor | None
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Q, K, Oᵀ and V of a head, (width, h) each, in the target's width."""
        q, k, v, o = (base.weights[f"{prefix}self_attn.{leaf}"] for leaf in ATTENTION)
        value = heads.value_head(head)
        rows = (heads.cut(q, head), heads.cut(k, value), heads.cut(o.T, head), heads.cut(v, value))
        return [(row if bridge is None else row @ bridge).double().numpy() for row in rows]

    def _rows(self, rest: str, delta: Delta) -> Delta:
        """Queries, keys, values: ΔW_t,h' = Pᵀ·ΔW_s,h·W_x with P = W_s,h·W_x·W_t,h'ᵀ; of shared heads the mean."""
        own, other = self._source.heads, self._target.heads
        W_s, W_t = self._source.weights[self._own + rest], self._target.weights[self._other + rest]
        shared = not rest.endswith("q_proj")
        parts: list[list[Tensor]] = [[] for _ in range(other.values if shared else other.queries)]
        for head, matched in enumerate(self.heads):
            row, column = (other.value_head(head), own.value_head(matched)) if shared else (head, matched)
            P = own.cut(W_s, column) @ self._bridge @ other.cut(W_t, row).T
            parts[row].append(P.T @ own.cut(delta.B, column))
        B = torch.cat([torch.stack(part).mean(dim=0) for part in parts])
        return Delta(B, delta.A @ self._bridge)

    def _columns(self, rest: str, delta: Delta) -> Delta:
        """Outputs of heads: ΔW_t = W_xᵀ·ΔW_s·P, head by head, with P = O_s,hᵀ·W_x·O_t,h'."""
        own, other = self._source.heads, self._target.heads
        W_s, W_t = self._source.weights[self._own + rest].T, self._target.weights[self._other + rest].T
        parts = []
        for head, matched in enumerate(self.heads):
            P = own.cut(W_s, matched) @ self._bridge @ other.cut(W_t, head).T
            parts.append(own.cut(delta.A.T, matched).T @ P)
        return Delta(self._bridge.T @ delta.B, torch.cat(parts, dim=1))

    def _inner(self, rest: str, delta: Delta) -> Delta:
        """gate and up: M·ΔW_s·W_x with M = W_t·(W_s·W_x)⁺; down: W_xᵀ·ΔW_s·N with N = (W_xᵀ·W_s)⁺·W_t."""
        W_s, W_t = self._source.weights[self._own + rest], self._target.weights[self._other + rest]
        if rest.endswith("down_proj"):
            inverse = _pseudo_inverse(self._bridge.T.double() @ W_s.double())
            return Delta(self._bridge.T @ delta.B, (delta.A.double() @ inverse).float() @ W_t)
        inverse = _pseudo_inverse(W_s.double() @ self._bridge.double())
        return Delta(W_t @ (inverse @ delta.B.double()).float(), delta.A @ self._bridge)


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    """Without the directions that are nothing but rounding: a bridge to a wider model leaves some empty."""
    inverse: Tensor = torch.linalg.pinv(matrix, rtol=SMALLEST)
    return inverse


def _layers(deltas: Mapping[str, Delta]) -> set[int]:
    return {int(found["number"]) for path in deltas if (found := LAYER.fullmatch(path))}


def _scaled(
    path: str,
    moved: Delta,
    pairs: Sequence[tuple[int, int]],
    deltas: Mapping[str, Delta],
    source: LoraSuiteBase,
    target: LoraSuiteBase,
) -> Delta:
    """ΔW_t as large beside W_t as ΔW_s is beside W_s."""
    found = LAYER.fullmatch(path)
    assert found is not None
    one = next(own for own, other in pairs if other == int(found["number"]))
    own_path = f"{source.prefix}.{one}.{found['rest']}"
    if moved.energy == 0:
        return moved
    wanted = (
        deltas[own_path].energy ** 0.5 / float(source.weights[own_path].norm()) * float(target.weights[path].norm())
    )
    return Delta(moved.B * (wanted / moved.energy**0.5), moved.A)
