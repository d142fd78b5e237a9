from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts.base_model import BaseModelRef, Comparison, check_modules, compare, inspect_base, weight_files
from artifacts.errors import FileBroken, FormatUnknown
from artifacts.manifest import LoraModule, ModuleKind

Make = Callable[..., Any]
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
FINGERPRINT = (("model.embed_tokens", 50, 8), ("model.layers.0.q_proj", 6, 8))
LLAMA = BaseModelRef(
    name="meta/llama",
    source="hub",
    location="meta/llama",
    revision=COMMIT,
    architecture="LlamaForCausalLM",
    weights_digest="1" * 64,
    tokenizer_digest="2" * 64,
    fingerprint=FINGERPRINT,
)


def module(path: str, d_out: int = 6, d_in: int = 8, kind: ModuleKind = "linear") -> LoraModule:
    return LoraModule(path, kind, "a", "b", 4, 8.0, 2.0, d_in, d_out, (4, d_in), (d_out, 4), "F32")


def test_equal_weights_prove_most() -> None:
    assert compare(LLAMA, replace(LLAMA, name="local copy", revision=None, tokenizer_digest=None)) == Comparison(
        "weights"
    )


def test_other_weights_contradict_even_under_one_name() -> None:
    found = compare(LLAMA, replace(LLAMA, weights_digest="3" * 64))
    assert found.level == "architecture"
    assert found.contradiction is not None
    assert "the weights of 'meta/llama' (SHA-256 111111111111…)" in found.contradiction


def test_repository_and_commit() -> None:
    first = BaseModelRef.named("meta/llama", COMMIT)
    assert compare(first, BaseModelRef.named("Meta/Llama", COMMIT)) == Comparison("revision")
    other = compare(first, BaseModelRef.named("meta/llama", OTHER_COMMIT))
    assert other.level == "shape"
    assert "at commits" in (other.contradiction or "")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc"])
def test_a_branch_or_tag_proves_nothing(revision: str | None) -> None:
    ref = BaseModelRef.named("meta/llama", revision)
    assert compare(ref, ref) == Comparison("shape")


def test_fingerprint_and_tokenizer() -> None:
    known = replace(LLAMA, weights_digest=None, revision=None)
    assert compare(known, replace(known, name="other/name")) == Comparison("architecture")
    assert compare(known, replace(known, tokenizer_digest=None)) == Comparison("shape")
    assert compare(known, replace(known, tokenizer_digest="9" * 64)) == Comparison("shape")
    other = compare(known, replace(known, fingerprint=FINGERPRINT[:1]))
    assert other == Comparison("shape", "'meta/llama' and 'meta/llama' have other modules or other dimensions")


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [
        ("meta/llama", "meta/llama", False),
        ("meta/llama", "meta/mistral", True),
        ("meta/llama", "copy-of/llama", True),
        ("llama", "mistral", True),
        ("llama", "meta/llama", False),
        ("/models/llama", "meta/mistral", False),
        ("/models/llama", "/models/mistral", False),
        ("unknown", "meta/llama", False),
    ],
)
def test_names_count_when_nothing_better_is_known(first: str, second: str, differ: bool) -> None:
    for one, two in ((first, second), (second, first)):
        found = compare(BaseModelRef.named(one), BaseModelRef.named(two))
        assert found.level == "shape"
        assert (found.contradiction is not None) == differ


def test_fingerprint_digest_does_not_depend_on_the_order() -> None:
    assert BaseModelRef.named("x").fingerprint_digest is None
    assert LLAMA.fingerprint_digest == replace(LLAMA, fingerprint=FINGERPRINT[::-1]).fingerprint_digest
    assert LLAMA.fingerprint_digest != replace(LLAMA, fingerprint=FINGERPRINT[:1]).fingerprint_digest


def test_modules_that_fit() -> None:
    fitting = [module("model.layers.0.q_proj"), module("model.embed_tokens", 8, 50, "embedding")]
    assert check_modules(FINGERPRINT, fitting) == []


@pytest.mark.parametrize(("base", "adapter"), [("h.0.attn", "transformer.h.0.attn"), ("bert.x.0.q", "x.0.q")])
def test_a_prefix_that_one_side_lacks_makes_no_difference(base: str, adapter: str) -> None:
    assert check_modules(((base, 6, 8),), [module(adapter)]) == []


def test_modules_that_do_not_fit_are_named() -> None:
    found = check_modules(FINGERPRINT, [module("model.layers.0.q_proj", 6, 9), module("model.layers.1.q_proj")])
    assert found == [
        "model.layers.0.q_proj: the adapter needs a weight of 6×9, the base model has 6×8",
        "model.layers.1.q_proj: the base model has no such module",
    ]


@pytest.fixture
def base(tmp_path: Path, write_tensors: Make) -> Make:
    """base(tensors, name="base", **config) → a transformers folder."""

    def make(tensors: dict[str, Any], name: str = "base", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 50} | config)
        )
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        return folder

    return make


TENSORS = {
    "model.embed_tokens.weight": ("BF16", [50, 8]),
    "model.layers.0.q_proj.weight": ("BF16", [6, 8]),
    "model.layers.0.q_proj.bias": ("BF16", [6]),
    "model.norm.weight": ("BF16", [8]),
    "conv.weight": ("BF16", [4, 2, 3, 3]),
}


def test_inspect_base(base: Make) -> None:
    ref = inspect_base(base(TENSORS, tie_word_embeddings=False))
    assert (ref.name, ref.source, ref.revision, ref.architecture) == ("base", "path", None, "LlamaForCausalLM")
    assert ref.fingerprint == (("conv", 4, 18), ("model.embed_tokens", 50, 8), ("model.layers.0.q_proj", 6, 8))
    assert ref.weights_digest is not None
    assert ref.tokenizer_digest is not None
    assert Path(ref.location).is_absolute()


def test_a_tied_head_can_be_adapted_though_it_is_not_stored(base: Make) -> None:
    ref = inspect_base(base(TENSORS, tie_word_embeddings=True))
    assert ("lm_head", 50, 8) in (ref.fingerprint or ())
    assert check_modules(ref.fingerprint or (), [module("lm_head", 50, 8)]) == []


def test_weights_that_are_stored_the_other_way_round(base: Make) -> None:
    tensors = {"h.0.attn.c_attn.weight": ("F32", [8, 24]), "h.0.other.weight": ("F32", [8, 24])}
    gpt2 = inspect_base(base(tensors, "gpt2", model_type="gpt2"))
    llama = inspect_base(base(tensors, "llama", model_type="llama"))
    assert gpt2.fingerprint == (("h.0.attn.c_attn", 24, 8), ("h.0.other", 8, 24))
    assert llama.fingerprint == (("h.0.attn.c_attn", 8, 24), ("h.0.other", 8, 24))
    assert check_modules(gpt2.fingerprint or (), [module("transformer.h.0.attn.c_attn", 24, 8)]) == []


def test_sharding_does_not_change_the_digest(base: Make, write_tensors: Make) -> None:
    whole, parts = base(TENSORS), base({}, "parts")
    (parts / "model.safetensors").unlink()
    names = list(TENSORS)
    mapping = {}
    for number, keys in enumerate((names[:2], names[2:])):
        write_tensors(parts / f"model-{number}.safetensors", {key: TENSORS[key] for key in keys})
        mapping |= dict.fromkeys(keys, f"model-{number}.safetensors")
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    (parts / "consolidated.safetensors").write_bytes(b"not named by the index")
    assert compare(inspect_base(whole), inspect_base(parts)) == Comparison("weights")


def test_the_same_weights_in_another_width_and_an_adapter_are_not_of_the_model(base: Make, write_tensors: Make) -> None:
    plain, crowded = base(TENSORS, "plain"), base(TENSORS, "crowded")
    for name in ("adapter_model.safetensors", "model.fp16.safetensors"):
        write_tensors(crowded / name, {"x.weight": ("F16", [1])})
    assert weight_files(crowded) == [crowded / "model.safetensors"]
    assert inspect_base(crowded).weights_digest == inspect_base(plain).weights_digest


def test_digests_see_what_changes(base: Make, write_tensors: Make) -> None:
    first, second = base(TENSORS), base(TENSORS, "second")
    (second / "tokenizer_config.json").write_text('{"chat_template": "other"}')
    assert inspect_base(first).tokenizer_digest == inspect_base(second).tokenizer_digest
    (second / "tokenizer.json").write_text('{"version": "2.0"}')
    assert inspect_base(first).tokenizer_digest != inspect_base(second).tokenizer_digest
    data = {"model.norm.weight": bytes(16)}
    write_tensors(second / "model.safetensors", TENSORS, data=data)
    assert inspect_base(first).weights_digest != inspect_base(second).weights_digest


def test_folder_of_the_hub_cache(base: Make) -> None:
    folder = base(TENSORS, f"models--meta--llama-2/snapshots/{COMMIT}")
    ref = inspect_base(folder)
    assert (ref.name, ref.source, ref.location, ref.revision) == ("meta/llama-2", "hub", "meta/llama-2", COMMIT)


def test_base_without_tokenizer(base: Make) -> None:
    folder = base(TENSORS)
    (folder / "tokenizer.json").unlink()
    assert inspect_base(folder).tokenizer_digest is None


def test_what_is_no_model(tmp_path: Path, base: Make) -> None:
    with pytest.raises(FormatUnknown, match=r"no config\.json"):
        inspect_base(tmp_path)
    folder = base(TENSORS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatUnknown, match=r"no \*\.safetensors weights"):
        inspect_base(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": {}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../secret.safetensors"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "missing.safetensors"}}'),
    ],
)
def test_broken_documents(tmp_path: Path, base: Make, name: str, text: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    folder = base(TENSORS)
    (folder / name).write_text(text)
    with pytest.raises(FileBroken, match=name.replace(".", r"\.")):
        inspect_base(folder)


def test_one_tensor_in_two_files(base: Make, write_tensors: Make) -> None:
    folder = base(TENSORS)
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    write_tensors(folder / "second.safetensors", {"model.norm.weight": ("BF16", [8])})
    with pytest.raises(FileBroken, match=r"two weights files hold the tensor 'model\.norm\.weight'"):
        inspect_base(folder)
