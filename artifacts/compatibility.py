"""Which engines load an adapter, told from its description alone: one rule after another, each with its source.

An engine that refuses an adapter says so when it is asked to load it, which may be hours after it was trained. One that
loads it and does something else says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from artifacts.declared_types import DECLARED_TYPES
from artifacts.errors import RequestInvalid
from artifacts.formats.writers import WRITERS
from artifacts.formats.writing import subject_of
from artifacts.loading import foreign_key, other_diffusers_key, stored_for_diffusers
from artifacts.manifest import PEFT_FORMATS, AdapterManifest
from artifacts.peft_fields import OTHER_PEFT_TYPES

Level = Literal["refuses", "changes", "needs"]
Engine = Literal["vllm", "diffusers", "peft", "transformers", "kohya", "comfy", "llama.cpp"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes; 16 unless it is given."""

_VLLM_CONFIG = "https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py"
_VLLM_RANKS = "https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py"
_LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py"
_PEFT = "https://github.com/huggingface/peft/blob/main/src/peft/utils/peft_types.py"
_INJECT = "https://github.com/huggingface/peft/blob/main/src/peft/mapping.py"
_WRITER = "docs/how-to/download.md"
_CONVERT = "POST /adapters/{id}/convert makes AdaLoRA, DoRA, LoHa, LoKr and VeRA adapters plain LoRAs."
_ONE_SCALING = 'POST /merge with this adapter alone and the method "cat" writes the same ΔW with scaling 1.'
_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/peft.py"
_PEFT_KEYS = "https://github.com/huggingface/peft/blob/main/src/peft/utils/save_and_load.py"
_DIFFUSERS_KEYS = "https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/lora_pipeline.py"
NO_LAYERS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
    "SHADOW",
)
"""Types that are no layers of a model, or put themselves into it in a way of their own."""
SHARED_STATE = ("FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""Types whose layers share tensors, which PEFT's wrapper round the model keeps."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says of an adapter.

    Attributes:
        rule: its stable name.
        level: "refuses": the engine does not load it. "changes": it loads it, and ΔW is another than the adapter's.
            "needs": it loads it under the condition that `message` names.
        pointer: where in the answer of `GET /adapters/{id}` the cause stands (a JSON pointer).
        remedy: what to do about it; "" where there is nothing.
        source: where the rule is from.
    """

    rule: str
    level: Level
    pointer: str
    message: str
    remedy: str
    source: str


def findings(
    manifest: AdapterManifest, engine: Engine, base_config: Mapping[str, Any] | None = None
) -> tuple[Finding, ...]:
    """What stands between the adapter and the engine; nothing means that it loads as it is handed out by default.

    Args:
        base_config: config.json of the base model, where it is known, by which a file for llama.cpp is written.
    """
    if engine == "llama.cpp":
        return tuple(_llama_cpp(manifest, base_config))
    return tuple(_ENGINES[engine](manifest))


def loads(found: tuple[Finding, ...]) -> bool:
    """Whether the engine loads the adapter and applies its ΔW, once what it needs is seen to."""
    return all(finding.level == "needs" for finding in found)


def _vllm(manifest: AdapterManifest) -> Iterator[Finding]:
    yield from _language_model(manifest, "vLLM", _VLLM_CONFIG)
    yield from _plain(manifest, "vLLM", _VLLM_CONFIG)
    yield from _as_peft(manifest)
    config = manifest.config
    if config.get("modules_to_save"):
        yield Finding(
            "vllm-modules-to-save",
            "refuses",
            "/config/modules_to_save",
            "vLLM loads no modules that were trained whole and saved beside the factors",
            "",
            _VLLM_CONFIG,
        )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield Finding("vllm-bias", "refuses", "/config/bias", "vLLM applies no biases of adapters", "", _VLLM_CONFIG)
    if manifest.rank > VLLM_RANKS[-1]:
        yield Finding(
            "vllm-rank",
            "refuses",
            "/rank",
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}; this one is {manifest.rank}",
            f"Download it with rank={VLLM_RANKS[-1]} or less.",
            _VLLM_RANKS,
        )
    elif manifest.rank > 16:
        smallest = next(rank for rank in VLLM_RANKS if rank >= manifest.rank)
        yield Finding(
            "vllm-max-lora-rank",
            "needs",
            "/rank",
            f"start vLLM with --max-lora-rank {smallest} or more; it serves ranks up to 16 otherwise",
            "Or download it with rank=16.",
            _VLLM_RANKS,
        )
    if len({module.scaling for module in manifest.modules}) > 1:
        yield Finding(
            "vllm-patterns",
            "needs",
            "/config/rank_pattern",
            "modules differ in alpha/rank: a release is needed that reads rank_pattern and alpha_pattern; older ones "
            "apply lora_alpha/r to every module",
            _ONE_SCALING,
            _VLLM_CONFIG,
        )


def _llama_cpp(manifest: AdapterManifest, base_config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """With the base model's config.json the rules are those of the file that is written here; without it, those of
    llama.cpp's converter, which somebody else has to run."""
    if base_config is not None:
        refused = _can_not_write(manifest, "gguf", base_config)
        if refused is not None:
            yield Finding("llama-cpp-names", "refuses", "/modules", refused, _CONVERT, _LLAMA_CPP)
        else:
            message = "it reads adapters as GGUF files"
            yield Finding("llama-cpp-gguf", "needs", "/format", message, "Download it with format=gguf.", _WRITER)
        return
    yield from _language_model(manifest, "llama.cpp", _LLAMA_CPP)
    yield from _plain(manifest, "llama.cpp", _LLAMA_CPP)
    yield Finding(
        "llama-cpp-gguf",
        "needs",
        "/format",
        "convert_lora_to_gguf.py of llama.cpp makes a GGUF file of the PEFT directory and the base model's config.json",
        "Send config.json of the base model along and download it with format=gguf, or convert the PEFT directory.",
        _LLAMA_CPP,
    )
    extra = [item.key for item in manifest.report.ignored if item.reason.endswith("kept in the stored file")]
    extra += [module.bias_key for module in manifest.modules if module.bias_key is not None]
    if extra:
        yield Finding(
            "llama-cpp-tensors",
            "refuses",
            "/report/ignored",
            f"its converter takes factors and norms; {len(extra)} other tensors are there, for instance {extra[0]}",
            "",
            _LLAMA_CPP,
        )
    alpha = float(manifest.config.get("lora_alpha") or manifest.alpha)
    other = [
        module.path for module in manifest.modules if abs(alpha / module.rank - module.scaling) > 1e-9 * abs(alpha)
    ]
    if other:
        yield Finding(
            "llama-cpp-alpha",
            "changes",
            "/config/lora_alpha",
            f"it applies lora_alpha over the rank and reads neither use_rslora nor alpha_pattern: {len(other)} modules "
            f"would be scaled otherwise, for instance {other[0]}",
            _ONE_SCALING,
            _LLAMA_CPP,
        )


def _peft(manifest: AdapterManifest) -> Iterator[Finding]:
    yield from _type_of_peft(manifest)
    yield from _names(manifest, "peft", _PEFT_KEYS)


def _type_of_peft(manifest: AdapterManifest) -> Iterator[Finding]:
    kind = str(manifest.config.get("peft_type", "LORA"))
    if manifest.format in PEFT_FORMATS and kind in DECLARED_TYPES:
        message = f"PEFT does not know the type {kind}: {DECLARED_TYPES[kind].reason}"
        yield Finding("peft-type", "refuses", "/config/peft_type", message, "", _PEFT)
    yield from _as_peft(manifest)


def _transformers(manifest: AdapterManifest) -> Iterator[Finding]:
    """load_adapter puts the layers in by PEFT, and then finds the tensors by renaming rules of its own."""
    yield from _type_of_peft(manifest)
    kind = str(manifest.config.get("peft_type", "LORA"))
    if kind in NO_LAYERS:
        yield Finding(
            "transformers-prompt-learning",
            "refuses",
            "/config/peft_type",
            f"load_adapter of transformers puts layers into the model, and {kind} has none",
            "Load it with PEFT.",
            _INJECT,
        )
    if kind in SHARED_STATE:
        yield Finding(
            "transformers-shared-state",
            "refuses",
            "/config/peft_type",
            f"the layers of {kind} share tensors, for which load_adapter of transformers has no place",
            "Load it with PEFT.",
            _INJECT,
        )
    if manifest.format not in PEFT_FORMATS:
        return
    magnitudes = [module.magnitude_key for module in manifest.modules if module.magnitude_key is not None]
    decomposed = manifest.method == "dora" or manifest.config.get("use_dora") is True
    if decomposed and not (magnitudes and all(key.endswith(".weight") for key in magnitudes)):
        yield Finding(
            "transformers-dora",
            "changes",
            "/config/use_dora",
            "load_adapter of transformers looks for the magnitudes under other names than PEFT saves them by, and "
            "leaves them at their first values",
            f"Load it with PEFT. {_CONVERT}",
            _TRANSFORMERS,
        )
    if manifest.config.get("alora_invocation_tokens"):
        yield Finding(
            "transformers-alora",
            "changes",
            "/config/alora_invocation_tokens",
            "an activated LoRA needs PEFT's wrapper round the model to find its invocation; without, it does nothing",
            "Load it with PEFT.",
            _TRANSFORMERS,
        )
    yield from _names(manifest, "transformers", _TRANSFORMERS)


def _names(manifest: AdapterManifest, engine: Literal["peft", "transformers"], source: str) -> Iterator[Finding]:
    foreign = [
        key
        for module in manifest.modules
        for key in (*module.factor_keys, module.magnitude_key)
        if key is not None and foreign_key(key, module.path, engine)
    ]
    if manifest.format in PEFT_FORMATS and foreign:
        title = "PEFT" if engine == "peft" else "transformers"
        yield Finding(
            f"{engine}-names",
            "changes",
            "/modules",
            f"{title} passes over {len(foreign)} tensors with no more than a warning, as their names are not those "
            f"that PEFT saves: {foreign[0]}",
            _ONE_SCALING if manifest.mergeable else "",
            source,
        )


def _diffusers(manifest: AdapterManifest) -> Iterator[Finding]:
    """A stored file of diffusers' own is given as it is; every other is written anew."""
    if stored_for_diffusers(manifest):
        return
    found = tuple(_written("diffusers")(manifest))
    yield from found
    other = other_diffusers_key(manifest)
    if "diffusers" in manifest.format.split("+") and other is not None and not found:
        message = f"it passes over names as {other}, or refuses them"
        yield Finding(
            "diffusers-format", "needs", "/modules", message, "Download it with format=diffusers.", _DIFFUSERS_KEYS
        )


def _written(engine: Engine) -> Callable[[AdapterManifest], Iterator[Finding]]:
    """The rules of an engine are those of the file that it reads: whether it can be written."""

    def check(manifest: AdapterManifest) -> Iterator[Finding]:
        refused = _can_not_write(manifest, engine)
        if refused is not None:
            yield Finding(f"{engine}-names", "refuses", "/modules", refused, _CONVERT, _WRITER)
        elif engine not in manifest.format.split("+"):
            message = f"it is stored as {manifest.format}"
            yield Finding(
                f"{engine}-format", "needs", "/format", message, f"Download it with format={engine}.", _WRITER
            )

    return check


def _can_not_write(manifest: AdapterManifest, name: str, base_config: Mapping[str, Any] | None = None) -> str | None:
    try:
        WRITERS[name].plan(subject_of(manifest, name, None, base_config))
    except RequestInvalid as error:
        return error.detail.rstrip(".")
    return None


def _as_peft(manifest: AdapterManifest) -> Iterator[Finding]:
    if manifest.format in PEFT_FORMATS:
        return
    refused = _can_not_write(manifest, "peft")
    if refused is not None:
        yield Finding("peft-directory", "refuses", "/format", refused, _CONVERT, _WRITER)
    else:
        message = f"it is stored as {manifest.format}"
        yield Finding("peft-format", "needs", "/format", message, "Download it with format=peft.", _WRITER)


def _language_model(manifest: AdapterManifest, engine: str, source: str) -> Iterator[Finding]:
    if manifest.report.facts.architecture is not None:
        message = f"{engine} runs language models; this is an adapter of {manifest.report.facts.architecture}"
        yield Finding("language-model", "refuses", "/facts/architecture", message, "", source)


def _plain(manifest: AdapterManifest, engine: str, source: str) -> Iterator[Finding]:
    kind = str(manifest.config.get("peft_type", "LORA"))
    if manifest.method == "dora":
        message, pointer = f"{engine} does not apply DoRA", "/config/use_dora"
    elif kind in OTHER_PEFT_TYPES or kind in DECLARED_TYPES:
        message, pointer = f"{engine} applies LoRA; this is of type {kind}", "/config/peft_type"
    elif not manifest.mergeable:
        message, pointer = manifest.refusal or "its ΔW is not scaling·B·A", "/refusal"
    else:
        return
    yield Finding("plain-lora", "refuses", pointer, message, _CONVERT, source)


_ENGINES: Mapping[Engine, Callable[[AdapterManifest], Iterator[Finding]]] = MappingProxyType(
    {
        "vllm": _vllm,
        "diffusers": _diffusers,
        "peft": _peft,
        "transformers": _transformers,
        "kohya": _written("kohya"),
        "comfy": _written("comfy"),
    }
)
