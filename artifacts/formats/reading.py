"""A file without PEFT's configuration, understood from its header: every key is used, kept or ignored with a reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from artifacts.errors import FieldError, FileBroken, FormatUnknown
from artifacts.formats.besides import besides, is_adapted
from artifacts.formats.modules import WHY_NO_LORA, is_lora, lora_modules, sides_of, typed_module
from artifacts.formats.protocol import NOTHING_TOLD, ConfiguredReader, Settings
from artifacts.formats.resolution import Resolution, Resolved, Stem, resolve
from artifacts.formats.roles import ALPHA, MAGNITUDE, WEAK, part_of
from artifacts.formats.table import READERS
from artifacts.formats.values import Values
from artifacts.manifest import IgnoredKey, KeyVerdict, LoraModule, TypedModule
from artifacts.peft_config import PeftLoraConfig
from artifacts.peft_keys import MAX_FINDINGS, PREFIX, WRAPPERS
from artifacts.refusals import OfType, OfVectors
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo

_BUNDLED = ("bundle_emb.", "emb_params", "clip_l", "clip_g", "string_to_param")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file says.

    Attributes:
        format: the readers that know its keys, the one with most keys first.
        modules, typed: low-rank pairs by path, and modules of other types.
        verdicts: one for each key of the file.
        refusals: why the adapter can not be merged; empty when it can.
        partial: whether tensors of an adapter were left out.
        misfits: modules with other sides than the model has, in words.
        stems: distinct names of modules in the file.
    """

    format: str
    architecture: str | None
    modules: tuple[LoraModule, ...]
    typed: tuple[TypedModule, ...]
    verdicts: tuple[KeyVerdict, ...]
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]
    partial: bool
    stems: int
    misfits: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(verdict.key for verdict in self.verdicts if verdict.use != "ignored")

    @property
    def ignored(self) -> tuple[IgnoredKey, ...]:
        return tuple(IgnoredKey(item.key, item.note) for item in self.verdicts if item.use == "ignored")

    @property
    def method(self) -> str:
        """What kind of adapter it is."""
        kinds = Counter(module.type for module in self.typed)
        if self.modules and not kinds:
            return "dora" if any(module.magnitude_key for module in self.modules) else "lora"
        if self.modules:
            return "lycoris"
        return kinds.most_common(1)[0][0]


def read_keys(
    header: SafetensorsHeader,
    values: Values,
    *,
    configs: Mapping[str, PeftLoraConfig] | None = None,
    told: Settings = NOTHING_TOLD,
) -> Reading:
    """Understand a file from its header, and from the few numbers that `values` gives.

    Args:
        configs: component ("unet" …, "" for all) → configuration, for pairs that have no alpha beside them.
        told: what a file beside the weights tells, of pairs that have no alpha beside them either.

    Raises:
        FormatUnknown: no key belongs to an adapter, or no name of a module can be told.
        FileBroken: a half of a pair is missing, shapes do not fit, two tensors mean one thing.
    """
    return _Reader(header, values, configs or {}, told).run()


class _Reader:
    def __init__(
        self, header: SafetensorsHeader, values: Values, configs: Mapping[str, PeftLoraConfig], told: Settings
    ) -> None:
        self._told = told
        self._header = header
        self._values = values
        self._configs = configs
        self._stems: dict[str, Stem] = {}
        self._unplaced: dict[str, str] = {}
        self._wrappers: set[str] = set()
        self._prefixed = False
        self._warnings: list[str] = []
        self._refusals: dict[str, None] = {}

    def run(self) -> Reading:
        for info in self._header.tensors.values():
            self._place(info)
        strong = any(stem.parts.keys() - WEAK for stem in self._stems.values())
        members = [stem for stem in self._stems.values() if is_adapted(stem)]
        if not strong or not members:
            raise FormatUnknown("No key of the file belongs to an adapter.")
        for stem in members:
            stem.d_out, stem.d_in = sides_of(stem.parts)
        resolution = resolve(members, self._header.metadata)
        if not resolution.found:
            name, reason = next(iter(resolution.unknown.items()))
            raise FormatUnknown(
                f"None of the {len(members)} names of modules can be told: {name!r}: {reason}.",
                hint="Flattened names are only understood where the list of the model's modules is stored here.",
            )
        self._check_told(members, resolution)
        self._check_one_adapter(members)
        modules, typed = self._modules(members, resolution)
        self._describe(modules, typed, resolution)
        verdicts = self._verdicts(modules, typed, resolution)
        return Reading(
            self._format(members),
            resolution.architecture,
            tuple(sorted(modules, key=lambda module: module.path)),
            tuple(sorted(typed, key=lambda module: module.path)),
            verdicts,
            tuple(self._warnings),
            tuple(self._refusals),
            bool(resolution.unknown),
            len(members),
            tuple(f"{name}: {reason}" for name, reason in resolution.misfits.items()),
        )

    def _place(self, info: TensorInfo) -> None:
        part = part_of(info.name)
        if part is None:
            self._unplaced[info.name] = ""
            return
        name = self._clean(part.stem)
        stem = self._stems.get(name)
        if stem is None:
            for reader in READERS:
                place = reader.place(name, part.role)
                if place is not None and place.name:
                    stem = self._stems[name] = Stem(name, reader, place)
                    break
            else:
                self._unplaced[info.name] = ""
                return
        if part.role in stem.parts:
            raise FileBroken(
                f"{info.name!r} and {stem.parts[part.role].name!r} are both {part.role} of {name!r}.",
                hint="Upload each adapter as a file of its own.",
            )
        stem.parts[part.role] = info
        stem.adapter = stem.adapter or part.adapter

    def _clean(self, stem: str) -> str:
        """The name without PEFT's prefix and without what training wrappers left in it."""
        parts = stem.split(".")
        if parts[0] in WRAPPERS or any(part in WRAPPERS and part[0] == "_" for part in parts):
            found = [part for at, part in enumerate(parts) if part in WRAPPERS and (part[0] == "_" or at == 0)]
            self._wrappers.update(found)
            parts = [part for at, part in enumerate(parts) if not (part in WRAPPERS and (part[0] == "_" or at == 0))]
            stem = ".".join(parts)
        while stem.startswith(PREFIX):
            stem = stem[len(PREFIX) :]
            self._prefixed = True
        return stem

    def _modules(self, members: Iterable[Stem], resolution: Resolution) -> tuple[list[LoraModule], list[TypedModule]]:
        modules: list[LoraModule] = []
        typed: list[TypedModule] = []
        faults: list[FieldError] = []
        owners: dict[str, Stem] = {}
        redundant = self._redundant(members, resolution)
        for stem in members:
            resolved = resolution.found.get(stem.name)
            if resolved is None or stem.name in redundant:
                continue
            try:
                if is_lora(stem.parts):
                    found = lora_modules(
                        stem.name, stem.parts, resolved, self._values, told=self._told_of(resolved, stem)
                    )
                    for module in found:
                        self._claim(module.path, stem, owners)
                    modules += found
                else:
                    typed.append(typed_module(stem.name, stem.parts, resolved, self._values))
                    for path in resolved.paths:
                        self._claim(f"{path} {typed[-1].type}", stem, owners)
            except FileBroken as error:
                faults.append(FieldError(stem.name, error.detail))
        self._check_sides(resolution, faults)
        if faults:
            raise FileBroken(
                f"{len(faults)} of {len(self._stems)} modules do not fit: {faults[0].message}",
                errors=faults[:MAX_FINDINGS],
            )
        return modules, typed

    def _told_of(self, resolved: Resolved, stem: Stem) -> Settings:
        told = self._told if stem.place.interleaved else self._told._replace(head_rows=0)
        component, _, inside = resolved.paths[0].partition(".")
        config = self._configs.get(component) or self._configs.get("")
        if ALPHA in stem.parts or (config is None and not self._configs):
            return told
        if config is None:
            self._refusals[f"the configuration in the metadata tells no scaling of {component}"] = None
            return told
        rank = config.rank_for(inside)
        return told._replace(rank=rank, scaling=config.scaling_for(inside, rank))

    def _check_told(self, members: Iterable[Stem], resolution: Resolution) -> None:
        """Raises FormatUnknown: a scaling would have to be guessed, or one format's be used for another's modules."""
        readers = {stem.reader for stem in members if stem.name in resolution.found}
        needing = [reader for reader in readers if isinstance(reader, ConfiguredReader)]
        if needing and (len(readers) > 1 or self._told == NOTHING_TOLD):
            raise FormatUnknown(
                f"Some names are those of {needing[0].description}, whose scaling stands in a file beside it; "
                "others, or their prefix, are not.",
                hint="Save the adapter again in one layout.",
            )

    @staticmethod
    def _check_one_adapter(members: Iterable[Stem]) -> None:
        names = sorted({stem.adapter for stem in members if stem.adapter})
        if len(names) > 1:
            raise FileBroken(
                f"The file holds several adapters: {', '.join(names[:MAX_FINDINGS])}.",
                hint="Upload each adapter as a file of its own.",
            )

    def _redundant(self, members: Iterable[Stem], resolution: Resolution) -> set[str]:
        """Fused projections that stand beside the same projections one by one: some trainers write both."""
        single: dict[str, str] = {}
        for stem in members:
            resolved = resolution.found.get(stem.name)
            if resolved is not None and len(resolved.paths) == 1:
                single[resolved.paths[0]] = stem.reader.name
        found = set()
        for stem in members:
            resolved = resolution.found.get(stem.name)
            if resolved is None or len(resolved.paths) == 1:
                continue
            if all(single.get(path) == stem.reader.name for path in resolved.paths):
                found.add(stem.name)
                for info in stem.parts.values():
                    self._unplaced[info.name] = "the same projections stand in the file one by one"
        return found

    def _claim(self, path: str, stem: Stem, owners: dict[str, Stem]) -> None:
        other = owners.setdefault(path, stem)
        if other is not stem:
            readers = sorted({other.reader.description, stem.reader.description})
            raise FormatUnknown(
                f"The file mixes two layouts: {' and '.join(readers)} in one file; {other.name!r} and {stem.name!r} "
                f"are both {path.partition(' ')[0]!r}.",
                hint="Which of them counts is ambiguous; save the adapter again in one layout.",
            )

    def _check_sides(self, resolution: Resolution, faults: list[FieldError]) -> None:
        """Sides that contradict the model: of most modules, then it is not the model's file; of a few, then they are
        what the uploader must know (a control adapter widens the first layer)."""
        wrong = resolution.misfits
        if len(wrong) * 2 > len(resolution.found):
            faults += [FieldError(name, f"{name}: {reason}.") for name, reason in wrong.items()]
            return
        for name, reason in list(wrong.items())[:MAX_FINDINGS]:
            self._refusals[f"{name}: {reason}"] = None

    def _describe(self, modules: list[LoraModule], typed: list[TypedModule], resolution: Resolution) -> None:
        self._warnings += resolution.warnings
        if resolution.unknown:
            name, reason = next(iter(resolution.unknown.items()))
            self._refusals[f"{len(resolution.unknown)} modules can not be told, for instance {name!r}: {reason}"] = None
            self._warnings.append(f"{len(resolution.unknown)} modules are ignored, for instance {name!r}: {reason}.")
        counts = Counter(module.type for module in typed)
        for kind, count in counts.items():
            why = WHY_NO_LORA[kind.removesuffix("-dora")]
            self._refusals[OfType(f"{count} modules are of type {kind}: {why}")] = None
        if any(module.magnitude_key for module in modules):
            self._refusals[OfType(f"it is a DoRA: {WHY_NO_LORA['dora']}")] = None
        self._refuse_besides(modules, resolution)
        biased = [stem for stem in self._stems.values() if is_lora(stem.parts) and self._has_odd_bias(stem, resolution)]
        if biased:
            reason = f"{len(biased)} modules have biases that no LoRA has, for instance {biased[0].name!r}"
            self._refusals[OfVectors(reason)] = None
        with_alpha = sum(ALPHA in stem.parts for stem in self._stems.values() if is_lora(stem.parts))
        pairs = sum(is_lora(stem.parts) for stem in self._stems.values())
        told = self._configs or self._told != NOTHING_TOLD
        if pairs and not with_alpha and not told:
            self._warnings.append("The file tells no alpha: the scaling of every module is 1, as diffusers takes it.")
        elif with_alpha and with_alpha < pairs and not told:
            self._warnings.append(f"{pairs - with_alpha} of {pairs} modules have no alpha: their scaling is 1.")
        for wrapper in sorted(self._wrappers):
            self._warnings.append(f"The keys carry {wrapper!r}, left by {WRAPPERS[wrapper]}; it was removed.")
        if self._prefixed:
            self._warnings.append(f"The prefix {PREFIX!r} was removed from the keys of a file without configuration.")
        dead = sum(module.scaling == 0 for module in modules)
        if dead:
            self._warnings.append(f"alpha is 0 in {dead} modules: they change nothing.")

    def _refuse_besides(self, modules: list[LoraModule], resolution: Resolution) -> None:
        unplaced = [
            self._header.tensors[key] for key, reason in self._unplaced.items() if not reason and not _is_bundled(key)
        ]
        reasons, warnings = besides(self._stems.values(), resolution.found, unplaced, self._clean)
        self._refusals |= dict.fromkeys(reasons)
        self._warnings += warnings
        grouped = [module.path for module in modules if module.grouped]
        if grouped:
            self._refusals[f"{grouped[0]} is a grouped convolution, whose ΔW is block-diagonal"] = None

    def _has_odd_bias(self, stem: Stem, resolution: Resolution) -> bool:
        """PEFT scales a bias of lora_B as it scales B·A; `diff_b` is not scaled; a fused one would have to be split."""
        resolved = resolution.found.get(stem.name)
        if resolved is None or not stem.parts.keys() & {"diff_b", "lora_B.bias", "lora_A.bias", "b_norm", "w_norm"}:
            return False
        plain = len(resolved.paths) == 1 and "lora_B.bias" in stem.parts and not resolved.swap
        return not plain or bool(stem.parts.keys() & {"lora_A.bias", "diff_b"})

    def _verdicts(
        self, modules: list[LoraModule], typed: list[TypedModule], resolution: Resolution
    ) -> tuple[KeyVerdict, ...]:
        paths: dict[str, list[str]] = defaultdict(list)
        for module in modules:
            for key in dict.fromkeys((*module.factor_keys, module.magnitude_key, module.bias_key)):
                if key is not None:
                    paths[key].append(module.path)
        roles = {info.name: (role, stem) for stem in self._stems.values() for role, info in stem.parts.items()}
        found = []
        for key in self._header.tensors:
            role, stem = roles.get(key, ("", None))
            if stem is None or key in self._unplaced:
                found.append(KeyVerdict(key, "ignored", role, (), self._unplaced.get(key) or _no_part(key)))
                continue
            resolved = resolution.found.get(stem.name)
            found.append(_verdict(key, role, stem, resolved, resolution.unknown.get(stem.name), paths.get(key)))
        return tuple(found)

    @staticmethod
    def _format(members: Iterable[Stem]) -> str:
        counts = Counter(stem.reader.name for stem in members)
        return "+".join(name for name, _ in counts.most_common(2))


def _verdict(
    key: str, role: str, stem: Stem, resolved: Resolved | None, unknown: str | None, paths: list[str] | None
) -> KeyVerdict:
    if resolved is None:
        if stem.parts.keys() <= {ALPHA}:
            return KeyVerdict(key, "ignored", role, (), "an alpha without factors")
        return KeyVerdict(key, "ignored", role, (), unknown or _no_part(key))
    if is_lora(stem.parts):
        if paths is None and role in ("lora_A.bias", "diff_b", "lora_B.bias"):
            return KeyVerdict(key, "kept", role, resolved.paths, "a bias that no LoRA has")
        if paths is None and role != ALPHA:
            return KeyVerdict(key, "kept", role, resolved.paths, "no part of a low-rank pair")
        use = "kept" if role == MAGNITUDE else "used"
        return KeyVerdict(key, use, role, tuple(paths or resolved.paths), resolved.note)  # type: ignore[arg-type]
    return KeyVerdict(key, "kept", role, resolved.paths, resolved.note)


def _is_bundled(key: str) -> bool:
    return key.startswith(_BUNDLED) and part_of(key) is None


def _no_part(key: str) -> str:
    if _is_bundled(key):
        return "an embedding that textual inversion learned; no part of ΔW"
    return "not part of an adapter"
