"""What a converted adapter's files say, what a conversion tells on its way, and every reason to refuse one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from artifacts.adapter import Adapter
from artifacts.errors import FieldError, FileBroken, MergeRefused, RequestInvalid
from artifacts.layout import LINEAGE_KEY
from merge.conversion import convert_to_lora

Q = "layers.0.q_proj"
LOKR = {"peft_type": "LOKR", "r": 2, "alpha": 2}
VERA = {"peft_type": "VERA", "r": 2, "vera_dropout": 0.0, "save_projection": True}
PACKED = {"peft_type": "RANKWISE_LQ_LORA", "r": 2, "lora_alpha": 6}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved({key below the model: tensor}, **configuration) → the folder of an adapter."""
    count = 0

    def save(tensors: dict[str, Tensor], **config: Any) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"adapter-{count}"
        folder.mkdir()
        save_file(
            {f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors"
        )
        known = {"target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}
        (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))
        return folder

    return save


def lokr(path: str = Q, seed: int = 0) -> dict[str, Tensor]:
    """ΔW is 6×8."""
    return {f"{path}.lokr_w1": numbers(2, 2, seed=seed), f"{path}.lokr_w2": numbers(3, 4, seed=seed)}


def packed(path: str = Q) -> dict[str, Tensor]:
    shapes = {"lora_A": (2, 8), "lora_B": (6, 2), "start_A": (2, 8), "start_B": (6, 2)}
    return {f"{path}.{name}": numbers(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def delta(folder: Path, path: str = Q) -> Tensor:
    factors = Adapter.open(folder)[path]
    return factors.scaling * factors.B.double() @ factors.A.double()


def refused(folder: Path, out: Path, **options: Any) -> RequestInvalid:
    with pytest.raises((MergeRefused, FileBroken)) as caught:
        convert_to_lora(folder, out, **options)
    assert not out.exists()
    return caught.value


def test_the_configuration_keeps_what_there_is_to_keep(saved: Any, tmp_path: Path) -> None:
    folder = saved(lokr(), **LOKR, revision="v2", task_type="CAUSAL_LM", fan_in_fan_out=True)
    convert_to_lora(folder, tmp_path / "out", lineage={"from": ["here"]})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kept = {"base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "target_modules", "r", "lora_alpha"}
    assert {name: config[name] for name in kept} == {
        "base_model_name_or_path": "tiny",
        "revision": "v2",
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": True,
        "target_modules": [Q],
        "r": 6,
        "lora_alpha": 6,
    }
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as stored:
        assert json.loads(stored.metadata()[LINEAGE_KEY]) == {"from": ["here"]}
    plain = saved(lokr(), **LOKR)
    convert_to_lora(plain, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["revision"], config["task_type"], config["fan_in_fan_out"]) == (None, None, False)


def test_unequal_ranks_are_padded_to_the_largest(saved: Any, tmp_path: Path) -> None:
    other = {f"layers.1.q_proj.lokr_w{n}": numbers(*shape) for n, shape in ((1, (1, 1)), (2, (3, 4)))}
    report = convert_to_lora(saved({**lokr(), **other}, **LOKR), tmp_path / "out")
    assert [(item.path, item.rank) for item in report.modules] == [(Q, 6), ("layers.1.q_proj", 3)]
    converted = Adapter.open(tmp_path / "out")
    assert {(module.rank, module.dtype, module.scaling) for module in converted.modules.values()} == {(6, "F32", 1.0)}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert float(tensors["base_model.model.layers.1.q_proj.lora_A.weight"][3:].abs().max()) == 0
    assert float(tensors["base_model.model.layers.1.q_proj.lora_B.weight"][:, 3:].abs().max()) == 0
    expected = torch.kron(other["layers.1.q_proj.lokr_w1"], other["layers.1.q_proj.lokr_w2"]).double()
    torch.testing.assert_close(delta(tmp_path / "out", "layers.1.q_proj"), expected, rtol=1e-5, atol=1e-6)


def test_progress_names_each_module_and_may_stop_the_work(saved: Any, tmp_path: Path) -> None:
    folder = saved({**lokr(), **lokr("layers.1.q_proj"), **lokr("layers.2.q_proj")}, **LOKR)
    told: list[tuple[float, str]] = []
    convert_to_lora(folder, tmp_path / "out", progress=lambda part, text: told.append((part, text)))
    assert [text for _, text in told] == [f"Converting {number} of 3 modules" for number in (1, 2, 3)]
    assert [part for part, _ in told] == pytest.approx([0.0, 0.3, 0.6])


@pytest.mark.parametrize("quantised", [{"name": "acme/original"}, {"name": 7}, "acme/original", None])
def test_an_adapter_of_packed_weights_is_for_the_original_or_for_the_unpacked(
    saved: Any, tmp_path: Path, quantised: Any
) -> None:
    tensors = packed()
    A, B, begun_A, begun_B = (value.double() for value in tensors.values())
    folder = saved(tensors, **PACKED, quantised_from=quantised)
    convert_to_lora(folder, tmp_path / "change")
    torch.testing.assert_close(delta(tmp_path / "change"), 3 * (B @ A - begun_B @ begun_A), rtol=1e-5, atol=1e-5)
    convert_to_lora(folder, tmp_path / "whole", unpacked="acme/dense")
    torch.testing.assert_close(delta(tmp_path / "whole"), 3 * B @ A, rtol=1e-5, atol=1e-5)
    names = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        for name in ("change", "whole")
    ]
    assert names == ["acme/original" if quantised == {"name": "acme/original"} else "tiny", "acme/dense"]


def test_nothing_becomes_a_component_of_zeros(saved: Any, tmp_path: Path) -> None:
    values = {f"{Q}.lora_A": numbers(2, 8), f"{Q}.lora_B": numbers(6, 2), f"{Q}.lora_E": torch.zeros(2, 1)}
    folder = saved(values, peft_type="ADALORA", r=2, init_r=2, target_r=2, lora_alpha=2, total_step=10)
    for rank in (None, 3):
        report = convert_to_lora(folder, tmp_path / str(rank), rank=rank, max_error=0.0)
        assert (report.rank, report.exact, report.relative_error) == (1, True, 0.0)
        assert float(delta(tmp_path / str(rank)).abs().max()) == 0


def test_the_loss_of_the_whole_may_be_as_large_as_was_allowed(saved: Any, tmp_path: Path) -> None:
    paths = [f"layers.{number}.q_proj" for number in range(22)]
    tensors = {key: value for at, path in enumerate(paths) for key, value in lokr(path, seed=at).items()}
    folder = saved(tensors, **LOKR)
    report = convert_to_lora(folder, tmp_path / "out", rank=2)
    error = sum(float((delta(tmp_path / "out", path) - exact(tensors, path)).square().sum()) for path in paths)
    energy = sum(float(exact(tensors, path).square().sum()) for path in paths)
    assert report.relative_error == pytest.approx((error / energy) ** 0.5, rel=1e-4)
    assert not report.exact
    found = refused(folder, tmp_path / "no", rank=2, max_error=report.relative_error * 0.999)
    allowed = f"{report.relative_error * 0.999:g}"
    assert found.detail == f"A LoRA of rank 2 loses {report.relative_error:.3g} of the change, {allowed} is allowed."
    worst = sorted(report.modules, key=lambda module: -module.relative_error)[:20]
    assert list(found.errors) == [
        FieldError("/max_error", f"{module.path}: {module.relative_error:.3g} at rank 2") for module in worst
    ]


def exact(tensors: dict[str, Tensor], path: str) -> Tensor:
    return torch.kron(tensors[f"{path}.lokr_w1"], tensors[f"{path}.lokr_w2"]).double()


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str, list[FieldError]]] = {
    "not a number": (
        {**lokr(), f"{Q}.lokr_w2": torch.tensor([[1.0, float("nan")]])},
        LOKR,
        f"base_model.model.{Q}.lokr_w2 holds NaN or infinite numbers.",
        [],
    ),
    "trained whole": (
        lokr(),
        {**LOKR, "modules_to_save": ["score", "head"]},
        "The adapter holds modules that were trained whole: score, head.",
        [],
    ),
    "half of a form": (
        {f"{Q}.lokr_w1": numbers(2, 2)},
        LOKR,
        f"{Q}: lokr_w2_a is missing; it has lokr_w1.",
        [],
    ),
    "no start": (
        {key: value for key, value in packed().items() if not key.endswith("start_B")},
        PACKED,
        f"{Q} does not have the tensors of lq_lora: 'start_B'.",
        [],
    ),
    "a convolution": (
        {**packed(), f"{Q}.lora_A": numbers(2, 8, 1, 1)},
        PACKED,
        f"{Q} is a convolution; only linear layers of RANKWISE_LQ_LORA are converted.",
        [],
    ),
    "no projections": (
        {f"{Q}.vera_lambda_b": numbers(6), f"{Q}.vera_lambda_d": numbers(2)},
        VERA,
        "The adapter was saved without its projections (save_projection=False).",
        [],
    ),
    "DoRA without its base": (
        {
            f"{Q}.lora_A.weight": numbers(2, 8),
            f"{Q}.lora_B.weight": numbers(6, 2),
            f"{Q}.lora_magnitude_vector": numbers(6),
        },
        {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 2},
        "What a DoRA adapter adds depends on the weights of its base model.",
        [FieldError("/base_model", "is needed")],
    ),
}


def test_a_file_without_a_module_is_broken(saved: Any, tmp_path: Path) -> None:
    folder = saved({}, **VERA)
    save_file({"base_model.vera_A": numbers(2, 8)}, folder / "adapter_model.safetensors")
    assert refused(folder, tmp_path / "out").detail == "The adapter holds no module."


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_says_what_and_where(saved: Any, tmp_path: Path, name: str) -> None:
    tensors, config, detail, errors = REFUSED[name]
    found = refused(saved(tensors, **config), tmp_path / "out")
    assert found.detail == detail
    assert list(found.errors) == errors


def test_an_exact_rank_or_a_result_that_is_too_large_names_the_rank(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(lokr(), **LOKR)
    monkeypatch.setattr("merge.nearest_lora.MAX_EXACT_RANK", 6)
    convert_to_lora(folder, tmp_path / "at the limit")
    monkeypatch.setattr("merge.nearest_lora.MAX_EXACT_RANK", 5)
    found = refused(folder, tmp_path / "out")
    assert found.detail == f"{Q} is a LoRA of rank 6 exactly, which is above 5."
    assert list(found.errors) == [FieldError("/rank", f"the exact rank of {Q} is 6")]
    assert convert_to_lora(folder, tmp_path / "cut", rank=6).exact
    monkeypatch.setattr("merge.conversion.MAX_RESULT_BYTES", 10)
    found = refused(folder, tmp_path / "out", rank=6)
    assert found.detail == "As a LoRA of rank 6 the first 1 of 1 modules take more than 10 bytes."
    assert list(found.errors) == [FieldError("/rank", "makes the result too large")]


class TestVera:
    tensors: ClassVar = {f"{Q}.vera_lambda_b": numbers(6), f"{Q}.vera_lambda_d": numbers(2)}

    def folder(self, saved: Any, A: Tensor, B: Tensor) -> Path:
        folder: Path = saved(self.tensors, **VERA)
        weights = folder / "adapter_model.safetensors"
        save_file({**load_file(weights), "base_model.vera_A": A, "base_model.vera_B": B}, weights)
        return folder

    def test_the_base_model_tells_the_sides(self, saved: Any, tmp_path: Path) -> None:
        A, B = numbers(2, 9), numbers(7, 2)
        folder = self.folder(saved, A, B)
        convert_to_lora(folder, tmp_path / "out", fingerprint=((Q, 6, 8),))
        b, d = (self.tensors[f"{Q}.vera_lambda_{name}"] for name in "bd")
        expected = (b[:, None] * B[:6]) @ (d[:, None] * A[:, :8])
        torch.testing.assert_close(delta(tmp_path / "out"), expected.double(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("sides", [(7, 8), (6, 10)])
    def test_other_sides_are_refused(self, saved: Any, tmp_path: Path, sides: tuple[int, int]) -> None:
        folder = self.folder(saved, numbers(2, 9), numbers(7, 2))
        found = refused(folder, tmp_path / "out", fingerprint=((Q, *sides),))
        assert found.detail == f"{Q} of the base model has other sides than the adapter."

    def test_sides_that_nothing_tells(self, saved: Any, tmp_path: Path) -> None:
        found = refused(self.folder(saved, numbers(2, 9), numbers(7, 2)), tmp_path / "out")
        told = f"A VeRA adapter does not tell the sides of its layers, and neither does its base model: {Q}."
        assert found.detail == told


@pytest.fixture
def of_gpt2(tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """A base whose weights are stored transposed, a DoRA adapter of it, and the logits of both."""
    ids = torch.arange(1, 9)[None]
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, n_inner=16)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        dora = LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)
        wrapped = get_peft_model(model, dora)
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if "lora_" in name:
                    value.add_(torch.randn(value.shape) * 0.1)
            wrapped.save_pretrained(tmp_path / "dora")
            loaded = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "dora")
            logits = loaded.eval()(ids).logits
    return tmp_path / "base", tmp_path / "dora", logits


def test_dora_on_weights_that_are_stored_transposed(of_gpt2: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    base, adapter, logits = of_gpt2
    report = convert_to_lora(adapter, tmp_path / "out", rank=64, base=base)
    assert (report.exact, report.rank, report.source) == (True, 16, "dora")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "out").eval()
        found = model(torch.arange(1, 9)[None]).logits
    assert float((found - logits).abs().max()) <= 1e-4 * float(logits.abs().max())


def test_dora_of_another_base_model_is_refused_by_layer(of_gpt2: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    _, adapter, _ = of_gpt2
    path = "transformer.h.0.attn.c_attn"
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
        tmp_path / "small"
    )
    found = refused(adapter, tmp_path / "out", base=tmp_path / "small")
    assert found.detail == f"{path}: the adapter is for a weight of (48, 16), the base model has (24, 8)."
    tiny = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(tiny).save_pretrained(tmp_path / "llama")
    found = refused(adapter, tmp_path / "out", base=tmp_path / "llama")
    assert found.detail == f"The base model has no layer {path} whose weight could be read."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of layers with 16 inputs and 16 or 8 outputs, the one of queries with a bias."""
    folder: Path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(1.0)
    model.save_pretrained(folder)
    return folder


LAYER = "model.layers.0.self_attn"
OFT: dict[str, Any] = {"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.18.0"}
UNFIT: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "OFT, no triangle": (OFT, {"q_proj.oft_R": numbers(4, 5)}, "oft_R of shape (4, 5) is no row of an upper triangle"),
    "OFT, too few blocks": (
        OFT, {"q_proj.oft_R": numbers(3, 6)},
        f"{LAYER}.q_proj: the adapter has 3 blocks of 4 inputs, the weight of the base model is (16, 16).",
    ),
    "OFT, a block that does not fit": (
        OFT, {"q_proj.oft_R": numbers(1, 10)},
        f"{LAYER}.q_proj: the adapter has 1 blocks of 5 inputs, the weight of the base model is (16, 16).",
    ),
    "OFT, shared but several": (
        {**OFT, "block_share": True}, {"q_proj.oft_R": numbers(4, 6)}, "oft_R of shape (4, 6) is no row",
    ),
    "OFT, more than it has": (
        OFT, {"q_proj.oft_R": numbers(4, 6), "q_proj.scale": numbers(16)},
        f"{LAYER}.q_proj has scale, which is no part of a linear layer of OFT.",
    ),
    "OFT, a word for a number": (
        {**OFT, "coft": True, "eps": "small"}, {"q_proj.oft_R": numbers(4, 6)},
        "eps of the configuration is no number.",
    ),
    "OFT, no terms": (
        {**OFT, "num_cayley_neumann_terms": 0}, {"q_proj.oft_R": numbers(4, 6)},
        "num_cayley_neumann_terms is 0; from 1 to 100 are converted.",
    ),
    "OFT, too many terms": (
        {**OFT, "num_cayley_neumann_terms": 101}, {"q_proj.oft_R": numbers(4, 6)},
        "num_cayley_neumann_terms is 101; from 1 to 100 are converted.",
    ),
    "OFT, of a release that does not tell itself": (
        {"peft_type": "OFT", "oft_block_size": 4}, {"q_proj.oft_R": numbers(4, 6)}, "those of PEFT before 0.18",
    ),
    "OFT, of an earlier release": (
        {**OFT, "peft_version": "0.17.9@abc"}, {"q_proj.oft_R": numbers(4, 6)}, "those of PEFT before 0.18",
    ),
    "OFT, a switch for a number": (
        {**OFT, "num_cayley_neumann_terms": True}, {"q_proj.oft_R": numbers(4, 6)},
        "num_cayley_neumann_terms of the configuration is no number.",
    ),
    "BOFT, no squares": (
        {"peft_type": "BOFT"}, {"q_proj.boft_R": numbers(1, 4, 4, 3), "q_proj.boft_s": numbers(16, 1)},
        "boft_R of shape (1, 4, 4, 3) is no stack of square blocks.",
    ),
    "BOFT, other outputs": (
        {"peft_type": "BOFT"}, {"k_proj.boft_R": numbers(1, 4, 4, 4), "k_proj.boft_s": numbers(16, 1)},
        f"{LAYER}.k_proj: the adapter has 16 outputs and 4 blocks of 4 inputs, the weight of the base model is (8,",
    ),
    "BOFT, no butterfly": (
        {"peft_type": "BOFT"}, {"q_proj.boft_R": numbers(4, 4, 4, 4), "q_proj.boft_s": numbers(16, 1)},
        f"{LAYER}.q_proj: 4 blocks of 4 are none of a butterfly of 4 factors.",
    ),
    "IA3, other sides": (
        {"peft_type": "IA3"}, {"k_proj.ia3_l": numbers(16, 1)},
        f"{LAYER}.k_proj: the adapter has scales of shape (16, 1), the weight of the base model is (8, 16).",
    ),
    "IA3, a bias": (
        {"peft_type": "IA3"}, {"q_proj.ia3_l": numbers(16, 1)},
        f"{LAYER}.q_proj has a bias, which IA3 scales with the outputs: no LoRA does that.",
    ),
    "no such layer": (
        {"peft_type": "IA3"}, {"r_proj.ia3_l": numbers(16, 1)},
        f"The base model has no layer {LAYER}.r_proj whose weight could be read.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_the_weights_says_how(saved: Any, tmp_path: Path, llama: Path, name: str) -> None:
    config, tensors, told = UNFIT[name]
    folder = saved({f"{LAYER}.{key}": value for key, value in tensors.items()}, **config)
    assert told in refused(folder, tmp_path / "out", base=llama).detail


@pytest.mark.parametrize("shape", [(8, 1), (1, 16)])
def test_scales_of_a_layer_whose_bias_is_zero(saved: Any, tmp_path: Path, llama: Path, shape: tuple[int, int]) -> None:
    scales = numbers(*shape)
    report = convert_to_lora(saved({f"{LAYER}.k_proj.ia3_l": scales}, peft_type="IA3"), tmp_path / "out", base=llama)
    W = load_file(llama / "model.safetensors")[f"{LAYER}.k_proj.weight"]
    found = delta(tmp_path / "out", f"{LAYER}.k_proj")
    torch.testing.assert_close(found, (W * scales - W).double(), rtol=1e-4, atol=1e-6)
    assert (report.source, report.rank, report.exact) == ("ia3", 8, True)


def test_terms_of_a_series_up_to_the_bound(saved: Any, tmp_path: Path, llama: Path) -> None:
    """One is no change, many are the rotation itself."""
    R = numbers(4, 6) * 0.05
    for number, (terms, share) in enumerate(((1, False), (100, False), (100, True))):
        config = {**OFT, "num_cayley_neumann_terms": terms, "block_share": share}
        folder = saved({f"{LAYER}.q_proj.oft_R": R[:1] if share else R}, **config)
        convert_to_lora(folder, tmp_path / str(number), base=llama)
    W = load_file(llama / "model.safetensors")[f"{LAYER}.q_proj.weight"].double()
    once, many, shared = (delta(tmp_path / str(number), f"{LAYER}.q_proj") + W for number in range(3))
    torch.testing.assert_close(many @ many.T, W @ W.T, rtol=1e-4, atol=1e-6)
    assert torch.equal(once, W)
    assert float((many - W).norm()) > 0.05 * float(W.norm())
    torch.testing.assert_close(shared[:, :4], many[:, :4], rtol=1e-4, atol=1e-6)
    assert float((shared[:, 4:] - many[:, 4:]).abs().max()) > 1e-3


def test_the_bound_of_a_constrained_rotation_has_pefts_default(saved: Any, tmp_path: Path, llama: Path) -> None:
    tensors = {f"{LAYER}.q_proj.oft_R": numbers(4, 6)}
    for name, bound in (("default", {}), ("same", {"eps": 6e-5}), ("wide", {"eps": 0.5})):
        convert_to_lora(saved(tensors, **OFT, coft=True, **bound), tmp_path / name, base=llama)
    default, same, wide = (delta(tmp_path / name, f"{LAYER}.q_proj") for name in ("default", "same", "wide"))
    assert torch.equal(default, same)
    assert float(wide.norm()) > 100 * float(default.norm()) > 0


def test_what_changes_nothing_weighs_nothing(saved: Any, tmp_path: Path) -> None:
    """Neither does a module of zeros make the loss of the others look smaller."""
    nothing = {key.replace(Q, "layers.1.q_proj"): value * 0 for key, value in lokr().items()}
    alone = convert_to_lora(saved(lokr(), **LOKR), tmp_path / "alone", rank=2)
    both = convert_to_lora(saved({**lokr(), **nothing}, **LOKR), tmp_path / "both", rank=2)
    assert both.relative_error == alone.relative_error > 0.01
    assert both.modules[1].relative_error == 0
