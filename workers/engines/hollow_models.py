"""Base models without weights: the real classes, built from config.json, whose parameters hold one number.

They are built on the meta device. But the libraries move an adapter to the device of the layer that it is put on, and
the meta device would swallow its numbers. So every parameter becomes a view of one zero in main memory: it has its
shape, takes no memory, and what an adapter brings along stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.base_model import PIPELINE_INDEX
from artifacts.errors import FieldError, RequestInvalid
from artifacts.manifest import LoraModule
from train.base_files import BaseFiles

POINTER = "/base_model"
_HEADS: Mapping[str, tuple[str, str]] = {
    "SEQ_CLS": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
}
"""PEFT's task → how transformers ends the names of classes with that head, and what finds one for a configuration."""
_WITHOUT_HEAD = "FEATURE_EXTRACTION"
"""PEFT's task of embeddings: such an adapter is saved from, and loaded into, what `AutoModel` gives."""
_HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_LIBRARIES = ("diffusers", "transformers")


@dataclass(slots=True)
class HollowModel:
    """What an adapter is loaded into.

    Attributes:
        kind: "config": the class that config.json names. "skeleton": only layers that the adapter itself names.
        target: the model, or the pipeline.
        components: name ("" for a model that is no pipeline) → the module in it that may get an adapter.
        placeholders: the memory of the parameters that stand for the base's weights.
    """

    kind: str
    target: Any
    components: Mapping[str, nn.Module]
    placeholders: set[int] = field(default_factory=set)
    _zeros: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._zeros = [zero for module in self.components.values() for zero in _hollow_out(module)]
        self.placeholders = {zero.untyped_storage().data_ptr() for zero in self._zeros}


def model_of(base: BaseFiles, task: str | None, shapes: Mapping[str, Sequence[int]]) -> HollowModel:
    """The model of transformers that config.json describes.

    Args:
        task: PEFT's task_type; a classifier's head is put on a base that is stored without one, and an adapter of
            embeddings goes into the bare model.
        shapes: of the adapter's tensors, by key: a saved head tells the number of classes.

    Raises:
        RequestInvalid: the configuration can not be read, or no class of transformers is built from it.
    """
    import transformers

    config = base.config()
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    ending, auto = _HEADS.get(task or "", ("", ""))
    if task == _WITHOUT_HEAD:
        make: Any = transformers.AutoModel.from_config
    elif ending and not name.endswith(ending):
        classes = next((shape[0] for key, shape in shapes.items() if key.endswith(_HEAD_WEIGHTS)), None)
        if classes is not None:
            config.num_labels = classes
        found: Any = getattr(transformers, auto)
        make = found.from_config
    else:
        found = getattr(transformers, name, None)
        if not _is_a(found, transformers.PreTrainedModel):
            raise _unbuildable(base.name, f"config.json names {name[:100]!r}, which is no model of transformers")
        make = found._from_config
    try:
        with torch.device("meta"):
            # in float32, to which the numbers of every adapter are cast without loss
            model = make(config, dtype=torch.float32, attn_implementation="eager")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise _unbuildable(base.name, str(error)[:500]) from error
    return HollowModel("config", model, {"": model})


def pipeline_of(folder: Path, name: str) -> HollowModel:
    """The pipeline of diffusers that a folder describes, with those components that can get an adapter.

    Raises:
        RequestInvalid: it is incomplete, of no class of diffusers, or of one that takes no LoRA.
    """
    import diffusers

    index = _json(folder / PIPELINE_INDEX, name)
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not _is_a(kind, diffusers.DiffusionPipeline):
        raise _unbuildable(name, f"{str(index.get('_class_name'))[:100]!r} is no pipeline of diffusers")
    loadable = getattr(kind, "_lora_loadable_modules", None)
    if not loadable or not hasattr(kind, "load_lora_weights"):
        raise _unbuildable(name, f"{kind.__name__} of diffusers takes no LoRA")
    parts: dict[str, Any] = {key: None for key, value in index.items() if isinstance(value, list)}
    parts |= {key: value for key, value in index.items() if key == "requires_safety_checker"}
    components = {part: _component(folder / part, index[part], name) for part in loadable if _is_there(index.get(part))}
    try:
        pipeline = kind(**parts | components)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unbuildable(name, str(error)[:500]) from error
    return HollowModel("config", pipeline, components)


class Skeleton(nn.Module):
    """Layers at the places that an adapter names, and nothing else: no base model is known."""

    def prepare_inputs_for_generation(self) -> None:
        """PEFT keeps this method of language models; nobody calls it here."""


def skeleton_of(modules: Sequence[LoraModule], shapes: Mapping[str, Sequence[int]]) -> HollowModel:
    """Layers of the sizes that the adapter's factors have.

    Args:
        shapes: of all its tensors, by key: layers that were saved whole are put there too.
    """
    root = Skeleton()
    biases = {key.removeprefix("base_model.model.").removesuffix(".bias") for key in shapes if key.endswith(".bias")}
    with torch.device("meta"):
        for module in modules:
            _put(root, module.path, _layer(module, bias=module.path in biases))
        known = {key for module in modules for key in (*module.factor_keys, module.bias_key, module.magnitude_key)}
        for key, shape in shapes.items():
            path = key.removeprefix("base_model.model.").removesuffix(".weight")
            if key in known or path == key or not key.endswith(".weight") or len(shape) != 2:
                continue
            if not any(path == item.path or path.startswith(f"{item.path}.") for item in modules):
                _put(root, path, nn.Linear(shape[1], shape[0], bias=path in biases))
    return HollowModel("skeleton", root, {"": root})


def _layer(module: LoraModule, *, bias: bool) -> nn.Module:
    if module.kind == "embedding":
        return nn.Embedding(module.d_in, module.d_out)
    if module.kind == "conv":
        _, channels, *kernel = module.a_shape
        size = kernel[0] if len(set(kernel)) == 1 else tuple(kernel)
        kinds: Mapping[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        return kinds[len(kernel)](channels, module.d_out, size, bias=bias)  # type: ignore[no-any-return]
    return nn.Linear(module.d_in, module.d_out, bias=bias)


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    place = root
    for parent in parents:
        if parent not in place._modules:
            place.add_module(parent, nn.Module())
        place = place.get_submodule(parent)
    if name not in place._modules:
        place.add_module(name, layer)


def _component(folder: Path, entry: Sequence[str], name: str) -> nn.Module:
    """One component of a pipeline: a class of diffusers or of transformers, never the repository's own code."""
    import diffusers
    import transformers

    library, kind = str(entry[0]), str(entry[1])
    found: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    if library not in _LIBRARIES or not _is_a(found, diffusers.ModelMixin, transformers.PreTrainedModel):
        raise _unbuildable(name, f"its component {folder.name} is of {library[:50]}'s class {kind[:100]!r}")
    _json(folder / "config.json", name)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                model = found.from_config(found.load_config(str(folder), local_files_only=True))
            else:
                config = BaseFiles(name, str(folder)).config()
                model = found._from_config(config, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise _unbuildable(name, f"{folder.name}: {str(error)[:500]}") from error
    return model  # type: ignore[no-any-return]


def _is_a(found: Any, *parents: type) -> bool:
    return isinstance(found, type) and issubclass(found, parents)


def _is_there(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)


class _Placeholder(nn.Parameter):
    """A parameter that holds one number. PEFT copies whole modules, for `modules_to_save`: a copy is as small, and is
    none of the base's."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if not is_one_number(self):
            copied: nn.Parameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
            return copied
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(torch.zeros((), dtype=self.dtype).expand(self.shape), self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found


def is_one_number(tensor: Tensor) -> bool:
    """Whether all entries are one and the same in memory."""
    return tensor.numel() > 1 and not any(tensor.stride())


def _hollow_out(model: nn.Module) -> list[Tensor]:
    """Make every parameter and buffer a view of one number; gives those numbers, one of each dtype."""
    zeros: dict[torch.dtype, Tensor] = {}
    made: dict[int, nn.Parameter] = {}

    def view(tensor: Tensor) -> Tensor:
        zero = zeros.setdefault(tensor.dtype, torch.zeros((), dtype=tensor.dtype))
        return zero.expand(tensor.shape)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # tied ones stay tied
                if id(parameter) not in made:
                    made[id(parameter)] = _Placeholder(view(parameter), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = view(buffer)
    return list(zeros.values())


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unbuildable(name, f"{path.parent.name}/{path.name} can not be read: {str(error)[:300]}") from error
    if not isinstance(document, dict):
        raise _unbuildable(name, f"{path.parent.name}/{path.name} is no JSON object")
    return document


def _unbuildable(name: str, reason: str) -> RequestInvalid:
    return RequestInvalid(
        f"The base model {name!r} can not be built from its configuration: {reason}.",
        hint="Name another base model that the adapter belongs to.",
        errors=[FieldError(POINTER, reason)],
    )
