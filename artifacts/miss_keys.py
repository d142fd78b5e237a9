"""The tensors of a MiSS adapter, or of a BONE one, as it was called before: one block per module (arXiv:2409.15371).

The number of dimensions tells the variant: (r, m) is the tile form, whose ΔW is exactly B·A (`artifacts.shard_blocks`);
(d_out/r, r, r) is "bat", whose ΔW depends on the base weights. The width of the inputs is in no file of PEFT's.
"""

from __future__ import annotations

import json
import re

from artifacts.errors import FieldError, FileBroken, FormatUnknown, ShapeMismatch
from artifacts.manifest import IgnoredKey, LoraModule
from artifacts.peft_config import PeftLoraConfig
from artifacts.peft_keys import FLOATS, MAX_FINDINGS, PREFIX, KeyMatch
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo

SIDES_KEY = "rankwise_module_sides"
"""Metadata of the adapters that are trained here: JSON, module path → [d_out, d_in]."""

MAX_SIDE = 2**18
"""Far above the inputs of any layer; it bounds the memory that a stranger's metadata can ask for."""

BAT_REFUSAL = "it is the form bat of MiSS, whose ΔW has full rank and depends on the base weights"
_BLOCK = re.compile(r"(?P<path>.+)\.(?:miss|bone)_block")


def match_blocks(header: SafetensorsHeader, config: PeftLoraConfig, *, component: str = "") -> KeyMatch:
    """Describe the modules of a MiSS adapter; of the form bat, which has no factors, only the keys.

    Args:
        component: only keys that begin so are looked at; it stays part of the module's path.

    Raises:
        FileBroken: blocks of two variants, or of other sides than the configuration says.
        FormatUnknown: there is no block.
    """
    blocks: dict[str, TensorInfo] = {}
    others: list[TensorInfo] = []
    for name, info in sorted(header.tensors.items()):
        if name.startswith(component):
            found = _BLOCK.fullmatch(name[len(component) :].removeprefix(PREFIX))
            if found is None:
                others.append(info)
            elif found["path"] in blocks:
                raise FileBroken(f"{name!r} and {blocks[found['path']].name!r} are both the block of one module.")
            else:
                blocks[found["path"]] = info
    if not blocks:
        raise FormatUnknown(
            "None of the tensors is a block of MiSS.", hint="PEFT calls them base_model.model.<module>.miss_block."
        )
    _check_blocks(blocks, config)
    ignored, refusals = _explain(others, config)
    used = tuple(info.name for info in blocks.values())
    warnings = [f"{entry.key} is not part of a MiSS adapter and is ignored." for entry in ignored if _odd(entry)]
    if any(not info.name[len(component) :].startswith(PREFIX) for info in blocks.values()):
        warnings.append(f"Keys lack the prefix {PREFIX!r}; stock PEFT would load nothing from them.")
    if _is_bat(blocks):
        return KeyMatch((), ignored, used, tuple(warnings), (BAT_REFUSAL, *refusals))
    modules, doubts = _with_known_sides(
        [_module(component + path, info, config) for path, info in blocks.items()], header
    )
    return KeyMatch(modules, ignored, used, (*warnings, *doubts), refusals)


def _is_bat(blocks: dict[str, TensorInfo]) -> bool:
    return all(len(info.shape) == 3 for info in blocks.values())


def _check_blocks(blocks: dict[str, TensorInfo], config: PeftLoraConfig) -> None:
    dimensions = {len(info.shape): path for path, info in blocks.items()}
    if len(dimensions) > 1:
        raise FileBroken(
            f"The file mixes two variants of MiSS: the blocks of {' and '.join(sorted(dimensions.values()))} have "
            f"{' and '.join(map(str, sorted(dimensions)))} dimensions.",
            hint="Upload each adapter as a file of its own.",
        )
    variant = config.raw.get("init_weights", True)
    faults = []
    for path, info in blocks.items():
        fault = _fault(info, config, variant)
        if fault:
            faults.append(FieldError(path, f"{path}: the block of shape {info.shape} {fault}"))
    if faults:
        raise FileBroken(
            f"{len(faults)} of {len(blocks)} modules do not fit: {faults[0].message}.",
            hint="Compare the file with its adapter_config.json: is it the one that was saved with it?",
            errors=faults[:MAX_FINDINGS],
        )


def _fault(info: TensorInfo, config: PeftLoraConfig, variant: object) -> str | None:
    shape, r = info.shape, config.rank
    if info.dtype not in FLOATS:
        return f"has dtype {info.dtype}; blocks are floating-point numbers"
    if len(shape) not in (2, 3) or 0 in shape:
        return "is no block of MiSS"
    if len(shape) == 3:
        return None if shape[1:] == (r, r) else f"has not the sides {r}×{r} that adapter_config.json says"
    if variant == "bat":
        return 'has two dimensions, but init_weights is "bat"'
    if shape[0] != r:
        return f"has not the rank {r} that adapter_config.json says"
    if variant == "mini" and shape[1] != config.raw.get("mini_r", 1):
        return f"has not the mini_r {config.raw.get('mini_r', 1)} that adapter_config.json says"
    return None


def _module(path: str, info: TensorInfo, config: PeftLoraConfig) -> LoraModule:
    rank = min(info.shape)
    d_out = 0 if config.raw.get("init_weights") == "mini" else info.shape[1]
    return LoraModule(
        path=path,
        kind="linear",
        a_key="",
        b_key="",
        rank=rank,
        alpha=float(rank),
        scaling=1.0,
        d_in=0,
        d_out=d_out,
        a_shape=(rank, 0),
        b_shape=(d_out, rank),
        dtype=info.dtype,
        block_key=info.name,
        block_shape=info.shape,
    )


def _with_known_sides(modules: list[LoraModule], header: SafetensorsHeader) -> tuple[tuple[LoraModule, ...], list[str]]:
    """The modules with the sides that the metadata tells, and what the uploader should know of it."""
    told = _told_sides(header.metadata.get(SIDES_KEY))
    found, wrong = [], []
    for module in modules:
        try:
            found.append(module.with_sides(*told[module.path]) if module.path in told else module)
        except ShapeMismatch as error:
            wrong.append(error.detail)
            found.append(module)
    doubts = [f"{SIDES_KEY} of the metadata does not fit the blocks and is ignored: {wrong[0]}"] if wrong else []
    unknown = [module.path for module in found if not module.complete]
    if unknown:
        doubts.append(
            f"The file does not tell the sides of {len(unknown)} of its layers, for instance {unknown[0]!r}: "
            "PEFT writes it into no MiSS adapter. A merge takes them from the registered base model or from another "
            "of its adapters."
        )
    return tuple(found), doubts


def _told_sides(text: str | None) -> dict[str, tuple[int, int]]:
    try:
        document = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {path: (sides[0], sides[1]) for path, sides in document.items() if _are_sides(sides)}


def _are_sides(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and 0 < side <= MAX_SIDE for side in value)
    )


_NO_PART = "not part of a MiSS adapter; PEFT does not load it"


def _odd(entry: IgnoredKey) -> bool:
    return entry.reason == _NO_PART


def _explain(others: list[TensorInfo], config: PeftLoraConfig) -> tuple[tuple[IgnoredKey, ...], tuple[str, ...]]:
    """Why the tensors that are no blocks are not used, and which of them keep the adapter from being merged."""
    ignored, refusals = [], []
    for info in others:
        module, _, leaf = info.name.removeprefix(PREFIX).rpartition(".")
        if config.saved_names.inside(module):
            reason = "full copy of a trained module (modules_to_save); kept in the stored file"
        elif leaf == "bias" and config.raw.get("bias", "none") != "none":
            reason = "trained bias of the base; kept in the stored file"
        else:
            reason = _NO_PART
        ignored.append(IgnoredKey(info.name, reason))
    if config.modules_to_save:
        refusals.append("modules_to_save is set: whole modules were trained and are stored as full copies")
    if (config.raw.get("bias") or "none") != "none":
        refusals.append("bias is set: bias vectors of the base were trained, which B·A can not express")
    return tuple(ignored), tuple(refusals)
