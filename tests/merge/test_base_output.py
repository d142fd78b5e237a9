"""A merge into the base model: it computes what base and adapter compute together, and says what rounding costs."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ProphetNetConfig,
    ProphetNetModel,
    ViTConfig,
    ViTForImageClassification,
)

from artifacts.adapter import Adapter
from artifacts.base_model import inspect_base
from artifacts.errors import AttemptCancelled, FieldError, MergeRefused, ShapeMismatch
from merge.base_output import MAX_ROUNDING, fold_into_base

TOLERANCE = 1e-5
"""Of logits, as a share of the largest: two orders of summation in float32."""
IDS = torch.arange(1, 9)[None]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # PEFT warns of tied embeddings and of Conv1D, which is what is tested
        yield


def llama(**changes: Any) -> LlamaForCausalLM:
    values = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes}))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Path, torch.Tensor]]:
    """saved(model, **LoraConfig's) → folder of the base, folder of a random adapter, logits of both together."""

    def save(model: Any, shard: str = "5GB", inputs: Any = IDS, **config: Any) -> tuple[Path, Path, torch.Tensor]:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        model.save_pretrained(base, max_shard_size=shard)
        wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **config))
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
            logits = wrapped.eval()(inputs).logits
        wrapped.save_pretrained(adapter)
        return base, adapter, logits

    return save


def assert_same(folder: Path, logits: torch.Tensor, inputs: Any = IDS, kind: Any = AutoModelForCausalLM) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found = model.eval()(inputs).logits
    assert float((found - logits).abs().max()) <= TOLERANCE * float(logits.abs().max())
    return model


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": "all-linear"}),
    "tied, layers only": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "down_proj"]}),
    "tied, embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied, head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "v_proj"]}),
    "tied, both": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "embed_tokens"]}),
    "conv1d": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, n_inner=16)),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "bias of lora_B": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_computes_what_base_and_adapter_do(saved: Any, tmp_path: Path, name: str) -> None:
    make, config = CASES[name]
    base, adapter, logits = saved(make(), **config)
    before = {path: path.read_bytes() for path in base.iterdir()}
    report = fold_into_base(base, adapter, tmp_path / "out")
    model = assert_same(tmp_path / "out", logits)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    assert tied is (name in ("tied, layers only", "conv1d"))
    assert report.untied == (("lm_head.weight",) if name.startswith("tied") and not tied else ())
    assert report.rounding is not None
    assert report.rounding < 1e-6
    assert all(module.change is not None and 0.01 < module.change < 100 for module in report.modules)
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    again = fold_into_base(base, adapter, tmp_path / "again")
    assert again == report
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_report_as_json(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"])
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({**tensors, first: tensors[first] * 0}, weights)
    report = fold_into_base(base, adapter, tmp_path / "out", dtype="bfloat16", force=True)
    found = report.to_dict()
    modules = found.pop("modules")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert found == {
        "rounding": report.rounding,
        "largest_rounding": MAX_ROUNDING,
        "dtype": "bfloat16",
        "untied": ["lm_head.weight"],
        "bytes": (tmp_path / "out" / "model.safetensors").stat().st_size,
    }
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)
    assert {module["path"]: module["tensor"] for module in modules} == {
        "model.embed_tokens": "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj": "model.layers.1.self_attn.q_proj.weight",
    }
    assert {module["dtype"] for module in modules} == {"BF16"}
    changes = {module["path"]: (module["change"], module["rounding"]) for module in modules}
    assert changes.pop("model.layers.0.self_attn.q_proj") == (0.0, None), "it changes nothing"
    assert all(change > 0.01 and rounding > 0 for change, rounding in changes.values())


def test_a_convolution_and_its_kernel(saved: Any, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4
    )
    pixels = torch.rand(2, 3, 8, 8)
    base, adapter, logits = saved(
        ViTForImageClassification(config), inputs=pixels, target_modules=["projection", "query"]
    )
    report = fold_into_base(base, adapter, tmp_path / "out")
    assert any("projection" in module.path for module in report.modules)
    assert_same(tmp_path / "out", logits, inputs=pixels, kind=ViTForImageClassification)


def test_shards_keep_their_names_and_the_index_is_right(saved: Any, tmp_path: Path) -> None:
    base, adapter, logits = saved(
        llama(tie_word_embeddings=True), shard="8KB", target_modules=["embed_tokens", "q_proj"]
    )
    index = "model.safetensors.index.json"
    fold_into_base(base, adapter, tmp_path / "out")
    assert_same(tmp_path / "out", logits)
    old, new = (json.loads((folder / index).read_text()) for folder in (base, tmp_path / "out"))
    assert len(set(old["weight_map"].values())) == 3
    assert new["weight_map"].items() - old["weight_map"].items() == {
        ("lm_head.weight", old["weight_map"]["model.embed_tokens.weight"])
    }
    for name, file in new["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    sizes = [t.nbytes for file in set(new["weight_map"].values()) for t in load_file(tmp_path / "out" / file).values()]
    assert new["metadata"]["total_size"] == sum(sizes)
    assert inspect_base(tmp_path / "out").weights_digest != inspect_base(base).weights_digest


def test_rounding_is_measured_and_too_much_of_it_refused(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama().bfloat16(), target_modules=["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    small = {key: value * (0.01 if "lora_B" in key else 1) for key, value in tensors.items()}
    report = fold_into_base(base, adapter, tmp_path / "large")
    save_file(small, weights)
    with pytest.raises(MergeRefused, match="Rounding") as refused:
        fold_into_base(base, adapter, tmp_path / "small")
    lost = refused.value.errors[0].message.removeprefix("loses ").removesuffix(" of the change by rounding")
    assert list(refused.value.errors) == [FieldError("/dtype", f"loses {lost} of the change by rounding")]
    assert refused.value.detail == (
        f"Rounding to the base model's precision would lose {lost} of the size of the change (at most 20%)."
    )
    forced = fold_into_base(base, adapter, tmp_path / "forced", force=True)
    wide = fold_into_base(base, adapter, tmp_path / "wide", dtype="float32")
    assert report.rounding is not None
    assert forced.rounding is not None
    assert wide.rounding is not None
    assert report.rounding < 0.2 < forced.rounding
    assert lost == f"{forced.rounding:.0%}"
    assert wide.rounding < 1e-4
    # the reported figure, computed densely
    name = "model.layers.0.self_attn.q_proj"
    (found,) = [module for module in forced.modules if module.path == name]
    prefix = f"base_model.model.{name}"
    delta = 2 * small[f"{prefix}.lora_B.weight"].double() @ small[f"{prefix}.lora_A.weight"].double()
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].double()
    written = load_file(tmp_path / "forced" / "model.safetensors")[f"{name}.weight"]
    assert written.dtype == torch.bfloat16
    assert found.rounding == pytest.approx(float((written.double() - weight - delta).norm() / delta.norm()), rel=1e-3)
    assert found.change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    everything = load_file(tmp_path / "wide" / "model.safetensors")
    assert {tensor.dtype for tensor in everything.values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_what_does_not_fit_is_refused_by_name(saved: Any, tmp_path: Path) -> None:
    _, adapter, _ = saved(llama(), target_modules=["q_proj", "down_proj"])
    other = tmp_path / "other"
    llama(intermediate_size=32).save_pretrained(other)
    with pytest.raises(ShapeMismatch, match="24") as shapes:
        fold_into_base(other, adapter, tmp_path / "out")
    assert all("down_proj" in item.pointer for item in shapes.value.errors)
    few = tmp_path / "few"
    llama(num_hidden_layers=1).save_pretrained(few)
    with pytest.raises(MergeRefused, match="no such layer") as missing:
        fold_into_base(few, adapter, tmp_path / "out")
    assert sorted(item.pointer for item in missing.value.errors) == [
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    for change, words in (
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"architectures": ["Pickle"]}, "no architecture"),
        ({"architectures": ["AutoConfig"]}, "no architecture"),
    ):
        config = json.loads((other / "config.json").read_text())
        (few / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(MergeRefused, match=words):
            fold_into_base(few, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_doubles_stay_doubles(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama().double(), target_modules=["q_proj"])
    report = fold_into_base(base, adapter, tmp_path / "deep" / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "deep" / "out"))
    assert {tensor.dtype for tensor in new.values()} == {torch.float64}
    factors = Adapter.open(adapter)["model.layers.0.self_attn.q_proj"]
    delta = ((factors.B.float() * factors.scaling) @ factors.A.float()).double()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(new[name], old[name] + delta)
    assert report.rounding == 0.0
    assert [module.path for module in report.modules] == [f"model.layers.{at}.self_attn.q_proj" for at in (0, 1)]


def test_a_layer_of_a_single_row(saved: Any, tmp_path: Path) -> None:
    config = llama().config
    config.num_labels = 1
    base, adapter, logits = saved(LlamaForSequenceClassification(config), target_modules=["score", "v_proj"])
    report = fold_into_base(base, adapter, tmp_path / "out")
    assert_same(tmp_path / "out", logits, kind=AutoModelForSequenceClassification)
    rows = load_file(tmp_path / "out" / "model.safetensors")["score.weight"]
    assert rows.shape == (1, 16)
    assert report.modules[-1].path == "score"


def test_files_of_a_bare_model_whose_head_was_its_embedding(saved: Any, tmp_path: Path) -> None:
    base, adapter, logits = saved(llama(tie_word_embeddings=True), target_modules=["embed_tokens", "v_proj"])
    weights = base / "model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(weights).items()}
    save_file(bare, weights, metadata={"format": "pt"})
    report = fold_into_base(base, adapter, tmp_path / "out")
    assert report.untied == ("lm_head.weight",)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == bare.keys() | {"lm_head.weight"}
    assert_same(tmp_path / "out", logits)


def test_two_embeddings_that_were_one(saved: Any, tmp_path: Path) -> None:
    """Each of them has factors of its own, and none of them is a head."""
    sides = {"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = ProphetNetConfig(
        **sides,
        **heads,
        num_encoder_layers=1,
        num_decoder_layers=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = ProphetNetModel(config)
    model.save_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, target_modules=["word_embeddings"]))
    wrapped.save_pretrained(adapter)
    report = fold_into_base(base, adapter, tmp_path / "out")
    assert report.untied == ("decoder.word_embeddings.weight", "encoder.word_embeddings.weight")
    with torch.no_grad():
        plain, expected, found = (
            found.eval()(input_ids=IDS, decoder_input_ids=IDS).last_hidden_state
            for found in (
                ProphetNetModel.from_pretrained(base),
                wrapped,
                ProphetNetModel.from_pretrained(tmp_path / "out"),
            )
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert float((plain - expected).abs().max()) > 0.1


def test_what_a_folder_holds_besides_is_carried_as_it_is(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama(), shard="8KB", target_modules=["q_proj"])
    index = "model.safetensors.index.json"
    document = json.loads((base / index).read_text())
    (base / index).write_text(json.dumps({**document, "metadata": {**document["metadata"], "made_by": "me"}}))
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "generation_config.json").write_text('{"top_k": 3}')
    told: list[tuple[float, str]] = []
    fold_into_base(base, adapter, tmp_path / "out", progress=lambda part, text: told.append((part, text)))
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"top_k": 3}'
    written = json.loads((tmp_path / "out" / index).read_text())
    assert written["metadata"] == {**document["metadata"], "made_by": "me"}
    files = sorted(set(document["weight_map"].values()))
    assert list(dict.fromkeys(text for _, text in told)) == [
        f"Adding to {name}, file {number} of {len(files)}" for number, name in enumerate(files, start=1)
    ]
    # bytes of numbers that were read, of all bytes of the files
    read = sum(tensor.nbytes for name in files for tensor in load_file(base / name).values())
    assert told[-1][0] == pytest.approx(read / sum((base / name).stat().st_size for name in files))
    assert [part for part, _ in told] == sorted(part for part, _ in told)
    assert told[0][0] < 0.2


def test_every_layer_that_can_not_be_added_to_is_named(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama(attention_bias=True), target_modules=["q_proj"], lora_bias=True)
    paths = [f"model.layers.{at}.self_attn.q_proj" for at in (0, 1)]
    plain = tmp_path / "plain"
    llama().save_pretrained(plain)
    with pytest.raises(MergeRefused) as caught:
        fold_into_base(plain, adapter, tmp_path / "out")
    what = "the adapter adds to a bias, which the layer does not have"
    assert list(caught.value.errors) == [FieldError(path, what) for path in paths]
    assert caught.value.detail == f"2 modules can not be merged into plain: {paths[0]}: {what}."
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, f"{paths[1]}.weight": torch.ones(16, 16, dtype=torch.int8)}, weights)
    with pytest.raises(ShapeMismatch) as unfit:
        fold_into_base(base, adapter, tmp_path / "out")
    what = "its weight is stored as I8, to which nothing can be added"
    assert list(unfit.value.errors) == [FieldError(paths[1], what)]
    assert unfit.value.detail == f"1 modules do not fit the base model: {paths[1]}: {what}."
    save_file({**tensors, f"{paths[0]}.weight": torch.ones(16, 8)}, weights)
    with pytest.raises(ShapeMismatch) as unfit:
        fold_into_base(base, adapter, tmp_path / "out")
    what = "the adapter needs a weight of 16×16, the base model has 16×8"
    assert list(unfit.value.errors) == [FieldError(paths[0], what)]
    assert not (tmp_path / "out").exists()


def test_numbers_that_overflow_are_refused(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama(), target_modules=["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e3 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(MergeRefused) as caught:
        fold_into_base(base, adapter, tmp_path / "out", dtype="float16", force=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert caught.value.detail == f"{name} holds NaN or infinite numbers after the change, in F16."
    assert list(caught.value.errors) == [FieldError("/dtype", f"{name} is not finite")]


def test_it_can_be_stopped(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved(llama(), target_modules=["q_proj"])

    def stop(_fraction: float, _message: str) -> None:
        raise AttemptCancelled("stop")

    with pytest.raises(AttemptCancelled):
        fold_into_base(base, adapter, tmp_path / "out", progress=stop)
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_loading_it_with_peft_on_top_is_another_change(saved: Any, tmp_path: Path) -> None:
    """The control of the tests above: without the fold, the logits are others."""
    base, adapter, logits = saved(llama(), target_modules=["q_proj"])
    fold_into_base(base, adapter, tmp_path / "out")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        twice = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), adapter)(IDS).logits
    assert float((plain - logits).abs().max()) > 1e-3
    assert float((twice - logits).abs().max()) > 1e-3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Half a gigabyte of weights, of which one is 268 MB: less than 200 MB above an idle process."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = {"vocab_size": 64000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = llama(**config, num_attention_heads=8, num_key_value_heads=8)
    model.save_pretrained(base)
    get_peft_model(
        model, LoraConfig(r=8, init_lora_weights=False, target_modules=["lm_head", "q_proj"])
    ).save_pretrained(adapter)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "import transformers\n"
        "from merge.base_output import MAX_ROUNDING, fold_into_base\n"
        "from merge.model_layout import ModelLayout\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "ModelLayout(base)\n"
        "idle = peak()\n"
        "fold_into_base(base, adapter, out, force=True)\n"
        "print(peak() - idle)\n"
    )
    arguments = [sys.executable, "-c", script, str(base), str(adapter), str(tmp_path / "out")]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True)
    assert (base / "model.safetensors").stat().st_size > 500e6
    assert int(done.stdout.split()[-1]) < 200_000
