"""From tensor names to modules: every key of a PEFT file is used, or ignored with a reason."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from artifacts.errors import FieldError, FileBroken, FormatUnknown
from artifacts.formats.roles import BUFFERS, WEAK, part_of
from artifacts.identification import Identification, identify
from artifacts.lost_modules import missing_modules
from artifacts.manifest import IgnoredKey, LoraModule, ModuleKind
from artifacts.peft_config import PeftLoraConfig
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo

PREFIX = "base_model.model."
MAX_FINDINGS = 20

WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Name components that training wrappers leave in keys, and who leaves them. PEFT loads nothing from such keys."""

_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
UNSELECTED = "modules are not selected by target_modules"
"""In the warning of factors that PEFT would not load: what is made of the adapter must be told too."""

_REPLACES = "stored in full, which replaces what the base has"
_SAVED_ALONG = ("embed_tokens", "lm_head")
"""Layers whose weights `save_pretrained` of PEFT writes without being told to, where one of them is adapted."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """What the keys say.

    Attributes:
        modules: the adapted modules, sorted by path.
        ignored: tensors that are no part of any ΔW, with the reason.
        used: the keys that are.
        warnings: repairs and oddities that the uploader should know.
        refusals: reasons, found in the keys, why the adapter can not be merged.
    """

    modules: tuple[LoraModule, ...]
    ignored: tuple[IgnoredKey, ...]
    used: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()


@dataclass(slots=True)
class _Parts:
    """The tensors of one module, by role."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)


def match_keys(
    header: SafetensorsHeader, config: PeftLoraConfig, *, component: str = "", layout: Identification | None = None
) -> KeyMatch:
    """Pair the factors of a file and check them against its configuration.

    Args:
        header: the file's header.
        config: its configuration, or that of one component.
        component: "unet." and the like for files that hold several models: only these keys are looked at, and the
            component stays part of the module's path.
        layout: what `identify` says of the header, where it was asked before.

    Raises:
        FileBroken: a factor without its partner, shapes that are no low-rank pair, a rank that is not the
            configuration's, two tensors for one role, factors of integer dtype.
        FormatUnknown: no key of the file belongs to a LoRA adapter, or two layouts are mixed.
        ConfigRefused: a pattern of the configuration is no valid expression.
    """
    return _Matching(header, config, component, layout or identify(header)).run()


class _Matching:
    def __init__(
        self, header: SafetensorsHeader, config: PeftLoraConfig, component: str, layout: Identification
    ) -> None:
        self._infos = [info for name, info in sorted(header.tensors.items()) if name.startswith(component)]
        self._layout = layout
        self._config = config
        self._component = component
        self._parts: dict[str, _Parts] = {}
        self._adapters: set[str] = set()
        self._others: list[tuple[str, TensorInfo]] = []
        self._heads: set[str] = set()
        self._counted: dict[str, list[str]] = defaultdict(list)
        self._beside: list[str] = []
        self._wrappers: set[str] = set()
        self._prefixes: set[int] = set()
        self._ignored: list[IgnoredKey] = []
        self._refusals: dict[str, None] = {}
        self._warnings: list[str] = []

    def run(self) -> KeyMatch:
        for info in self._infos:
            self._place(info)
        if not self._infos and self._component:
            raise FormatUnknown(f"The metadata configure {self._component[:-1][:80]!r}, of which there is no tensor.")
        if not self._parts:
            raise FormatUnknown(
                f"None of the {len(self._infos)} tensors belongs to a LoRA adapter: {self._layout.sentence}",
                hint="A PEFT adapter holds keys such as base_model.model.<module>.lora_A.weight.",
            )
        self._check_mixture()
        modules = self._modules()
        for path, info in self._others:
            self._explain(path, info)
        self._refuse_others()
        self._warn_about_names(modules)
        ignored = {entry.key for entry in self._ignored}
        return KeyMatch(
            modules,
            tuple(self._ignored),
            tuple(info.name for info in self._infos if info.name not in ignored),
            tuple(self._warnings),
            tuple(self._refusals),
        )

    def _place(self, info: TensorInfo) -> None:
        path, depth = self._clean(info.name)
        found = _FACTOR.fullmatch(path)
        if found is None:
            self._others.append((path, info))
            return
        self._prefixes.add(depth)
        role = found["role"] + (".bias" if found["leaf"] == "bias" else "")
        self._adapters.add(found["adapter"] or "")
        parts = self._parts.setdefault(found["path"], _Parts())
        if role in parts.tensors:
            raise FileBroken(
                f"{info.name!r} and {parts.tensors[role].name!r} are both {role} of {found['path']!r}.",
                hint="Upload each adapter as a file of its own.",
            )
        parts.tensors[role] = info

    def _clean(self, key: str) -> tuple[str, int]:
        """The key without component, PEFT's prefix and what wrappers left in it; how often the prefix was there."""
        components = key[len(self._component) :].split(".")
        if components[0] in WRAPPERS or any(part in WRAPPERS for part in components[1:] if part.startswith("_")):
            kept = [part for at, part in enumerate(components) if not _is_wrapper(at, part)]
            self._wrappers.update(part for at, part in enumerate(components) if _is_wrapper(at, part))
            components = kept
        path = ".".join(components)
        head, inside, rest = path.partition(f".{PREFIX}")
        if inside and not path.startswith(PREFIX):
            self._heads.add(head)
            path = PREFIX + rest
        depth = 0
        while path.startswith(PREFIX):
            path = path[len(PREFIX) :]
            depth += 1
        return path, depth

    def _check_mixture(self) -> None:
        for path, info in self._others:
            if path.endswith((".alpha", ".dora_scale")):
                raise FormatUnknown(
                    f"{info.name!r} belongs to another layout than PEFT's, whose scaling is in its configuration.",
                    hint="Save the adapter with PEFT's save_pretrained.",
                )
        if self._layout.name == "mixed":
            raise FormatUnknown(
                f"The file mixes two layouts: {self._layout.description}.",
                hint="Which of them counts is ambiguous; save the adapter again in one layout.",
            )

    def _modules(self) -> tuple[LoraModule, ...]:
        faults: list[FieldError] = []
        modules: list[LoraModule] = []
        for path, parts in sorted(self._parts.items()):
            try:
                modules.append(self._module(path, parts.tensors))
            except FileBroken as error:
                faults.append(FieldError(path, error.detail))
        if faults:
            raise FileBroken(
                f"{len(faults)} of {len(self._parts)} modules do not fit: {faults[0].message}",
                hint="Compare the file with its adapter_config.json: is it the one that was saved with it?",
                errors=faults[:MAX_FINDINGS],
            )
        return tuple(modules)

    def _module(self, path: str, tensors: dict[str, TensorInfo]) -> LoraModule:
        embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
        if embedding and ("lora_A" in tensors or "lora_B" in tensors):
            raise FileBroken(f"{path}: both linear and embedding factors.")
        a_role, b_role = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for role in (a_role, b_role):
            if role not in tensors:
                raise FileBroken(f"{path}: {role} is missing.")
        a, b = tensors[a_role], tensors[b_role]
        module = pair(path, a, b, embedding=embedding)
        expected = self._config.rank_for(path)
        if module.rank != expected:
            raise FileBroken(f"{path}: the tensors have rank {module.rank}, adapter_config.json says {expected}.")
        if module.grouped:
            self._counted["a grouped convolution, whose ΔW is block-diagonal"].append(path)
        if path.endswith(".base_layer"):
            self._counted["a parameter inside an adapted module (target_parameters)"].append(path)
        alpha = self._config.alpha_for(path)
        bias, magnitude = tensors.get("lora_B.bias"), tensors.get("lora_magnitude_vector")
        self._check_vectors(path, module, bias, magnitude)
        for role in ("lora_A.bias", "lora_embedding_A.bias", "lora_embedding_B.bias", "lora_magnitude_vector.bias"):
            if role in tensors:
                raise FileBroken(f"{path}: {tensors[role].name!r} has no meaning in a LoRA adapter.")
        return replace(
            module,
            path=self._component + path,
            alpha=alpha,
            scaling=self._config.scaling_for(path, module.rank),
            bias_key=bias.name if bias else None,
            magnitude_key=magnitude.name if magnitude else None,
        )

    def _check_vectors(
        self, path: str, module: LoraModule, bias: TensorInfo | None, magnitude: TensorInfo | None
    ) -> None:
        if bias is not None and bias.shape != (module.d_out,):
            raise FileBroken(f"{path}: lora_B.bias has shape {bias.shape}, {(module.d_out,)} is needed.")
        if bias is not None and not self._config.lora_bias:
            raise FileBroken(f"{path}: lora_B has a bias, but lora_bias is not set in adapter_config.json.")
        if self._config.lora_bias and bias is None and module.kind != "embedding":
            raise FileBroken(f"{path}: lora_bias is set, but lora_B.bias is missing.")
        if magnitude is not None and not self._config.use_dora:
            raise FileBroken(f"{path}: a DoRA magnitude vector, but use_dora is not set in adapter_config.json.")
        if self._config.use_dora and magnitude is None:
            raise FileBroken(f"{path}: use_dora is set, but lora_magnitude_vector is missing.")

    def _explain(self, path: str, info: TensorInfo) -> None:
        """Say why a tensor that is no factor is not used, and whether that keeps the adapter from being merged."""
        module, _, leaf = path.rpartition(".")
        if module.endswith(".base_layer") and not (leaf == "bias" and self._config.bias != "none"):
            reason = self._explain_base_layer(module.removesuffix(".base_layer"), leaf, info)
        elif path.endswith("original_module") or ".original_module." in path:
            reason = "copy of a base weight; not part of ΔW"
        elif "trainable_tokens_delta" in path:
            reason = "rows of the embedding that were trained (trainable_token_indices); kept in the stored file"
            self._refusals["trained embedding rows are stored besides the factors"] = None
        elif ".modules_to_save." in path or self._config.saved_names.inside(module):
            reason = "full copy of a trained module (modules_to_save); kept in the stored file"
            self._counted["stored as a full copy (modules_to_save)"].append(module)
        elif leaf == "bias" and self._config.bias != "none":
            reason = f"trained bias of the base (bias={self._config.bias!r}); kept in the stored file"
        elif path.startswith("v_head.") and not self._stands_beside(path):
            reason = "value head of TRL, which is no part of the model that is adapted; PEFT does not load it"
            self._warnings.append(f"{info.name} is of TRL's value head, which PEFT does not load, and is ignored.")
        elif self._replaces_base(path, info):
            # PEFT hands them to load_state_dict as they are
            reason = "full weight, saved for instance after the vocabulary was resized; kept in the stored file"
            if leaf not in ("weight", "bias"):
                reason = "parameter of the base of no adapted module, which PEFT loads; kept in the stored file"
            self._counted[_REPLACES].append(path)
        else:
            reason = "not part of a LoRA adapter; PEFT does not load it"
            self._warnings.append(f"{info.name} is not part of a LoRA adapter and is ignored.")
            if self._stands_beside(path):
                self._beside.append(info.name)
        self._ignored.append(IgnoredKey(info.name, reason))

    def _explain_base_layer(self, adapted: str, leaf: str, info: TensorInfo) -> str:
        """Of a weight that stands where PEFT keeps a layer that it adapts, which it is loaded into if there is one."""
        parts = self._parts.get(adapted)
        if parts is None or leaf not in ("weight", "bias") or not self._has_prefix(info):
            self._warnings.append(f"{info.name} is a weight of the base that PEFT does not load, and is ignored.")
            return "weight of the base where no adapted layer is; PEFT does not load it"
        if "lora_embedding_A" not in parts.tensors and adapted.rpartition(".")[2] not in _SAVED_ALONG:
            self._counted[_REPLACES].append(f"{adapted}.base_layer.{leaf}")
            return "full weight of an adapted layer, which PEFT loads into the base; kept in the stored file"
        self._warnings.append(
            f"{info.name} is a copy of a base weight of shape {info.shape}. Where the vocabulary was resized, "
            "the base must be resized in the same way to use this adapter."
        )
        return "copy of a base weight that PEFT saved along with an adapted embedding; not part of ΔW"

    def _has_prefix(self, info: TensorInfo) -> bool:
        return PREFIX in info.name or self._prefixes == {0}

    def _replaces_base(self, path: str, info: TensorInfo) -> bool:
        """Whether PEFT would load it into the base model: it has the factors' prefix and is of no adapted module."""
        module, _, leaf = path.rpartition(".")
        if leaf not in ("weight", "bias") and (
            info.dtype not in FLOATS or leaf in BUFFERS or self._stands_beside(path)
        ):
            return False
        return self._has_prefix(info) and module not in self._parts and ".lora_" not in f".{path}"

    def _stands_beside(self, path: str) -> bool:
        """Whether it is below an adapted module, or has the name of another adapter's tensor: B·A is then not all."""
        part = part_of(path)
        above = path
        while "." in above:
            above = above.rpartition(".")[0]
            if above in self._parts:
                return True
        return part is not None and part.role not in WEAK

    def _refuse_others(self) -> None:
        if self._beside:
            count, first = len(self._beside), self._beside[0]
            self._refusals[f"{count} tensors stand beside factors and are not understood: {first!r}"] = None
        for what, names in self._counted.items():
            more = f" (and {others} more)" if (others := len(set(names)) - 1) else ""
            self._refusals[f"{names[0]} is {what}{more}"] = None

    def _warn_about_names(self, modules: Iterable[LoraModule]) -> None:
        for wrapper in sorted(self._wrappers):
            self._warnings.append(
                f"The keys carry {wrapper!r}, left by {WRAPPERS[wrapper]}; it was removed from the module paths. "
                "Stock PEFT would load nothing from these keys."
            )
        for head in sorted(self._heads):
            self._warnings.append(
                f"The keys carry {head[:80]!r} before PEFT's prefix; it was removed. "
                "Stock PEFT would load nothing from these keys."
            )
        if not self._component and 0 in self._prefixes:
            self._warnings.append(f"Keys lack the prefix {PREFIX!r}; stock PEFT would load nothing from them.")
        if max(self._prefixes) > 1:
            self._warnings.append(f"Keys repeat the prefix {PREFIX!r}; stock PEFT would load nothing from them.")
        names = self._adapters - {""}
        if len(names) > 1 or ("" in self._adapters and names - {"default"}):
            listed = ", ".join(sorted(name or "one without a name" for name in self._adapters)[:MAX_FINDINGS])
            raise FileBroken(
                f"The file holds several adapters: {listed}.", hint="Upload each adapter as a file of its own."
            )
        if names:
            self._warnings.append(f"The keys carry the adapter name {names.pop()!r}; it was removed.")
        paths = tuple(module.path.removeprefix(self._component) for module in modules)
        missing = missing_modules(paths) if self._config.evenly_targeted else ()
        if missing:
            self._warnings.append(
                f"{len(missing)} modules that nearly all layers have are missing, for instance {missing[0]!r}. "
                "Is the file whole?"
            )
        ends = {path.rpartition(".")[2] for path in paths}
        unmet = [name for name in self._config.target_modules if name not in ends]
        if unmet and self._config.evenly_targeted:
            listed = ", ".join(name[:80] for name in unmet[:MAX_FINDINGS])
            self._warnings.append(f"The file has no module of these names in target_modules: {listed}.")
        for key in self._config.unmatched_patterns(paths):
            self._warnings.append(f"The pattern {key[:80]!r} of rank_pattern or alpha_pattern matches no module.")
        unselected = [path for path in paths if not self._config.selection.selects(path)]
        if unselected:
            more = ", …" if len(unselected) > MAX_FINDINGS else ""
            listed = ", ".join(map(repr, unselected[:MAX_FINDINGS])) + more
            self._warnings.insert(
                0,
                f"{len(unselected)} {UNSELECTED} and its exceptions; stock PEFT would not load them, a merge takes "
                f"them: {listed}.",
            )


def _is_wrapper(position: int, part: str) -> bool:
    # "module" is a common name of submodules: only as the first component does it come from a wrapper.
    return part in WRAPPERS and (part.startswith("_") or position == 0)


def pair(path: str, a: TensorInfo, b: TensorInfo, *, embedding: bool) -> LoraModule:
    for info in (a, b):
        if info.dtype not in FLOATS:
            raise FileBroken(f"{path}: {info.name!r} has dtype {info.dtype}; factors are floating-point numbers.")
        if len(info.shape) not in ((2,) if embedding else (2, 3, 4, 5)) or 0 in info.shape:
            raise FileBroken(f"{path}: {info.name!r} has shape {info.shape}, which is no factor of a low-rank pair.")
    if len(a.shape) != len(b.shape):
        raise FileBroken(f"{path}: lora_A has shape {a.shape} and lora_B {b.shape}.")
    kind: ModuleKind = "embedding" if embedding else "linear" if len(a.shape) == 2 else "conv"
    rank = a.shape[0]
    grouped = kind == "conv" and rank % b.shape[1] == 0
    if (b.shape[1] != rank and not grouped) or any(size != 1 for size in b.shape[2:]):
        raise FileBroken(f"{path}: lora_A of shape {a.shape} and lora_B of shape {b.shape} are no pair of one rank.")
    return LoraModule(
        path=path,
        kind=kind,
        a_key=a.name,
        b_key=b.name,
        rank=rank,
        alpha=0.0,
        scaling=0.0,
        d_in=math.prod(a.shape[1:]),
        d_out=b.shape[0],
        a_shape=a.shape,
        b_shape=b.shape,
        dtype=a.dtype,
    )
