"""Which base model an adapter belongs to, and how surely two references mean the same one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from artifacts.content import combine_digests, file_sha256, tensor_digests
from artifacts.errors import FileBroken, FormatUnknown, ShapeMismatch
from artifacts.manifest import LoraModule
from artifacts.public_names import is_path
from artifacts.quantised_base import packed_layers, quantisation_of
from artifacts.safetensors_header import BASE_DTYPE_BYTES, MAX_BASE_HEADER_BYTES, TensorInfo, read_header

Level = Literal["weights", "revision", "architecture", "shape"]
STRENGTH: Mapping[Level, int] = {"weights": 3, "revision": 2, "architecture": 1, "shape": 0}
"""How much a level proves: a larger one more."""
Source = Literal["hub", "path", "files", "named"]
Fingerprint = tuple[tuple[str, int, int], ...]

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""The files that define a vocabulary. tokenizer_config.json is not among them: templates and versions change there."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
UNET = "UNet2DConditionModel"
"""The architecture of the pipelines that are served here."""
PIPELINE_INDEX = "model_index.json"
"""The file that makes a folder a diffusers pipeline."""
_WEIGHTS = ("model", "diffusion_pytorch_model")  # as save_pretrained of transformers and of diffusers calls them
_MAX_JSON_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class BaseModelRef:
    """A base model, as far as it is known.

    Attributes:
        name: repository id of a hub, or whatever the source calls it.
        source: "hub", "path" (a folder on the server), "files" (kept here), or "named" (only a name is known).
        location: repository id or path.
        revision: commit of the repository.
        architecture: class name, such as "LlamaForCausalLM"; of a diffusers pipeline its UNet's.
        pipeline: class name of a diffusers pipeline, such as "StableDiffusionXLPipeline"; None for any other model.
        weights_digest, tokenizer_digest: SHA-256 (hex) of contents.
        fingerprint: sorted (module path, d_out, d_in) of all weights with two dimensions or more; kernels of
            convolutions are flattened, and weights stored as (in, out) are turned round; weights that are packed
            (`artifacts.quantised_base`) have the sides that they unpack to.
        quantisation: the field quantization_config of the configuration; None if the weights are not quantised.
    """

    name: str
    source: Source
    location: str
    revision: str | None = None
    architecture: str | None = None
    pipeline: str | None = None
    weights_digest: str | None = None
    tokenizer_digest: str | None = None
    fingerprint: Fingerprint | None = None
    quantisation: Mapping[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def named(cls, name: str, revision: str | None = None) -> BaseModelRef:
        """A reference of which only the words of an adapter_config.json are known."""
        return cls(name=name, source="named", location=name, revision=revision)

    @cached_property
    def fingerprint_digest(self) -> str | None:
        """SHA-256 of the fingerprint, which is long."""
        if self.fingerprint is None:
            return None
        text = json.dumps(sorted(self.fingerprint), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The strongest level that is proven for two references ("shape" proves nothing and leaves it to the shapes),
    and a sentence when they are known to be different models."""

    level: Level
    contradiction: str | None = None

    def reaches(self, minimum: Level | None) -> bool:
        """Whether as much is proven as is asked for; None asks for nothing."""
        return minimum is None or STRENGTH[self.level] >= STRENGTH[minimum]


def compare(first: BaseModelRef, second: BaseModelRef) -> Comparison:
    """How surely two references mean the same base model: equal weights, then equal repository and commit, then equal
    fingerprint and tokenizer, else nothing. Better evidence overrules names."""
    contradiction = None
    if first.weights_digest and second.weights_digest:
        if first.weights_digest == second.weights_digest:
            return Comparison("weights")
        contradiction = (
            f"the weights of {first.name!r} (SHA-256 {first.weights_digest[:12]}…) and {second.name!r} "
            f"(SHA-256 {second.weights_digest[:12]}…) differ"
        )
    names_differ = _names_differ(first.name, second.name)
    commits = [_commit(first), _commit(second)]
    if all(commits) and _is_hub_name(first.name) and not names_differ and not contradiction:
        if commits[0] == commits[1]:
            return Comparison("revision")
        contradiction = f"{first.name!r} at commits {commits[0]} and {commits[1]}"
    if (first.quantisation is None) != (second.quantisation is None) and contradiction:
        return Comparison("shape", contradiction)
    fingerprints = [first.fingerprint_digest, second.fingerprint_digest]
    if all(fingerprints) and fingerprints[0] != fingerprints[1] and not contradiction:
        contradiction = f"{first.name!r} and {second.name!r} have other modules or other dimensions"
    tokenizers = [first.tokenizer_digest, second.tokenizer_digest]
    if all(fingerprints) and fingerprints[0] == fingerprints[1] and all(tokenizers) and tokenizers[0] == tokenizers[1]:
        return Comparison("architecture", contradiction)
    if names_differ and not contradiction:
        contradiction = f"the adapters name different base models: {first.name!r} and {second.name!r}"
    return Comparison("shape", contradiction)


def sides_of(fingerprint: Fingerprint) -> Callable[[str], tuple[int, int] | None]:
    """Module path → (d_out, d_in), or None where there is no such module.

    A first component of the path that only one side has ("transformer.h.0…" and "h.0…") makes no difference: model
    classes with a head carry it, checkpoints of the bare model do not.
    """
    exact = {path: (d_out, d_in) for path, d_out, d_in in fingerprint}
    shortened = {path.partition(".")[2]: sizes for path, sizes in exact.items()}
    return lambda path: exact.get(path) or exact.get(path.partition(".")[2]) or shortened.get(path)


def check_modules(fingerprint: Fingerprint, modules: Sequence[LoraModule]) -> list[str]:
    """What does not fit: one description per adapted module that the base lacks or has in other dimensions."""
    sides = sides_of(fingerprint)
    offenders = []
    for module in modules:
        found = sides(module.path)
        # the weight of an embedding is (vocabulary, dim): the transpose of its ΔW = scaling·B·A
        needed = (module.d_in, module.d_out) if module.kind == "embedding" else (module.d_out, module.d_in)
        if found is None:
            offenders.append(f"{module.path}: the base model has no such module")
        elif module.block_key is not None:
            try:
                module.with_sides(*found)
            except ShapeMismatch as error:
                offenders.append(error.detail.rstrip("."))
        elif found != needed:
            offenders.append(
                f"{module.path}: the adapter needs a weight of {needed[0]}×{needed[1]}, the base model has "
                f"{found[0]}×{found[1]}"
            )
    return offenders


def inspect_base(path: Path) -> BaseModelRef:
    """Describe a local transformers folder by its config.json, the headers and the bytes of its weights, and its
    tokenizer files; a diffusers pipeline by those of its UNet and its tokenizer. Every byte of the weights is read
    once, in buffers.

    Raises:
        FormatUnknown: no config.json or no safetensors weights; a pipeline without a UNet or without a class.
        FileBroken: a weights file or config.json is broken, or two files hold the same tensor.
    """
    pipeline = _pipeline_class(path) if (path / PIPELINE_INDEX).is_file() else None
    weights = path / "unet" if pipeline else path
    config = _read_config(weights / "config.json")
    files = weight_files(weights)
    entries: list[tuple[TensorInfo, str]] = []
    for file in files:
        header = read_header(file, dtypes=BASE_DTYPE_BYTES, max_header_bytes=MAX_BASE_HEADER_BYTES)
        entries.extend(tensor_digests(file, header))
    names = [info.name for info, _ in entries]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FileBroken(f"{path.name}: two weights files hold the tensor {twice!r}.")
    name, source, revision = _origin(path)
    if pipeline:
        config["architectures"] = [config.get("_class_name")]
        # Only linear layers get adapters: kernels of convolutions are no targets.
        entries_of_layers = [(info, digest) for info, digest in entries if len(info.shape) == 2]
    else:
        entries_of_layers = entries
    architectures = config.get("architectures")
    known = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    architecture = architectures[0] if known else config.get("model_type")  # type: ignore[index]
    return BaseModelRef(
        name=name,
        source=source,
        location=name if source == "hub" else str(path.resolve()),
        revision=revision,
        architecture=architecture if isinstance(architecture, str) else None,
        pipeline=pipeline,
        weights_digest=combine_digests(entries),
        tokenizer_digest=_tokenizer_digest(path / "tokenizer" if pipeline else path),
        fingerprint=_fingerprint((info for info, _ in entries_of_layers), config),
        quantisation=quantisation_of(config),
    )


def _commit(ref: BaseModelRef) -> str | None:
    return ref.revision if ref.revision and _COMMIT.fullmatch(ref.revision) else None


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None


def _names_differ(first: str, second: str) -> bool:
    """Whether two names certainly mean different models. A path says little: only its last part is compared, and only
    with another path's or a repository's last part being equal is it taken for the same."""
    if first.casefold() == second.casefold():
        return False
    if _is_hub_name(first) and _is_hub_name(second):
        return True
    if is_path(first) or is_path(second) or "unknown" in (first, second):
        return False
    return first.rsplit("/", 1)[-1].casefold() != second.rsplit("/", 1)[-1].casefold()


def _pipeline_class(path: Path) -> str:
    if not (path / "unet").is_dir():
        raise FormatUnknown(f"{path.name} is a diffusers pipeline without a folder unet.")
    found = _object(path / PIPELINE_INDEX).get("_class_name")
    if not isinstance(found, str) or not found:
        raise FormatUnknown(
            f"{PIPELINE_INDEX} of {path.name} does not name the class of its pipeline.",
            hint="Give the folder that save_pretrained of the pipeline wrote.",
        )
    return found


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatUnknown(f"{path.parent.name} has no config.json.", hint="Give the folder of a transformers model.")
    return _object(path)


def _object(path: Path) -> dict[str, Any]:
    document = _load(path)
    if not isinstance(document, dict):
        raise FileBroken(f"{path.name} is no JSON object.")
    return document


def _load(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise FileBroken(f"{path.name} has more than {_MAX_JSON_BYTES} bytes.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileBroken(f"{path.name} is not valid JSON: {error}.") from error


def weight_files(path: Path) -> list[Path]:
    """The files of a folder that hold the model's weights, sorted by name: those that the index names; else the one
    file that save_pretrained writes, whatever lies beside it (the same weights in another width, an adapter); else all
    *.safetensors.

    Raises:
        FormatUnknown: there are none.
        FileBroken: the index is broken, or names what is not in the folder.
    """
    index = _index(path)
    if index is None:
        usual = [path / f"{stem}.safetensors" for stem in _WEIGHTS]
        files = [file for file in usual if file.is_file()][:1]
        files = files or sorted(entry for entry in path.glob("*.safetensors") if entry.is_file())
        if not files:
            raise FormatUnknown(
                f"{path.name} has no *.safetensors weights.", hint="Save the model with safe_serialization=True."
            )
        return files
    files = [path / name for name in _names_in(index)]
    for file in files:
        if file.parent != path or not file.is_file():
            raise FileBroken(f"{index.name} names {file.name!r}, which is not in the folder.")
    return files


def indexed_weights(path: Path) -> list[str] | None:
    """The names that the index of a folder's weights gives, sorted; None: there is no index. They are hostile: whether
    they are files of the folder is for the caller to see. Raises FileBroken."""
    index = _index(path)
    return None if index is None else _names_in(index)


def _index(path: Path) -> Path | None:
    return next((found for stem in _WEIGHTS if (found := path / f"{stem}.safetensors.index.json").is_file()), None)


def _names_in(index: Path) -> list[str]:
    document = _load(index)
    mapping = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise FileBroken(f"{index.name} has no weight_map.")
    return sorted(set(mapping.values()))


def _fingerprint(infos: Iterable[TensorInfo], config: dict[str, Any]) -> Fingerprint:
    conv1d = config.get("model_type") in _CONV1D_MODELS
    found: dict[str, tuple[int, int]] = {}
    for info in infos:
        path, dot, leaf = info.name.rpartition(".")
        if not dot or leaf != "weight" or len(info.shape) < 2:
            continue
        d_out, d_in = info.shape[0], info.elements // max(info.shape[0], 1)
        turned = conv1d and path.rpartition(".")[2] in _CONV1D_MODULES
        found[path] = (d_in, d_out) if turned else (d_out, d_in)
    found |= packed_layers(quantisation_of(config))
    _add_tied_head(found, config)
    return tuple(sorted((path, d_out, d_in) for path, (d_out, d_in) in found.items()))


def _add_tied_head(found: dict[str, tuple[int, int]], config: dict[str, Any]) -> None:
    """A tied output layer is not stored, yet adapters can target it."""
    vocabulary = config.get("vocab_size")
    if config.get("tie_word_embeddings", True) is not True or any(path.endswith("lm_head") for path in found):
        return
    for path, sizes in list(found.items()):
        if path.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings") and sizes[0] == vocabulary:
            found["lm_head"] = sizes
            return


def _origin(path: Path) -> tuple[str, Source, str | None]:
    """(name, source, commit): a folder of the hub's own cache tells its repository and commit."""
    resolved = path.resolve()
    if resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name):
        found = _SNAPSHOT.fullmatch(resolved.parent.parent.name)
        if found is not None:
            return f"{found['owner']}/{found['name']}", "hub", resolved.name
    return resolved.name, "path", None


def _tokenizer_digest(path: Path) -> str | None:
    names = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    names += sorted(entry.name for entry in path.glob("*.tiktoken") if entry.is_file())
    if not names:
        return None
    lines = [f"{name}\0{file_sha256(path / name)}" for name in sorted(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
