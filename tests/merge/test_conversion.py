"""Adapters of other types become LoRAs that do what PEFT does with the originals."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from artifacts import low_rank_forms, weight_forms
from artifacts.adapter import Adapter
from artifacts.base_model import inspect_base
from artifacts.errors import FileBroken, MergeRefused
from merge.conversion import convert_to_lora

IDS = torch.arange(1, 9)[None]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("base")
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Callable[[Any], tuple[Path, torch.Tensor]]:
    """A random adapter of the configuration's type, and the logits of base and adapter."""

    def save(config: Any) -> tuple[Path, torch.Tensor]:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if (
                    any(part in name for part in ("lora_", "hada_", "lokr_", "vera_lambda", "oft_", "ia3_l"))
                    and "ranknum" not in name
                ):
                    value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(PeftModel.from_pretrained(fresh(base), tmp_path / "adapter"))

    return save


def fresh(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def assert_same(base: Path, folder: Path, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    found = logits(PeftModel.from_pretrained(fresh(base), folder))
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    assert float((logits(fresh(base)) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


TARGETS = ["q_proj", "v_proj", "down_proj"]
EXACT: dict[str, tuple[Any, int]] = {
    "adalora": (lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3, target_modules=TARGETS), 4),
    "loha": (lambda: LoHaConfig(r=3, alpha=5, target_modules=TARGETS), 9),
    "loha with patterns": (
        lambda: LoHaConfig(
            r=3, alpha=5, target_modules=TARGETS, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 1}
        ),
        9,
    ),
    "lokr, factored": (lambda: LoKrConfig(r=1, alpha=5, decompose_factor=2, target_modules=TARGETS), 2),
    "lokr, both": (lambda: LoKrConfig(r=1, decompose_both=True, decompose_factor=4, target_modules=TARGETS), 1),
    "lokr, whole": (lambda: LoKrConfig(r=8, alpha=5, target_modules=TARGETS), 16),
    "vera": (lambda: VeraConfig(r=6, target_modules=["q_proj"], d_initial=0.5), 6),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_forms(saved: Any, base: Path, tmp_path: Path, name: str) -> None:
    make, rank = EXACT[name]
    adapter, wanted = saved(make())
    report = convert_to_lora(adapter, tmp_path / "out", fingerprint=inspect_base(base).fingerprint)
    assert (report.exact, report.relative_error) == (True, 0.0)
    assert report.rank == rank, report
    assert_same(base, tmp_path / "out", wanted)
    assert Adapter.open(tmp_path / "out").config.method == "lora"


@pytest.mark.parametrize("name", ["loha", "lokr, whole", "vera", "adalora"])
def test_a_smaller_rank_is_the_best_of_its_size_with_its_error(
    saved: Any, base: Path, tmp_path: Path, name: str
) -> None:
    adapter, _ = saved(EXACT[name][0]())
    fingerprint = inspect_base(base).fingerprint
    convert_to_lora(adapter, tmp_path / "whole", fingerprint=fingerprint)
    report = convert_to_lora(adapter, tmp_path / "cut", rank=2, fingerprint=fingerprint)
    whole, cut = Adapter.open(tmp_path / "whole"), Adapter.open(tmp_path / "cut")
    error = energy = 0.0
    for module in report.modules:
        exact, small = ((f.B.double() @ f.A.double()) for f in (whole[module.path], cut[module.path]))
        values = torch.linalg.svdvals(exact)
        best = float(values[2:].norm() / values.norm())
        found = float((small - exact).norm() / exact.norm())
        assert found == pytest.approx(best, rel=1e-4)
        assert module.relative_error == pytest.approx(found, rel=1e-4)
        error, energy = error + float((small - exact).norm() ** 2), energy + float(exact.norm() ** 2)
    assert (report.rank, report.exact) == (2, False)
    assert report.to_dict() == {
        "from": report.source,
        "to": "lora",
        "rank": 2,
        "exact": False,
        "relative_error": report.relative_error,
        "modules": [
            {"path": m.path, "rank": 2, "exact_rank": m.exact_rank, "relative_error": m.relative_error}
            for m in report.modules
        ],
    }
    assert report.source == name.split(",")[0]
    assert report.relative_error == pytest.approx((error / energy) ** 0.5, rel=1e-4)


def test_adalora_that_was_pruned(saved: Any, base: Path, tmp_path: Path) -> None:
    adapter, _ = saved(EXACT["adalora"][0]())
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    masks = {}
    for number, key in enumerate(sorted(key for key in tensors if key.endswith("lora_E"))):
        masks[key.removeprefix("base_model.model.")] = [number != 0, True, number % 2 == 0, False]
        for name, turned in (("lora_E", False), ("lora_A", False), ("lora_B", True)):
            part = key.removesuffix("lora_E") + name
            mask = torch.tensor(masks[key.removeprefix("base_model.model.")])
            tensors[part] = (tensors[part][:, mask] if turned else tensors[part][mask]).contiguous()
    config["rank_pattern"] = masks
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    wanted = logits(PeftModel.from_pretrained(fresh(base), adapter))
    report = convert_to_lora(adapter, tmp_path / "out")
    assert sorted({module.rank for module in report.modules}) == [2, 3]
    assert_same(base, tmp_path / "out", wanted)


def test_dora_by_the_weights_of_its_base(saved: Any, base: Path, tmp_path: Path) -> None:
    adapter, wanted = saved(LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=TARGETS))
    with pytest.raises(MergeRefused, match="depends on the weights"):
        convert_to_lora(adapter, tmp_path / "none")
    full = convert_to_lora(adapter, tmp_path / "full", rank=64, base=base)
    assert (full.exact, full.rank) == (True, 16)
    assert full.relative_error < 1e-5
    assert_same(base, tmp_path / "full", wanted, tolerance=1e-4)
    small = convert_to_lora(adapter, tmp_path / "small", base=base)
    assert (small.exact, small.rank) == (False, 4)
    assert 1e-3 < small.relative_error < 1
    # the stated error, and that hardly a better matrix of this rank exists
    whole, cut = Adapter.open(tmp_path / "full"), Adapter.open(tmp_path / "small")
    for module in small.modules:
        exact, found = ((f.B.double() @ f.A.double()) for f in (whole[module.path], cut[module.path]))
        values = torch.linalg.svdvals(exact)
        assert module.relative_error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-3)
        assert module.relative_error <= 1.01 * float(values[4:].norm() / values.norm())
    again = convert_to_lora(adapter, tmp_path / "again", base=base, max_error=small.relative_error)
    assert again == small
    with pytest.raises(MergeRefused, match="rank 4 loses") as caught:
        convert_to_lora(adapter, tmp_path / "refused", base=base, max_error=0.99 * small.relative_error)
    assert {error.pointer for error in caught.value.errors} == {"/max_error"}
    worst = max(small.modules, key=lambda module: module.relative_error)
    assert caught.value.errors[0].message.startswith(f"{worst.path}: {worst.relative_error:.3g}")
    assert not (tmp_path / "refused").exists()
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "small" / weights).read_bytes()


OF_WEIGHTS: dict[str, Any] = {
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "oft, exact": lambda: OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=TARGETS),
    "oft, four terms": lambda: OFTConfig(oft_block_size=4, num_cayley_neumann_terms=4, target_modules=TARGETS),
    "oft, bounded and shared": lambda: OFTConfig(
        oft_block_size=8, coft=True, eps=0.5, block_share=True, target_modules=TARGETS
    ),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_what_depends_on_weights_is_what_peft_merges(saved: Any, base: Path, tmp_path: Path, name: str) -> None:
    adapter, _ = saved(OF_WEIGHTS[name]())
    with pytest.raises(MergeRefused, match="depends on the weights") as refused:
        convert_to_lora(adapter, tmp_path / "none")
    assert refused.value.errors[0].pointer == "/base_model"
    merged = PeftModel.from_pretrained(fresh(base), adapter).merge_and_unload().state_dict()
    weights = fresh(base).state_dict()
    whole = convert_to_lora(adapter, tmp_path / "whole", base=base)
    small = convert_to_lora(adapter, tmp_path / "small", base=base, rank=3)
    assert (whole.exact, small.exact, small.rank, small.source) == (True, False, 3, name.split(",")[0])
    assert len(whole.modules) == 6
    for module in small.modules:
        wanted = (merged[f"{module.path}.weight"] - weights[f"{module.path}.weight"]).double()
        exact, found = (
            (f.scaling * f.B.double() @ f.A.double())
            for f in (Adapter.open(tmp_path / folder)[module.path] for folder in ("whole", "small"))
        )
        torch.testing.assert_close(exact, wanted, rtol=1e-4, atol=2e-6)
        values = torch.linalg.svdvals(wanted)
        best = float(values[3:].norm() / values.norm())
        assert module.relative_error == pytest.approx(best, rel=1e-4)
        assert float((found - wanted).norm() / wanted.norm()) == pytest.approx(best, rel=1e-4)


def test_a_butterfly_of_several_factors() -> None:
    """PEFT computes these on GPUs only; its own permutations and rotations, put together as its merge does."""
    W, R = torch.randn(6, 32), torch.randn(3, 8, 4, 4) * 0.2
    wanted, scales = torch.eye(32), torch.randn(6)
    for position, blocks in enumerate(R):
        order = BOFTLayer.block_butterfly_perm(None, 32, 8 // 2**position, 2, 2)
        P = BOFTLayer.perm2mat(None, order)
        mixed = P @ torch.block_diag(*BOFTLayer.cayley_batch(None, blocks).unbind()) @ P.T
        wanted = mixed @ wanted
    wanted = (wanted @ W.T).T * scales[:, None] - W
    found = weight_forms.boft_of_inputs(W, weight_forms.cayley(-(R - R.transpose(-1, -2)) / 2), scales)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_of_these_does_not_fit_is_refused(saved: Any, base: Path, tmp_path: Path) -> None:
    adapter, _ = saved(OF_WEIGHTS["ia3"]())
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    query = next(key for key in tensors if "q_proj" in key)
    save_file({**tensors, query: torch.ones(15, 1)}, weights)
    with pytest.raises(MergeRefused, match=r"shape \(15, 1\), the weight of the base model is \(16, 16\)"):
        convert_to_lora(adapter, tmp_path / "out", base=base)
    save_file({**tensors, query.replace("ia3_l", "bias"): torch.ones(16)}, weights)
    with pytest.raises(MergeRefused, match="has bias, which is no part"):
        convert_to_lora(adapter, tmp_path / "out", base=base)
    save_file(tensors, weights)
    biased = tmp_path / "biased"
    shutil.copytree(base, biased)
    config = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    stored = load_file(biased / "model.safetensors")
    more = {key.replace("weight", "bias"): torch.zeros(len(stored[key])) for key in stored if "q_proj" in key}
    save_file({**stored, **more}, biased / "model.safetensors")
    convert_to_lora(adapter, tmp_path / "out", base=biased, rank=2)
    more = {key: bias + 1 for key, bias in more.items()}
    save_file({**stored, **more}, biased / "model.safetensors")
    with pytest.raises(MergeRefused, match="q_proj has a bias"):
        convert_to_lora(adapter, tmp_path / "again", base=biased)


def test_what_is_not_converted_says_why(saved: Any, base: Path, tmp_path: Path) -> None:
    adapter, _ = saved(VeraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(MergeRefused, match="does not tell the sides"):
        convert_to_lora(adapter, tmp_path / "out")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if not key.endswith("vera_A")}, weights)
    with pytest.raises(MergeRefused, match="save_projection"):
        convert_to_lora(adapter, tmp_path / "out", fingerprint=inspect_base(base).fingerprint)
    save_file({**tensors, "base_model.model.model.layers.9.q_proj.lora_Q": torch.ones(2, 2)}, weights)
    with pytest.raises((FileBroken, MergeRefused)):
        convert_to_lora(adapter, tmp_path / "out", fingerprint=inspect_base(base).fingerprint)
    assert not (tmp_path / "out").exists()


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(x)
        return found


def test_convolutions_are_refused(tmp_path: Path) -> None:
    get_peft_model(Convolved(), LoHaConfig(r=2, target_modules=["conv"], use_effective_conv2d=True)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(MergeRefused, match="convolution"):
        convert_to_lora(tmp_path / "adapter", tmp_path / "out")


def peft_lokr(folder: Path, modules: int, **shapes: tuple[int, ...]) -> Path:
    folder.mkdir()
    names = [f"layers.{number}.q_proj" for number in range(modules)]
    save_file(
        {f"base_model.model.{name}.{role}": torch.ones(shape) for name in names for role, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LOKR", "r": 2, "alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_form_that_is_larger_than_its_tensors_by_far_is_refused(tmp_path: Path) -> None:
    folder = peft_lokr(tmp_path / "long", 1, lokr_w1=(1, 2**12), lokr_w2=(1, 2**12))
    with pytest.raises(MergeRefused, match="side above 1048576"):
        convert_to_lora(folder, tmp_path / "out")


def test_a_result_that_is_too_large_as_a_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft_lokr(tmp_path / "many", 4, lokr_w1=(2, 2), lokr_w2=(4, 8))
    module = 4 * 8 * (8 + 16)
    monkeypatch.setattr("merge.conversion.MAX_RESULT_BYTES", 3 * module)
    with pytest.raises(MergeRefused, match="rank 8 the first 4 of 4 modules"):
        convert_to_lora(folder, tmp_path / "out")
    assert convert_to_lora(folder, tmp_path / "smaller", rank=4).rank == 4
    monkeypatch.setattr("merge.conversion.MAX_RESULT_BYTES", 4 * module)
    assert convert_to_lora(folder, tmp_path / "whole").exact


def test_an_exact_rank_that_is_too_large_asks_for_one(
    saved: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, wanted = saved(LoHaConfig(r=6, alpha=5, target_modules=["q_proj"]))
    monkeypatch.setattr("merge.nearest_lora.MAX_EXACT_RANK", 15)
    with pytest.raises(MergeRefused, match="16 exactly") as refused:  # 6·6, and the layer is 16×16
        convert_to_lora(adapter, tmp_path / "out")
    assert refused.value.errors[0].pointer == "/rank"
    convert_to_lora(adapter, tmp_path / "out", rank=16)
    assert_same(base, tmp_path / "out", wanted)
    adapter, _ = saved(LoHaConfig(r=70, alpha=5, target_modules=["q_proj"]))
    with pytest.raises(MergeRefused, match="4900"):
        convert_to_lora(adapter, tmp_path / "again", rank=4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10_000))
def test_products_against_dense_ones(d_out: int, d_in: int, r1: int, r2: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b, c, d = random(d_out, r1), random(r1, d_in), random(d_out, r2), random(r2, d_in)
    A, B = low_rank_forms.loha(a, b, c, d, 0.5)
    torch.testing.assert_close(B @ A, 0.5 * (a @ b) * (c @ d))
    for w1 in (low_rank_forms.factored(None, a, b), low_rank_forms.factored(a @ b, None, None)):
        for w2 in (low_rank_forms.factored(None, c, d), low_rank_forms.factored(c @ d, None, None)):
            A, B = low_rank_forms.lokr(w1, w2, -2.0)
            torch.testing.assert_close(B @ A, -2.0 * torch.kron(a @ b, c @ d))
