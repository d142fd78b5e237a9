from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import FileBroken, FormatUnknown
from artifacts.manifest import IgnoredKey
from artifacts.peft_config import parse_config
from artifacts.peft_keys import UNSELECTED, KeyMatch, match_keys
from artifacts.safetensors_header import read_header

Tensors = dict[str, tuple[str, list[int]]]
Match = Callable[..., KeyMatch]
PREFIX = "base_model.model."


@pytest.fixture
def match(tmp_path: Path, write_tensors: Callable[..., Path], lora_config: Callable[..., dict[str, Any]]) -> Match:
    def run(tensors: Tensors, **fields: Any) -> KeyMatch:
        header = read_header(write_tensors(tmp_path / "adapter_model.safetensors", tensors))
        return match_keys(header, parse_config(lora_config(**fields)))

    return run


def broken(match: Match, tensors: Tensors, **fields: Any) -> FileBroken:
    with pytest.raises(FileBroken) as caught:
        match(tensors, **fields)
    return caught.value


def test_linear_modules_sorted_by_path(match: Match, pairs: Callable[..., Tensors]) -> None:
    found = match(pairs("model.layers.1.q_proj", "model.layers.0.v_proj", dtype="BF16"))
    assert [module.path for module in found.modules] == ["model.layers.0.v_proj", "model.layers.1.q_proj"]
    module = found.modules[0]
    assert (module.kind, module.rank, module.alpha, module.scaling) == ("linear", 4, 8.0, 2.0)
    assert (module.d_in, module.d_out, module.a_shape, module.b_shape) == (8, 6, (4, 8), (6, 4))
    assert module.a_key == "base_model.model.model.layers.0.v_proj.lora_A.weight"
    assert (module.dtype, module.bias_key, module.magnitude_key) == ("BF16", None, None)
    assert (len(found.used), found.ignored, found.warnings, found.refusals) == (4, (), (), ())


def test_embedding(match: Match) -> None:
    tensors: Tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": ("F32", [4, 50]),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": ("F32", [6, 4]),
    }
    (module,) = match(tensors, target_modules=["embed_tokens"]).modules
    assert (module.kind, module.d_in, module.d_out, module.a_shape) == ("embedding", 50, 6, (4, 50))


@pytest.mark.parametrize("kernel", [[3], [3, 5], [3, 5, 7]])
def test_convolutions(match: Match, kernel: list[int]) -> None:
    tensors: Tensors = {
        f"{PREFIX}conv.q_proj.lora_A.weight": ("F32", [4, 2, *kernel]),
        f"{PREFIX}conv.q_proj.lora_B.weight": ("F32", [6, 4, *[1] * len(kernel)]),
    }
    (module,) = match(tensors).modules
    size = 2
    for side in kernel:
        size *= side
    assert (module.kind, module.d_in, module.d_out, module.rank) == ("conv", size, 6, 4)


def test_grouped_convolution_is_described_but_not_merged(match: Match) -> None:
    tensors: Tensors = {
        f"{PREFIX}conv.q_proj.lora_A.weight": ("F32", [4, 2, 3, 3]),
        f"{PREFIX}conv.q_proj.lora_B.weight": ("F32", [6, 2, 1, 1]),
    }
    found = match(tensors)
    assert len(found.modules) == 1
    assert "grouped convolution" in found.refusals[0]


def test_adapter_name_in_the_keys_is_removed(match: Match) -> None:
    tensors: Tensors = {
        f"{PREFIX}model.q_proj.lora_A.default.weight": ("F32", [4, 8]),
        f"{PREFIX}model.q_proj.lora_B.default.weight": ("F32", [6, 4]),
        f"{PREFIX}model.v_proj.lora_embedding_A.default": ("F32", [4, 8]),
        f"{PREFIX}model.v_proj.lora_embedding_B.default": ("F32", [6, 4]),
    }
    found = match(tensors)
    assert [module.path for module in found.modules] == ["model.q_proj", "model.v_proj"]
    assert "adapter name 'default'" in found.warnings[0]


def test_two_adapters_in_one_file(match: Match) -> None:
    tensors: Tensors = {
        f"{PREFIX}model.{module}_proj.lora_{factor}.{name}.weight": ("F32", shape)
        for module, name in (("q", "one"), ("v", "two"))
        for factor, shape in (("A", [4, 8]), ("B", [6, 4]))
    }
    assert "several adapters: one, two" in broken(match, tensors).detail


def test_an_adapter_with_a_name_beside_one_without(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    for name in ("default", "second"):
        more: Tensors = {
            f"{PREFIX}model.v_proj.lora_A.{name}.weight": ("F32", [4, 8]),
            f"{PREFIX}model.v_proj.lora_B.{name}.weight": ("F32", [6, 4]),
        }
        if name == "default":
            assert len(match(tensors | more).modules) == 2
        else:
            assert "several adapters: one without a name, second" in broken(match, tensors | more).detail


def test_two_tensors_for_one_factor(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    tensors[f"{PREFIX}model.q_proj.lora_A.default.weight"] = ("F32", [4, 8])
    assert "are both lora_A" in broken(match, tensors).detail


@pytest.mark.parametrize(
    ("before", "after", "who"),
    [
        ("base_model", "module.base_model", "DistributedDataParallel"),
        ("model.q_proj", "_orig_mod.model.q_proj", "torch.compile"),
        ("model.q_proj", "model._fsdp_wrapped_module.q_proj", "FSDP"),
        ("model.q_proj", "model._checkpoint_wrapped_module.q_proj", "activation checkpointing"),
    ],
)
def test_what_wrappers_leave_in_keys_is_repaired_and_reported(
    match: Match, pairs: Callable[..., Tensors], before: str, after: str, who: str
) -> None:
    found = match({key.replace(before, after, 1): value for key, value in pairs("model.q_proj").items()})
    assert found.modules[0].path == "model.q_proj"
    assert any(who in warning and "Stock PEFT would load nothing" in warning for warning in found.warnings)


def test_a_submodule_called_module_is_kept(match: Match, pairs: Callable[..., Tensors]) -> None:
    found = match(pairs("net.module.q_proj"), target_modules=["q_proj"])
    assert (found.modules[0].path, found.warnings) == ("net.module.q_proj", ())


def test_missing_and_doubled_prefix_are_reported(match: Match, pairs: Callable[..., Tensors]) -> None:
    bare = match(pairs("model.q_proj", prefix=""))
    doubled = match(pairs("model.q_proj", prefix=PREFIX * 2))
    assert bare.modules[0].path == doubled.modules[0].path == "model.q_proj"
    assert "lack the prefix" in bare.warnings[0]
    assert "repeat the prefix" in doubled.warnings[0]


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_factor_without_its_partner(match: Match, pairs: Callable[..., Tensors], missing: str) -> None:
    tensors = pairs("model.q_proj", "model.v_proj")
    del tensors[f"{PREFIX}model.v_proj.{missing}.weight"]
    error = broken(match, tensors)
    assert f"{missing} is missing" in error.detail
    assert [finding.pointer for finding in error.errors] == ["model.v_proj"]


def test_rank_of_the_tensors_is_not_that_of_the_configuration(match: Match, pairs: Callable[..., Tensors]) -> None:
    error = broken(match, pairs("model.q_proj", "model.v_proj"), r=16)
    assert "the tensors have rank 4, adapter_config.json says 16" in error.detail
    assert len(error.errors) == 2


def test_rank_pattern_is_honoured(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj") | pairs("model.v_proj", rank=2)
    found = match(tensors, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 6})
    assert [(module.rank, module.alpha, module.scaling) for module in found.modules] == [(4, 8.0, 2.0), (2, 6.0, 3.0)]


def test_only_the_first_findings_are_listed(match: Match, pairs: Callable[..., Tensors]) -> None:
    error = broken(match, pairs(*[f"model.layers.{number}.q_proj" for number in range(40)]), r=8)
    assert "40 of 40 modules" in error.detail
    assert len(error.errors) == 20


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([4, 8], [6, 5]),
        ([4], [6, 4]),
        ([4, 8], [6]),
        ([4, 8, 3, 3], [6, 4]),
        ([4, 8, 3, 3], [6, 4, 3, 3]),
        ([0, 8], [6, 0]),
        ([4, 0], [6, 4]),
        ([], []),
    ],
)
def test_shapes_that_are_no_pair(match: Match, a: list[int], b: list[int]) -> None:
    tensors: Tensors = {f"{PREFIX}m.q_proj.lora_A.weight": ("F32", a), f"{PREFIX}m.q_proj.lora_B.weight": ("F32", b)}
    assert broken(match, tensors).errors[0].pointer == "m.q_proj"


def test_factors_of_integers(match: Match, pairs: Callable[..., Tensors]) -> None:
    assert "dtype I8" in broken(match, pairs("model.q_proj", dtype="I8")).detail


def test_linear_and_embedding_factors_of_one_module(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    tensors[f"{PREFIX}model.q_proj.lora_embedding_A"] = ("F32", [4, 8])
    assert "both linear and embedding" in broken(match, tensors).detail


def test_dora_needs_its_magnitudes_and_they_need_dora(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    assert "lora_magnitude_vector is missing" in broken(match, tensors, use_dora=True).detail
    tensors[f"{PREFIX}model.q_proj.lora_magnitude_vector"] = ("F32", [6])
    assert "use_dora is not set" in broken(match, tensors).detail
    (module,) = match(tensors, use_dora=True).modules
    assert module.magnitude_key == f"{PREFIX}model.q_proj.lora_magnitude_vector"


def test_bias_of_lora_b(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    tensors[f"{PREFIX}model.q_proj.lora_B.bias"] = ("F32", [6])
    (module,) = match(tensors, lora_bias=True).modules
    assert module.bias_key == f"{PREFIX}model.q_proj.lora_B.bias"
    assert "lora_bias is not set" in broken(match, tensors).detail
    assert "lora_B.bias is missing" in broken(match, pairs("model.q_proj"), lora_bias=True).detail
    tensors[f"{PREFIX}model.q_proj.lora_B.bias"] = ("F32", [5])
    assert "lora_B.bias has shape" in broken(match, tensors, lora_bias=True).detail


@pytest.mark.parametrize("role", ["lora_A.bias", "lora_magnitude_vector.bias"])
def test_bias_where_none_can_be(match: Match, pairs: Callable[..., Tensors], role: str) -> None:
    tensors = pairs("model.q_proj")
    tensors[f"{PREFIX}model.q_proj.{role}"] = ("F32", [6])
    assert "has no meaning" in broken(match, tensors).detail


@pytest.mark.parametrize(
    ("key", "shape", "fields", "reason", "refusal"),
    [
        ("classifier.weight", [2, 8], {"modules_to_save": ["classifier"]}, "full copy", "classifier"),
        ("score.dense.bias", [8], {"modules_to_save": ["score"]}, "full copy", "score.dense"),
        ("head.modules_to_save.default.weight", [2, 8], {}, "full copy", "modules_to_save"),
        ("head.original_module.weight", [2, 8], {}, "copy of a base weight", None),
        ("embed_tokens.base_layer.weight", [50, 8], {}, "where no adapted layer is; PEFT does not load it", None),
        ("model.q_proj.base_layer.base_layer.weight", [6, 8], {}, "where no adapted layer is", None),
        ("model.q_proj.base_layer.weight", [6, 8], {}, "full weight of an adapted layer", "q_proj.base_layer.weight"),
        ("model.q_proj.base_layer.bias", [6], {}, "full weight of an adapted layer", "q_proj.base_layer.bias"),
        ("model.q_proj.base_layer.bias", [6], {"bias": "all"}, "trained bias", None),
        ("v_head.summary.weight", [1, 8], {}, "value head of TRL", None),
        ("v_head.summary.weight", [1, 8], {"modules_to_save": ["v_head"]}, "full copy", "v_head"),
        ("lm_head.weight", [5000, 8], {}, "full weight", "lm_head"),
        ("model.norm.weight", [8], {}, "full weight", "model.norm.weight is stored in full, which replaces"),
        ("model.layers.0.k_proj.bias", [6], {}, "full weight", "model.layers.0.k_proj.bias"),
        ("score.weight", [2, 8], {"task_type": "SEQ_CLS"}, "full weight", "score"),
        ("model.q_proj.weight", [6, 8], {}, "not part of a LoRA adapter", "beside factors"),
        ("model.q_proj.lora_route.weight", [2, 8], {}, "not part of a LoRA adapter", "beside factors"),
        ("model.q_proj.lora_E", [4, 1], {}, "not part of a LoRA adapter", "beside factors"),
        ("model.o_proj.hada_w1_a", [6, 4], {}, "not part of a LoRA adapter", "beside factors"),
        ("model.o_proj.ia3_l", [6, 1], {}, "not part of a LoRA adapter", "beside factors"),
        ("embed_tokens.token_adapter.trainable_tokens_delta", [2, 8], {}, "trained", "embedding rows"),
        ("model.q_proj.bias", [6], {"bias": "all"}, "trained bias", None),
        ("something.else", [3], {}, "parameter of the base", "something.else is stored in full"),
        ("something.inv_freq", [3], {}, "not part of a LoRA adapter", None),
    ],
)
def test_every_other_key_is_ignored_with_a_reason(
    match: Match,
    pairs: Callable[..., Tensors],
    key: str,
    shape: list[int],
    fields: dict[str, Any],
    reason: str,
    refusal: str | None,
) -> None:
    tensors = pairs("model.q_proj")
    tensors[PREFIX + key] = ("F32", shape)
    found = match(tensors, **fields)
    assert [entry.key for entry in found.ignored] == [PREFIX + key]
    assert reason in found.ignored[0].reason
    assert len(found.used) + len(found.ignored) == len(tensors)
    assert found.refusals == () if refusal is None else refusal in found.refusals[0]


def test_nothing_that_matches_is_an_error_that_names_the_layout(match: Match) -> None:
    with pytest.raises(FormatUnknown, match="None of the 2 tensors belongs to a LoRA adapter: it looks like a kohya"):
        match({"lora_unet_x.lora_down.weight": ("F32", [4, 8]), "lora_unet_x.lora_up.weight": ("F32", [6, 4])})


def test_two_layouts_in_one_file(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    tensors["lora_unet_x.lora_down.weight"] = ("F32", [4, 8])
    tensors["lora_unet_x.lora_up.weight"] = ("F32", [6, 4])
    with pytest.raises(FormatUnknown, match="mixes two layouts"):
        match(tensors)


def test_alphas_in_tensors_are_not_ignored(match: Match, pairs: Callable[..., Tensors]) -> None:
    tensors = pairs("model.q_proj")
    tensors[f"{PREFIX}model.q_proj.alpha"] = ("F32", [])
    with pytest.raises(FormatUnknown, match="another layout"):
        match(tensors)


def test_modules_and_patterns_that_peft_would_pass_over_are_reported(
    match: Match, pairs: Callable[..., Tensors]
) -> None:
    found = match(pairs("model.q_proj", "model.o_proj"), rank_pattern={"z_proj": 2})
    assert any("z_proj" in warning and "matches no module" in warning for warning in found.warnings)
    assert any("'model.o_proj'" in warning and "not selected" in warning for warning in found.warnings)


def test_modules_that_peft_would_not_load_are_named_first_among_the_warnings(
    match: Match, pairs: Callable[..., Tensors]
) -> None:
    paths = [f"model.{letter}_proj" for letter in "abcdefghijklmnopqrstuvw"]
    odd: Tensors = {f"{PREFIX}odd.{number}": ("F32", [1]) for number in range(60)}
    found = match(pairs(*paths) | odd, target_modules=["q_proj", "r_proj"])
    assert found.warnings[0].startswith(f"21 {UNSELECTED} and its exceptions; stock PEFT would not load them, a merge")
    assert all(f"'{path}'" in found.warnings[0] for path in paths[:16])
    assert found.warnings[0].endswith("'model.v_proj', ….")
    assert "'model.q_proj'" not in found.warnings[0]


def test_what_has_not_the_prefix_of_the_factors_is_nothing_that_peft_loads(
    match: Match, pairs: Callable[..., Tensors]
) -> None:
    found = match(pairs("model.q_proj", "model.v_proj") | {"v_head.summary.weight": ("F32", [1, 8])})
    assert found.refusals == ()
    assert found.warnings == (
        "v_head.summary.weight is of TRL's value head, which PEFT does not load, and is ignored.",
    )


@pytest.mark.parametrize(("path", "embedding"), [("model.embed_tokens", True), ("wte", True), ("lm_head", False)])
def test_weights_that_peft_saves_along_with_an_adapted_embedding_are_copies(
    match: Match, pairs: Callable[..., Tensors], path: str, embedding: bool
) -> None:
    tensors = pairs("model.q_proj") if embedding else pairs("model.q_proj", path)
    if embedding:
        tensors[f"{PREFIX}{path}.lora_embedding_A"] = ("F32", [4, 50])
        tensors[f"{PREFIX}{path}.lora_embedding_B"] = ("F32", [8, 4])
    tensors[f"{PREFIX}{path}.base_layer.weight"] = ("F32", [50, 8])
    found = match(tensors, target_modules=["q_proj", path])
    assert found.refusals == ()
    (entry,) = found.ignored
    assert entry.reason.startswith("copy of a base weight that PEFT saved along")
    assert any("the base must be resized in the same way" in warning for warning in found.warnings)


def test_a_value_head_with_factors_of_its_own_is_adapted_and_its_weight_stands_beside_them(
    match: Match, pairs: Callable[..., Tensors]
) -> None:
    tensors = pairs("model.q_proj", "v_head.summary") | {f"{PREFIX}v_head.summary.weight": ("F32", [1, 8])}
    (reason,) = match(tensors, target_modules=["q_proj", "summary"]).refusals
    assert "stand beside factors" in reason


def test_several_weights_of_the_base_are_one_reason(match: Match, pairs: Callable[..., Tensors]) -> None:
    norms: Tensors = {f"{PREFIX}model.layers.{number}.norm.weight": ("F32", [8]) for number in range(30)}
    (reason,) = match(pairs("model.q_proj") | norms).refusals
    assert reason == "model.layers.0.norm.weight is stored in full, which replaces what the base has (and 29 more)"


@pytest.mark.parametrize("leaf", ["mixer.A_log", "mixer.D", "gate", "mixer.norm.scale"])
def test_every_parameter_that_peft_loads_beside_the_factors_keeps_them_from_being_merged(
    match: Match, pairs: Callable[..., Tensors], leaf: str
) -> None:
    key = f"{PREFIX}model.layers.0.{leaf}"
    found = match(pairs("model.layers.0.mixer.in_proj") | {key: ("F32", [8])}, target_modules=["in_proj"])
    assert found.refusals == (f"model.layers.0.{leaf} is stored in full, which replaces what the base has",)
    assert found.ignored == (
        IgnoredKey(key, "parameter of the base of no adapted module, which PEFT loads; kept in the stored file"),
    )


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        (f"{PREFIX}model.layers.0.self_attn.rotary_emb.inv_freq", "F32"),
        (f"{PREFIX}model.embeddings.position_ids", "F32"),
        (f"{PREFIX}model.layers.0.counter", "I64"),
        ("model.cls_token", "F32"),
    ],
)
def test_what_nobody_trains_or_peft_does_not_load_is_told_and_ignored(
    match: Match, pairs: Callable[..., Tensors], key: str, dtype: str
) -> None:
    found = match(pairs("model.layers.0.q_proj", "model.layers.0.v_proj") | {key: (dtype, [8])})
    assert found.refusals == ()
    assert found.warnings == (f"{key} is not part of a LoRA adapter and is ignored.",)


def test_reasons_stay_short_however_many_modules_they_are_of(match: Match, pairs: Callable[..., Tensors]) -> None:
    paths = [f"model.layers.{number}.experts" for number in range(50)]
    tensors = pairs(*paths, *(f"{path}.base_layer" for path in paths))
    tensors |= {f"{PREFIX}model.layers.{number}.norm.{leaf}": ("F32", [8]) for number in range(40) for leaf in "ab"}
    found = match(tensors, target_modules=["experts"], modules_to_save=["norm"])
    assert found.refusals == (
        f"{paths[0]}.base_layer is a parameter inside an adapted module (target_parameters) (and 49 more)",
        "model.layers.0.norm is stored as a full copy (modules_to_save) (and 39 more)",
    )


@pytest.mark.parametrize("head", ["model.", "lit_model.", "_forward_module.", "module.policy."])
def test_what_stands_before_the_prefix_is_removed_and_told(
    match: Match, pairs: Callable[..., Tensors], head: str
) -> None:
    found = match(pairs("model.q_proj", "model.v_proj", prefix=head + PREFIX))
    assert [module.path for module in found.modules] == ["model.q_proj", "model.v_proj"]
    assert any("before PEFT's prefix; it was removed" in warning for warning in found.warnings)


def test_modules_that_nearly_all_layers_have_are_missed(match: Match, pairs: Callable[..., Tensors]) -> None:
    whole = [f"model.layers.{number}.self_attn.{name}" for number in range(12) for name in ("q_proj", "v_proj")]
    assert match(pairs(*whole)).warnings == ()
    part = [path for path in whole if path != "model.layers.2.self_attn.v_proj"]
    (warning,) = match(pairs(*part)).warnings
    assert warning.startswith(
        "1 modules that nearly all layers have are missing, for instance 'model.layers.2.self_attn.v_proj'"
    )
    (warning,) = match(pairs(*(path for path in whole if ".1." not in path))).warnings
    assert warning.startswith(
        "2 modules that nearly all layers have are missing, for instance 'model.layers.1.self_attn.q_proj'"
    )
    (warning,) = match(pairs(*(path for path in whole if "v_proj" not in path))).warnings
    assert warning == "The file has no module of these names in target_modules: v_proj."


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [0, 2]}, {"exclude_modules": ["x"]}, {"target_modules": r".*[024]\..*q_proj"}]
)
def test_nothing_is_missed_where_only_some_layers_are_meant(
    match: Match, pairs: Callable[..., Tensors], fields: dict[str, Any]
) -> None:
    paths = [f"model.layers.{number}.q_proj" for number in (0, 1, 2, 4, 5, 6)]
    assert any("missing" in warning for warning in match(pairs(*paths)).warnings)
    assert not any("missing" in warning for warning in match(pairs(*paths), **fields).warnings)


@pytest.mark.parametrize("without", [range(3), range(0, 24, 4)])
def test_layers_of_several_kinds_miss_nothing(
    match: Match, pairs: Callable[..., Tensors], without: Iterable[int]
) -> None:
    """The first layers of a mixture of experts are dense, and every fourth layer may have another attention."""
    paths = [f"model.layers.{number}.{'v_proj' if number in without else 'q_proj'}" for number in range(24)]
    assert match(pairs(*paths)).warnings == ()


def test_factors_of_a_parameter_are_described_and_not_merged(match: Match, pairs: Callable[..., Tensors]) -> None:
    found = match(pairs("model.experts", "model.experts.base_layer"), target_modules=["experts"])
    assert found.refusals == ("model.experts.base_layer is a parameter inside an adapted module (target_parameters)",)


def test_all_linear_is_no_name_of_a_module(match: Match, pairs: Callable[..., Tensors]) -> None:
    paths = [f"model.layers.{number}.q_proj" for number in range(8)]
    assert match(pairs(*paths), target_modules="all-linear").warnings == ()
