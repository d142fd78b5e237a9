"""What LQ-LoRA is for, on real models: closer to the original than NF and LoftQ at every width, and so a better start.

The figures that a test prints (`pytest -s`) are those of docs/explanation/lq-lora.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.minilm.base_model import base_model_directory
from examples.smollm2.batches import completion_loss, encode
from examples.smollm2.tasks import TASKS, make_items
from train.adapted_layers import exchange
from train.lq_layer import LqLinear
from train.options.quantisation import QuantisationOptions
from train.quantised.block_format import PRESETS, BlockFormat, first_that_fits
from train.quantised.decomposition import decompose
from train.quantised.double_quantisation import packed, rounded
from train.quantised.engine import quantise_base
from train.quantised.low_rank import LowRankFactors
from train.quantised.packed_linear import PackedLinear
from train.quantised.source_weights import SourceWeights
from train.targets import resolve_targets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MATRICES = ["query", "key", "value", "output.dense", "intermediate.dense"]
"""The 36 of the six layers of all-MiniLM-L6-v2."""


def form(bits: int) -> BlockFormat:
    return BlockFormat(bits, 8, "float32", 64, 256)


def exact(rank: int) -> LowRankFactors:
    return LowRankFactors(rank, oversampling=None, generator=torch.Generator())


def loftq(weight: Tensor, bits: int, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Q and L1·L2 of LoftQ (arXiv:2310.08659, algorithm 1): quantise first, then the SVD of what that lost."""
    product = torch.zeros_like(weight)
    for _ in range(rounds):
        quantised = rounded(weight - product, form(bits))
        left, right = exact(rank)(weight - quantised)
        product = left @ right
    return quantised, product


@torch.no_grad()
def mean_cosine(model: nn.Module, expected: Tensor, ids: Tensor) -> float:
    return float(nn.functional.cosine_similarity(pooled(model, ids), expected).mean())


@torch.no_grad()
def pooled(model: Any, ids: Tensor) -> Tensor:
    """(rows, width): the mean of the last hidden states."""
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(dim=1)
    return found


def encoder(folder: Path) -> Any:
    from transformers import AutoModel

    import train.quantised.loading  # noqa: F401 (teaches transformers packed weights)

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def with_factors(folder: Path, rank: int) -> Any:
    """The packed model as a training on it begins."""
    model = encoder(folder)
    factors = load_file(folder / "start_factors.safetensors")
    for path, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            adapted = LqLinear(layer, rank, 1.0)
            adapted.begin(factors[f"{layer.stored_path}.L1"], factors[f"{layer.stored_path}.L2"])
            exchange(model, path, adapted)
    return model


def changed(change: Callable[[Tensor], Tensor], paths: list[str]) -> Any:
    model = encoder(base_model_directory())
    for path in paths:
        weight = model.get_submodule(path).weight
        weight.data.copy_(change(weight.data))
    return model


@pytest.mark.parametrize(
    ("bits", "told"), [(4, (0.957, 0.963, 0.972)), (3, (0.823, 0.848, 0.897)), (2, (0.268, 0.335, 0.463))]
)
def test_an_encoder_stays_closer_to_itself_than_with_nf_and_loftq(
    tmp_path: Path, bits: int, told: tuple[float, float, float]
) -> None:
    base = base_model_directory()
    paths = [target.path for target in resolve_targets(SourceWeights(base).linear(), MATRICES)]
    assert len(paths) == 36
    ids = torch.randint(1000, 30000, (32, 32), generator=torch.Generator().manual_seed(0))
    expected = pooled(encoder(base), ids)
    grid = {"bits": [bits], "scale_bits": [8], "scale_dtypes": ["float32"], "blocks": [64], "scales": [256]}
    options = QuantisationOptions(
        rank=16, budget_bits=bits + 0.2, grid=grid, num_iterations=8, cost_iterations=1, oversampling=None,
        target_modules=MATRICES,
    )  # fmt: skip
    quantise_base(base, tmp_path / "packed", options, progress=lambda part, text: None)
    found = (
        mean_cosine(changed(lambda weight: rounded(weight, form(bits)), paths), expected, ids),
        mean_cosine(changed(lambda weight: torch.add(*loftq(weight, bits, 16, 1)), paths), expected, ids),
        mean_cosine(with_factors(tmp_path / "packed", 16), expected, ids),
    )
    print(f"{bits} bits: NF {found[0]:.3f}, LoftQ {found[1]:.3f}, LQ {found[2]:.3f}; once measured {told}")
    assert found[0] < found[1] < found[2]


def test_every_matrix_of_an_encoder_loses_less_than_with_loftq() -> None:
    weights = SourceWeights(base_model_directory())
    ratios = {}
    for number, target in enumerate(resolve_targets(weights.linear(), MATRICES)):
        weight = weights.weight(target.path)
        quantised, product = loftq(weight, 3, 8, 5)
        factors = LowRankFactors(8, oversampling=10, generator=torch.Generator().manual_seed(number))
        ours = decompose(weight, form(3), factors, iterations=100).error
        ratios[target.path] = ours / float((weight - quantised - product).norm())
    print(f"LQ / LoftQ-5: {min(ratios.values()):.3f} to {max(ratios.values()):.3f}")
    assert len(ratios) == 36
    assert max(ratios.values()) < 0.95, max(ratios, key=lambda path: ratios[path])


class Start:
    """A language model beside packed weights, with factors that are trained: those of LQ-LoRA, or QLoRA's.

    Of the kind "original" nothing is packed and nothing trained.
    """

    def __init__(self, kind: str, rank: int) -> None:
        from examples.smollm2.base_model import base_model_directory as language_model
        from examples.smollm2.batches import load_model

        self.model, self.tokenizer = load_model(language_model())
        self.model.requires_grad_(False)
        torch.manual_seed(0)
        self.trained: list[nn.Parameter] = []
        paths = [path for path, layer in self.model.named_modules() if isinstance(layer, nn.Linear)]
        for number, path in enumerate(path for path in paths if path != "lm_head" and kind != "original"):
            layer = self.model.get_submodule(path)
            weight = layer.weight.data
            nf3 = first_that_fits(weight.numel(), PRESETS["nf3"])
            factors = LowRankFactors(rank, oversampling=10, generator=torch.Generator().manual_seed(number))
            found = decompose(weight, nf3, factors, iterations=5) if kind == "lq" else None
            q = packed(weight if found is None else found.quantised, nf3)
            base = PackedLinear(*q.shape, q.form)
            for name in ("codes", "scale_q", "scale2", "offset"):
                setattr(base, name, getattr(q, name))
            adapted = LqLinear(base, rank, 1.0)
            if found is None:
                nn.init.kaiming_uniform_(adapted.lora_A, a=5**0.5)
            else:
                adapted.begin(found.left, found.right)
            exchange(self.model, path, adapted)
            self.trained += [adapted.lora_A, adapted.lora_B]

    @torch.no_grad()
    def prose(self) -> float:
        """Mean loss of a token of English: the licence of this repository, in rows of 128 tokens."""
        text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        rows = ids[: len(ids) // 128 * 128].view(-1, 128)[:8]
        return float(self.model(input_ids=rows, labels=rows).loss)

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean loss of a token of the task's held-out items."""
        return float(completion_loss(self.model, encode(self.tokenizer, make_items(TASKS["orders"], "held_out", 12))))

    def train(self, steps: int) -> None:
        seen = make_items(TASKS["orders"], "train", 4 * steps)
        optimizer = torch.optim.AdamW(self.trained, lr=5e-4, weight_decay=0.0)
        for step in range(steps):
            optimizer.zero_grad()
            completion_loss(self.model, encode(self.tokenizer, seen[4 * step : 4 * step + 4])).backward()
            optimizer.step()


def test_a_fine_tuning_begins_and_ends_below_that_of_qlora_at_equal_bits() -> None:
    """The same 3.13 bits of Q, the same factors to be trained, rows and steps; QLoRA's factors begin at 0.

    The losses at the beginning are of a text: of the task no model knows anything yet.
    """
    begun, ended = {}, {}
    for kind in ("original", "qlora", "lq"):
        start = Start(kind, rank=16)
        begun[kind] = start.prose()
        print(f"{kind}: loss of prose {begun[kind]:.3f}, of the task {start.held_out():.3f}", end="")
        if kind != "original":
            start.train(steps=8)
            ended[kind] = start.held_out()
            print(f", after 8 steps {ended[kind]:.3f}", end="")
        print(flush=True)
    assert begun["original"] < begun["lq"] < begun["qlora"]
    assert ended["lq"] <= ended["qlora"]
