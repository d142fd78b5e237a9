from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils import PeftType

from artifacts.errors import ConfigRefused
from artifacts.peft_config import BLOCK_TYPES, PeftLoraConfig, parse_config
from artifacts.peft_fields import BASE_CHANGING_INITS, DEFAULT_VALUES, FIELD_RULES, OTHER_PEFT_TYPES, PLAIN_INITS

Make = Callable[..., dict[str, Any]]


def refused(document: dict[str, Any]) -> ConfigRefused:
    with pytest.raises(ConfigRefused) as caught:
        parse_config(document)
    return caught.value


def test_every_field_of_peft_has_a_rule() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= FIELD_RULES.keys()
    assert FIELD_RULES.keys() - fields == {"merge_weights", "enable_lora"}  # PEFT before 0.3


def test_every_adapter_type_of_peft_is_known() -> None:
    assert set(OTHER_PEFT_TYPES) == {kind.value for kind in PeftType} - {"LORA"} | {"BONE"}


def test_defaults_are_those_of_peft() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    assert {name: defaults[name] for name in DEFAULT_VALUES} == DEFAULT_VALUES


def test_what_peft_writes_by_default_is_mergeable() -> None:
    config = parse_config({**LoraConfig(target_modules=["q"]).to_dict(), "target_modules": ["q"]})
    assert (config.rank, config.alpha, config.method, config.refusals, config.opaque) == (8, 8.0, "lora", (), False)


def test_scaling(lora_config: Make) -> None:
    plain = parse_config(lora_config(r=4, lora_alpha=8))
    stabilised = parse_config(lora_config(r=4, lora_alpha=8, use_rslora=True))
    assert plain.scaling_for("model.q_proj", 4) == 2.0
    assert stabilised.scaling_for("model.q_proj", 4) == 8 / math.sqrt(4)
    assert (plain.method, stabilised.method) == ("lora", "rslora")


def test_patterns_give_single_modules_their_rank_and_alpha(lora_config: Make) -> None:
    config = parse_config(
        lora_config(
            rank_pattern={r"^model\.layers\.0\.q_proj": 64, "k_proj": 2}, alpha_pattern={"layers.1.k_proj": 1.5}
        )
    )
    assert config.rank_for("model.layers.0.q_proj") == 64
    assert config.rank_for("model.layers.0.k_proj") == 2
    assert config.rank_for("model.layers.0.v_proj") == 4
    assert config.alpha_for("model.layers.1.k_proj") == 1.5
    assert config.scaling_for("model.layers.1.k_proj", 2) == 0.75
    assert config.unmatched_patterns(("model.layers.0.q_proj", "model.layers.0.k_proj")) == ("layers.1.k_proj",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("ensure_weight_tying", True),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("alora_invocation_tokens", [7, 8]),
        ("use_qalora", True),
        ("monteclora_config", {"num_samples": 8}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("enable_lora", [True, False, True]),
    ],
)
def test_stored_but_not_merged_and_the_field_is_named(lora_config: Make, field: str, value: Any) -> None:
    config = parse_config(lora_config(**{field: value}))
    assert len(config.refusals) == 1
    assert config.refusals[0].startswith(f"{field} is set: {FIELD_RULES[field].reason}")
    assert config.opaque == (FIELD_RULES[field].kind == "opaque")


def test_every_rule_that_keeps_from_merging_is_tested_above() -> None:
    parameters = test_stored_but_not_merged_and_the_field_is_named.pytestmark[0].args[1]  # type: ignore[attr-defined]
    kinds = {name for name, rule in FIELD_RULES.items() if rule.kind in ("unmergeable", "opaque")}
    assert {name for name, _ in parameters} == kinds


def test_dora_is_called_dora(lora_config: Make) -> None:
    assert parse_config(lora_config(use_dora=True, use_rslora=True)).method == "dora"


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_not_merged(lora_config: Make, bias: str) -> None:
    assert "bias is set" in parse_config(lora_config(bias=bias)).refusals[0]


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_explained(lora_config: Make, value: str) -> None:
    (reason,) = parse_config(lora_config(init_lora_weights=value)).refusals
    assert value in reason
    assert "changed base" in reason


@pytest.mark.parametrize("value", [True, False, None, *PLAIN_INITS])
def test_other_initialisations_are_harmless(lora_config: Make, value: Any) -> None:
    assert parse_config(lora_config(init_lora_weights=value)).refusals == ()


def test_every_initialisation_of_peft_is_known() -> None:
    hint = str(LoraConfig.__annotations__["init_lora_weights"])
    named = [word for word in (*PLAIN_INITS, *BASE_CHANGING_INITS) if f"'{word}'" in hint]
    assert hint.count("'") // 2 == len(named) + 1  # and pissa_niter_[number of iters]


def test_unknown_initialisation(lora_config: Make) -> None:
    assert "init_lora_weights" in refused(lora_config(init_lora_weights="magic")).detail


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dropout", 0.1),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("velora_config", {"num_groups": 64}),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("auto_mapping", {"base_model_class": "X"}),
        ("peft_version", "0.21.2"),
        ("inference_mode", True),
        ("exclude_modules", ["lm_head"]),
        ("layers_to_transform", [0, 1]),
        ("layers_pattern", "layers"),
        ("megatron_core", "megatron.core"),
        ("qalora_group_size", 16),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("merge_weights", True),
    ],
)
def test_fields_that_leave_the_delta_alone(lora_config: Make, field: str, value: Any) -> None:
    assert parse_config(lora_config(**{field: value})).refusals == ()


def test_layer_replication_is_refused_by_name(lora_config: Make) -> None:
    error = refused(lora_config(layer_replication=[[0, 4], [2, 5]]))
    assert "layer_replication: can not be honoured" in error.detail


def test_unknown_field_is_refused_by_name_when_it_is_set(lora_config: Make) -> None:
    error = refused(lora_config(use_magic=True))
    assert "use_magic" in error.detail
    assert error.errors[0].pointer == "adapter_config.json#/use_magic"


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_field_that_is_empty_is_harmless(lora_config: Make, value: Any) -> None:
    config = parse_config(lora_config(use_magic=value))
    assert config.refusals == ()
    assert config.delta_fields == parse_config(lora_config()).delta_fields


@pytest.mark.parametrize("alpha", [0, 0.0, -1, "8", None, True, math.inf, math.nan, [8]])
def test_alpha_of_zero_and_its_kin(lora_config: Make, alpha: Any) -> None:
    error = refused(lora_config(lora_alpha=alpha))
    assert "lora_alpha: must be a number above 0" in error.detail
    assert ("would change nothing" in error.detail) == (alpha == 0)


def test_alpha_of_zero_in_a_pattern(lora_config: Make) -> None:
    assert "alpha_pattern" in refused(lora_config(alpha_pattern={"q_proj": 0})).detail


@pytest.mark.parametrize("rank", [0, -1, 1.5, "4", None, True, 10**9])
def test_rank_that_is_none(lora_config: Make, rank: Any) -> None:
    assert "r: must be an integer" in refused(lora_config(r=rank)).detail


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("target_modules", [1]),
        ("target_modules", 3),
        ("modules_to_save", "classifier"),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("bias", "some"),
        ("base_model_name_or_path", ["x"]),
        ("base_model_name_or_path", "x\ny"),
        ("revision", "r" * 400),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", 5),
    ],
)
def test_fields_of_a_wrong_type(lora_config: Make, field: str, value: Any) -> None:
    assert field in refused(lora_config(**{field: value})).detail


def test_all_findings_are_reported_together(lora_config: Make) -> None:
    error = refused(lora_config(r=0, lora_alpha=0, use_magic=1))
    assert {finding.pointer.partition("#/")[2] for finding in error.errors} == {"r", "lora_alpha", "use_magic"}
    assert "and 2 more" in error.detail


def test_target_modules_as_list_expression_or_keyword(lora_config: Make) -> None:
    assert parse_config(lora_config()).target_modules == ("q_proj", "v_proj")
    expression = parse_config(lora_config(target_modules=r".*\.q_proj"))
    assert (expression.target_modules, expression.target_modules_regex) == ((r".*\.q_proj",), True)
    keyword = parse_config(lora_config(target_modules="all-linear"))
    assert (keyword.target_modules, keyword.target_modules_regex) == (("all-linear",), False)


def test_missing_and_unknown_peft_type(lora_config: Make) -> None:
    document = lora_config()
    del document["peft_type"]
    assert "no peft_type" in refused(document).detail
    assert "'LORRA' is unknown" in refused(lora_config(peft_type="LORRA")).detail


@pytest.mark.parametrize("kind", OTHER_PEFT_TYPES)
def test_other_types_are_accepted_as_stored(kind: str) -> None:
    config = parse_config({"peft_type": kind, "r": 16, "alpha": 32, "anything": {"goes": 1}, "target_modules": ["q"]})
    assert (config.method, config.opaque, config.rank, config.alpha) == (kind.lower(), True, 16, 32.0)
    if kind in BLOCK_TYPES:  # what keeps them from being merged is found in their tensors
        assert config.refusals == ()
    else:
        assert kind in config.refusals[0]


def test_other_types_without_a_rank() -> None:
    config = parse_config({"peft_type": "IA3", "target_modules": "all-linear"})
    assert (config.rank, config.alpha, config.target_modules) == (0, 0.0, ("all-linear",))


def test_delta_fields_ignore_names_and_training(lora_config: Make) -> None:
    def fields(**changes: Any) -> dict[str, Any]:
        config: PeftLoraConfig = parse_config(lora_config(**changes))
        return config.delta_fields

    assert fields() == fields(lora_dropout=0.5, base_model_name_or_path="other/name", peft_version="0.1")
    assert fields() != fields(use_dora=True)
    assert fields() != fields(fan_in_fan_out=True)
    assert fields() != fields(init_lora_weights="pissa")
    assert fields(modules_to_save=["a", "b"]) == fields(modules_to_save=["b", "a"])
    assert fields(use_bdlora={"nblocks": 2}, r=2) != fields(use_bdlora={"nblocks": 2}, r=4)
