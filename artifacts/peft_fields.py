"""What every field of PEFT's `adapter_config.json` means for ΔW: one table, from field to rule.

The fields are those of `peft.LoraConfig` 0.21.2 and the fields that older releases wrote. A test asserts that no field
of the installed `LoraConfig` is missing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RuleKind = Literal["honoured", "harmless", "unmergeable", "opaque", "refused"]


@dataclass(frozen=True, slots=True)
class FieldRule:
    """How one field is treated when it is set.

    Attributes:
        kind: "honoured": the value is used. "harmless": it steers training only, the tensors already hold its effect.
            "unmergeable": the adapter is stored, its modules are described, merging is refused with `reason`.
            "opaque": as unmergeable, and the tensors follow another layout than A and B of one rank, so that they
            are stored without a description per module. "refused": such an adapter is not accepted.
        reason: why; for the last three kinds it completes the sentence "`field` is set: …".
        method: what the adapter is called when the field makes it another method than LoRA.
    """

    kind: RuleKind
    reason: str
    method: str | None = None


def _honoured(reason: str) -> FieldRule:
    return FieldRule("honoured", reason)


def _harmless(reason: str) -> FieldRule:
    return FieldRule("harmless", reason)


FIELD_RULES: Mapping[str, FieldRule] = {
    # identity of the adapter and of its base
    "peft_type": _honoured("decides which rules hold"),
    "task_type": _honoured("kept with the adapter"),
    "base_model_name_or_path": _honoured("names the base model"),
    "revision": _honoured("names the base model's revision"),
    "auto_mapping": _harmless("names the model class that the adapter was trained on"),
    "peft_version": _harmless("names the library that wrote the file"),
    "inference_mode": _harmless("freezes the weights on loading"),
    # ΔW
    "r": _honoured("the default rank"),
    "lora_alpha": _honoured("the default alpha"),
    "rank_pattern": _honoured("rank of single modules"),
    "alpha_pattern": _honoured("alpha of single modules"),
    "use_rslora": _honoured("scaling is alpha/√r"),
    "fan_in_fan_out": _honoured("the base weight is stored as (in, out); A and B are not affected"),
    "bias": _honoured("'all' and 'lora_only' replace bias vectors of the base"),
    "init_lora_weights": _honoured("some initialisations change the base weights"),
    "use_dora": FieldRule(
        "unmergeable",
        "DoRA rescales every column of W + scaling·B·A to a learned norm, so ΔW depends on the base weights",
        method="dora",
    ),
    "lora_bias": _honoured("every lora_B carries a bias vector, which is scaled and added as B·A is"),
    # which modules
    "target_modules": _honoured("which modules are adapted"),
    "exclude_modules": _honoured("which modules are not adapted"),
    "layers_to_transform": _honoured("which layers are adapted"),
    "layers_pattern": _honoured("where the layer's number stands"),
    "modules_to_save": FieldRule(
        "unmergeable", "whole modules were trained and are stored as full copies, which no low-rank sum can express"
    ),
    "target_parameters": FieldRule(
        "opaque", "parameters of fused experts are adapted, whose factors hold all experts in one matrix"
    ),
    "trainable_token_indices": FieldRule(
        "unmergeable", "single rows of the embedding were trained and are stored besides the factors"
    ),
    "layer_replication": FieldRule(
        "refused", "the base model is rebuilt with repeated layers, so its module paths are not those of the base model"
    ),
    "ensure_weight_tying": FieldRule(
        "unmergeable", "the adapter of the embedding acts on the tied output layer as well, transposed"
    ),
    # training only
    "lora_dropout": _harmless("acts during training only"),
    "loftq_config": _harmless("parameters of the initialisation; `init_lora_weights` says whether it was used"),
    "eva_config": _harmless("parameters of the initialisation; the resulting ranks are in `rank_pattern`"),
    "corda_config": _harmless("parameters of the initialisation; `init_lora_weights` says whether it was used"),
    "lora_ga_config": _harmless("parameters of the initialisation; `init_lora_weights` says whether it was used"),
    "velora_config": _harmless("compresses activations in the backward pass only"),
    "megatron_core": _harmless("names a Python module; used only with `megatron_config`"),
    "qalora_group_size": _harmless("used only with `use_qalora`"),
    "runtime_config": _harmless("PEFT ignores it in a file"),
    # variants of LoRA with another forward pass
    "megatron_config": FieldRule(
        "opaque", "trained on Megatron's parallel layers: the file may hold the factors of one shard"
    ),
    "alora_invocation_tokens": FieldRule(
        "unmergeable",
        "activated LoRA acts only on tokens after its invocation, so it has no constant ΔW",
        method="alora",
    ),
    "use_qalora": FieldRule("opaque", "A acts on pooled inputs, so B·A is not a d_out×d_in matrix", method="qalora"),
    "monteclora_config": FieldRule("opaque", "the factors are perturbed by a sampler", method="monteclora"),
    "use_bdlora": FieldRule("opaque", "one of the factors is block-diagonal and stored as its blocks", method="bdlora"),
    "arrow_config": FieldRule("opaque", "a router chooses between several adapters per token", method="arrow"),
    "kasa_config": FieldRule(
        "opaque", "ΔW is scaling·B·diag(σ)·A on a base whose smallest singular values were cut", method="kasa"
    ),
    # PEFT before 0.3
    "merge_weights": _harmless("merged on the fly in PEFT before 0.3"),
    "enable_lora": FieldRule("opaque", "the factors of fused projections are stacked (PEFT before 0.3)"),
}
"""Field → rule. A field that is null, false, empty or at its default never triggers a reason."""

DEFAULT_VALUES: Mapping[str, object] = {"megatron_core": "megatron.core", "qalora_group_size": 16}

BASE_CHANGING_INITS: Mapping[str, str] = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
"""Values of `init_lora_weights` (also as in "pissa_niter_4") after which the base weights are not the original ones."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights alone."""

OTHER_PEFT_TYPES: tuple[str, ...] = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADALORA",
    "ADAMSS",
    "BOFT",
    "ADAPTION_PROMPT",
    "IA3",
    "BEFT",
    "LILY",
    "LOHA",
    "LOKR",
    "OFT",
    "POLY",
    "LN_TUNING",
    "VERA",
    "FROD",
    "PVERA",
    "FOURIERFT",
    "GLORA",
    "XLORA",
    "HRA",
    "VBLORA",
    "UNILORA",
    "CPT",
    "MISS",
    "BONE",  # the name of MISS in PEFT before 0.16
    "RANDLORA",
    "ROAD",
    "TRAINABLE_TOKENS",
    "HIRA",
    "SHIRA",
    "C3A",
    "WAVEFT",
    "OSF",
    "DELORA",
    "GRALORA",
    "CARTRIDGE",
    "TINYLORA",
    "PSOFT",
    "PEANUT",
    "SHADOW",
    "SUPERTUNING",
    "DEFT",
)
"""The other values of `peft_type`: such adapters are stored as they are and not merged."""
