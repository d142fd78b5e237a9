"""LoHa and LoKr modules of LyCORIS files as pairs of factors: what `artifacts.low_rank_forms` needs of each module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts import low_rank_forms
from artifacts.adapter import Adapter
from artifacts.errors import MergeRefused
from artifacts.formats.architectures import architecture
from artifacts.formats.reading import Reading
from artifacts.low_rank_forms import Pair
from artifacts.manifest import TypedModule
from merge.form_sizes import FormSize, form_size

FORMS = ("loha", "lokr")


@dataclass(frozen=True, slots=True)
class ForeignForm:
    """One module: its tensors by role, all of them matrices, and the rows of ΔW that are its own (`start` None: all).

    `kernel` is (c_in, kh, kw) of a convolution, whose ΔW has d_in = c_in·kh·kw; () of a linear layer.
    """

    module: TypedModule
    tensors: Mapping[str, Tensor]
    start: int | None = None
    stop: int | None = None
    kernel: tuple[int, ...] = ()

    def pair(self) -> Pair:
        """(A, B) with B·A = ΔW, the scaling included."""
        named, scaling = self.tensors, self.module.scaling
        if self.module.type == "loha":
            w1_a, w1_b, w2_a, w2_b = (named[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
            A, B = low_rank_forms.loha(w1_a, w1_b, w2_a, w2_b, scaling)
        else:
            one, two = (
                low_rank_forms.factored(named.get(name), named.get(f"{name}_a"), named.get(f"{name}_b"))
                for name in ("lokr_w1", "lokr_w2")
            )
            A, B = low_rank_forms.lokr(one, two, scaling)
        return A, B[self.start : self.stop]


def forms_of(reading: Reading, adapter: Adapter) -> dict[str, ForeignForm]:
    """Path → form, of every module of the file; the rows of a fused projection are split.

    Raises:
        MergeRefused: other modules than LoHa's and LoKr's, convolutions that do not fit their model, NaN or infinite
            numbers, forms that are too large.
        FileBroken: tensors of a form are missing, or do not fit each other.
    """
    if reading.method not in FORMS:
        raise MergeRefused(f"The file is a {reading.method} in another format than PEFT's; only PEFT's are converted.")
    others = sorted({module.type for module in reading.typed} - set(FORMS))
    if others or reading.modules or reading.partial:
        found = others[0] if others else "modules that are pairs, or that could not be told"
        raise MergeRefused(f"The file holds {found} besides its {reading.method} modules; it is not converted.")
    forms: dict[str, ForeignForm] = {}
    for module in reading.typed:
        paths = module.targets or (module.path,)
        shapes = [_shape(reading, path) for path in paths]
        tensors = {role: adapter.tensor(key).float() for role, key in module.tensors.items() if role != "alpha"}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise MergeRefused(f"{module.path} holds NaN or infinite numbers.")
        sizes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
        size = form_size(module.path, module.type, sizes)
        if len(paths) == 1:
            kernel = _kernel(module.path, size, tensors, shapes[0])
            forms[paths[0]] = ForeignForm(module, as_matrices(tensors), kernel=kernel)
            continue
        if any(tensor.ndim > 2 for tensor in tensors.values()) or any(len(shape) > 2 for shape in shapes):
            raise MergeRefused(f"{module.path} is a convolution of several modules, which is not converted.")
        total, start = sum(shape[0] for shape in shapes), 0
        if any(size.d_out * shape[0] % total for shape in shapes):
            raise MergeRefused(f"{module.path}: {size.d_out} rows can not be split into its {len(paths)} modules.")
        for path, shape in zip(paths, shapes, strict=True):
            stop = start + size.d_out * shape[0] // total
            forms[path] = ForeignForm(module, tensors, start, stop)
            start = stop
    return forms


def as_matrices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a convolution as those of a matrix with c_in·kh·kw columns; a core goes into the factor beside it.

    With a core T: (r, r, kh, kw) both factors have their rank first, and LyCORIS (arXiv:2309.14859) computes
    W[o, i, k, l] = Σ_a Σ_b Wa[a, o]·T[a, b, k, l]·Wb[b, i].
    """
    found = {role: tensor.flatten(1) for role, tensor in tensors.items() if role not in _CORES}
    for core, (left, right) in _CORES.items():
        if core in tensors:
            found[left] = tensors[left].T
            found[right] = torch.einsum("abkl,bi->aikl", tensors[core], tensors[right]).flatten(1)
    return found


_CORES = {
    "hada_t1": ("hada_w1_a", "hada_w1_b"),
    "hada_t2": ("hada_w2_a", "hada_w2_b"),
    "lokr_t2": ("lokr_w2_a", "lokr_w2_b"),
}
"""Core → the factors on both sides of it."""


def _kernel(path: str, size: FormSize, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
    """(c_in, kh, kw), which the tensors of a convolution without a core do not tell; of its model's list."""
    if len(shape) == 4:
        if size[:2] != (shape[0], math.prod(shape[1:])):
            raise MergeRefused(f"{path}: ΔW is {size.d_out}×{size.d_in}, the convolution of the model is {shape}.")
        return shape[1:]
    if any(tensor.ndim > 2 for tensor in tensors.values()):
        raise MergeRefused(f"{path} is a convolution, and no model whose modules are listed here has it.")
    return ()


def _shape(reading: Reading, path: str) -> tuple[int, ...]:
    """The weight of a module of the file's base model; () where no list has it."""
    if reading.architecture is None or path.startswith("text_encoder"):
        return ()
    return architecture(reading.architecture).modules.get(path.partition(".")[2], ())
