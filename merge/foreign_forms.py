"""What the modules of files of LyCORIS and kohya's trainers add, of every type that they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from artifacts import low_rank_forms, weight_forms
from artifacts.adapter import Adapter
from artifacts.errors import FileBroken, MergeRefused
from artifacts.formats.architectures import architecture
from artifacts.formats.modules import FACTORED_ROLES
from artifacts.formats.reading import Reading
from artifacts.formats.roles import ALPHA, MAGNITUDE
from artifacts.low_rank_forms import Pair
from artifacts.manifest import LoraModule, TypedModule
from merge.base_weights import BaseWeights, needed
from merge.convertible import check_form
from merge.form_sizes import form_size
from merge.peft_forms import Change, misfit

FACTORED = ("lora", "loha", "lokr")
OF_WEIGHTS = ("oft", "boft", "ia3", "glora")
TYPES = (*FACTORED, "full", *OF_WEIGHTS)
_BIASES = ("diff_b", "lora_A.bias", "lora_B.bias", "w_norm", "b_norm", "bias")

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ForeignForm:
    """One module of the model.

    Attributes:
        type: of the module in the file, without "-dora", which a magnitude among the tensors shows.
        tensors: by role; matrices where they are factors.
        rows: spans of the file's rows that are this module's, in its own order; () for all.
        siblings: the modules whose rows, one after another, are those of the module in the file.
        kernel: (c_in, kh, kw) of a convolution, whose ΔW has d_in = c_in·kh·kw; () of a linear layer.
    """

    path: str
    type: str
    tensors: Mapping[str, Tensor]
    scaling: float
    alpha: float
    rank: int
    rows: Spans = ()
    siblings: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()

    def change(self, base: BaseWeights | None) -> Change:
        """What is added to the module, the scaling included.

        Raises:
            MergeRefused: it depends on weights of the base model that are not there or do not fit.
            KeyError, IndexError, RuntimeError: tensors that the form does not have.
        """
        if MAGNITUDE in self.tensors:
            return self._dora(needed(base, "DoRA"))
        if self.type in FACTORED:
            A, B = self._pair()
            return Change((A, self._own(B)), None, self.kernel)
        if self.type == "full":
            return Change(self._own(self.tensors["diff"].flatten(1)), None, self.kernel)
        W, kernel = self._weight(needed(base, _TITLES[self.type]))
        if self.type == "glora":
            A, B = self._glora(W)
            return Change((A, self._own(B)), None, kernel)
        delta = self._ia3(W) if self.type == "ia3" else self._rotated(W)
        return Change(self._own(delta.flatten(1)), None, kernel)

    def _pair(self) -> Pair:
        """(A, B) with B·A = ΔW of all rows of the file's module."""
        named, scaling = self.tensors, self.scaling
        if self.type == "lora":
            return named["lora_A"], named["lora_B"] * scaling
        if self.type == "loha":
            w1_a, w1_b, w2_a, w2_b = (named[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return low_rank_forms.loha(w1_a, w1_b, w2_a, w2_b, scaling)
        one, two = (
            low_rank_forms.factored(named.get(name), named.get(f"{name}_a"), named.get(f"{name}_b"))
            for name in ("lokr_w1", "lokr_w2")
        )
        return low_rank_forms.lokr(one, two, scaling)

    def _dora(self, base: BaseWeights) -> Change:
        """By the shape of the magnitudes: norms of outputs, (d_out, 1 …), or of inputs, (1, c_in, 1 …)."""
        W, kernel = self._weight(base)
        magnitude = self.tensors[MAGNITUDE]
        if self.type == "full":
            change = self.tensors["diff"].flatten(1)
        else:
            A, B = self._pair()
            change = B @ A
        if change.numel() != W.numel() or change.shape[0] != W.shape[0]:
            raise misfit(self.path, f"ΔW of {tuple(change.shape)}", W)
        shape = tuple(magnitude.shape)
        if magnitude.numel() == W.shape[0] and (len(shape) == 1 or shape[0] == W.shape[0]):
            axis = 0
        elif len(shape) > 1 and shape[0] == 1 and shape[1] == W.shape[1] == magnitude.numel():
            axis = 1
        else:
            raise misfit(self.path, f"magnitudes of shape {shape}", W)
        delta = weight_forms.dora(W, change.view_as(W), magnitude.flatten(), axis)
        return Change(self._own(delta.flatten(1)), 2 * self.rank or None, kernel)

    def _glora(self, W: Tensor) -> Pair:
        """Releases of LyCORIS differ in which of two factors is on the side of the input: a1's shape tells."""
        if "glora_bm" in self.tensors:
            raise MergeRefused(f"{self.path} is a GLoRA with a core (bm), which is not converted.")
        a1, a2, b1, b2 = (self.tensors[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
        inputs, rank = W.shape[1], self.rank
        a = {(inputs, rank): (a2, a1), (rank, inputs): (a1, a2)}.get((a1.shape[0], a1.shape[1]))
        if a is None or inputs == rank:
            raise misfit(self.path, f"a1 of shape {tuple(a1.shape)}", W)
        b = (b2, b1) if a[1] is a1 else (b1, b2)
        R_a, L_a, R_b, L_b = (factor.flatten(1) for factor in (*a, *b))
        if (L_b.shape[0], R_b.shape[1]) != (W.shape[0], inputs * W.shape[2]):
            raise misfit(self.path, f"b1 and b2 of shapes {tuple(b1.shape)} and {tuple(b2.shape)}", W)
        if (R_a.shape[0], R_a.shape[1]) != L_a.shape[::-1] or R_b.shape[0] != L_b.shape[1]:
            shapes = ", ".join(str(tuple(factor.shape)) for factor in (a1, a2, b1, b2))
            raise FileBroken(f"{self.path}: a1, a2, b1 and b2 of shapes {shapes} are no two products.")
        check_form(self.path, rank * (W.shape[2] + 1))
        return weight_forms.glora(W, (R_a, L_a), (R_b, L_b), self.scaling)

    def _ia3(self, W: Tensor) -> Tensor:
        """ΔW = W∘w, of the inputs or of the outputs: LyCORIS stores the difference from 1."""
        scales, axis = self.tensors["weight"].flatten(), int(bool(self.tensors["on_input"].any()))
        if scales.shape[0] != W.shape[axis]:
            raise misfit(self.path, f"{scales.shape[0]} scales of {'inputs' if axis else 'outputs'}", W)
        return W * scales.view((1, -1, 1) if axis else (-1, 1, 1))

    def _rotated(self, W: Tensor) -> Tensor:
        blocks = self.tensors["oft_blocks"]
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
            raise FileBroken(f"{self.path}: oft_blocks of shape {tuple(blocks.shape)} are no square blocks.")
        count, size = blocks.shape[-3], blocks.shape[-1]
        if count * size != W.shape[0]:
            raise misfit(self.path, f"{count} blocks of {size} outputs", W)
        limit = self.alpha * W.shape[0]  # alpha is the constraint, for each output
        if blocks.ndim == 3:
            turned = weight_forms.oft_of_outputs(W, blocks, limit)
        else:
            if size % 2 or W.shape[0] % (2 ** blocks.shape[0] * (size // 2)):
                raise FileBroken(f"{self.path}: {tuple(blocks.shape)} are no blocks of a butterfly.")
            turned = weight_forms.boft_of_outputs(W, blocks, limit)
        if "rescale" in self.tensors:
            scales = self.tensors["rescale"].flatten()
            if scales.shape[0] != W.shape[0]:
                raise misfit(self.path, f"{scales.shape[0]} scales of outputs", W)
            turned = turned * scales[:, None, None]
        return turned - W

    def _weight(self, base: BaseWeights) -> tuple[Tensor, tuple[int, ...]]:
        """W as the file has its rows, (d_out, c_in, taps), and the kernel."""
        parts = [base.of(path) for path in self.siblings or (self.path,)]
        kernel = tuple(parts[0].shape[1:]) if parts[0].ndim > 2 else ()
        if any(part.ndim not in (2, 4) for part in parts) or (kernel and len(parts) > 1):
            raise MergeRefused(f"{self.path} is neither a linear layer nor one two-dimensional convolution.")
        W = torch.cat([part.flatten(2) if kernel else part[:, :, None] for part in parts])
        # Of one module with rows in another order; to exchange halves is to undo it.
        return (W if self.siblings else self._own(W)), kernel

    def _own(self, matrix: Tensor) -> Tensor:
        """The rows that are this module's. Raises MergeRefused: there are fewer."""
        if self.rows and max(stop for _, stop in self.rows) > matrix.shape[0]:
            raise MergeRefused(f"{self.path}: the adapter is for more rows than the {matrix.shape[0]} that there are.")
        return torch.cat([matrix[start:stop] for start, stop in self.rows]) if self.rows else matrix


_TITLES = {"oft": "OFT", "boft": "BOFT", "ia3": "IA3", "glora": "GLoRA"}


def forms_of(reading: Reading, adapter: Adapter) -> dict[str, Callable[[], ForeignForm]]:
    """Path → what reads the form, of every module of the file; the rows of a fused projection are split.

    Raises:
        MergeRefused: modules of a type that no LoRA expresses, or biases; of what reads a form also convolutions that
            do not fit their model, and NaN or infinite numbers.
    """
    if reading.partial:
        raise MergeRefused("Some modules of the file could not be told, so it is not converted: see GET …/keys.")
    if reading.misfits:
        raise MergeRefused(f"The file does not fit the model that it names: {reading.misfits[0]}.")
    others = [module for module in reading.typed if module.type.removesuffix("-dora") not in TYPES]
    if others:
        raise MergeRefused(
            f"The file holds {others[0].type} besides what becomes a LoRA ({others[0].path}); it is not converted.",
            hint="Weights of normalisations and biases are vectors, which no LoRA adds.",
        )
    _check_biases(reading, adapter)
    forms: dict[str, Callable[[], ForeignForm]] = {
        module.path: partial(_of_pair, module, adapter) for module in reading.modules
    }
    for module in reading.typed:
        for position, path in enumerate(module.targets or (module.path,)):
            if path in forms:
                raise MergeRefused(f"The file has two modules for {path}.")
            forms[path] = partial(_of_typed, module, position, reading, adapter)
    return forms


def _check_biases(reading: Reading, adapter: Adapter) -> None:
    for verdict in reading.verdicts:
        if verdict.role in _BIASES and verdict.use != "ignored" and bool(adapter.tensor(verdict.key).float().any()):
            raise MergeRefused(
                f"{verdict.key} was trained, a vector that no LoRA adds.",
                hint="Train or extract it without biases and normalisations.",
            )


def _of_pair(module: LoraModule, adapter: Adapter) -> ForeignForm:
    """A low-rank pair, with or without the magnitudes of DoRA."""
    if module.kind == "embedding":
        raise MergeRefused(f"{module.path} is an embedding; only linear layers and convolutions are converted.")
    factors = adapter.factors(module)
    tensors = {"lora_A": factors.A.float(), "lora_B": factors.B.float()}
    if module.magnitude_key is not None:
        magnitude = adapter.tensor(module.magnitude_key).float()
        if module.b_rows and (magnitude.ndim == 1 or magnitude.shape[0] != 1):
            magnitude = torch.cat([magnitude[start:stop] for start, stop in module.b_rows])
        elif module.b_rows and sum(stop - start for start, stop in module.b_rows) != _rows_of(module, adapter):
            raise MergeRefused(
                f"{module.path} is a part of a fused layer whose inputs have norms; it is not converted."
            )
        tensors[MAGNITUDE] = magnitude
    _check_finite(module.path, tensors)
    kernel = tuple(module.a_shape[1:]) if module.kind == "conv" else ()
    return ForeignForm(module.path, "lora", tensors, factors.scaling, module.alpha, factors.rank, kernel=kernel)


def _rows_of(module: LoraModule, adapter: Adapter) -> int:
    return adapter.tensor(module.b_key).shape[1 if module.transposed else 0]


def _of_typed(module: TypedModule, position: int, reading: Reading, adapter: Adapter) -> ForeignForm:
    """The module of another type; of a fused one, the part at `position`."""
    kind = module.type.removesuffix("-dora")
    paths = module.targets or (module.path,)
    shapes = [_shape(reading, path) for path in paths]
    tensors = {role: adapter.tensor(key).float() for role, key in module.tensors.items() if role != ALPHA}
    _check_finite(module.path, tensors)
    _check_parts(module, kind, tensors)
    d_out, d_in = module.d_out, module.d_in
    if kind in ("loha", "lokr"):
        d_out, d_in, _ = form_size(module.path, kind, {role: tuple(tensor.shape) for role, tensor in tensors.items()})
    convolved = any(tensor.ndim > 2 for tensor in _factors(tensors).values())

    def form(path: str, rows: Spans, siblings: tuple[str, ...], kernel: tuple[int, ...]) -> ForeignForm:
        named = as_matrices(tensors) if kind in ("loha", "lokr") and not siblings else tensors
        return ForeignForm(path, kind, named, module.scaling, module.alpha, module.rank, rows, siblings, kernel)

    if len(paths) == 1:
        kernel = () if kind in OF_WEIGHTS else _kernel(module.path, (d_out, d_in), tensors, shapes[0])
        half = d_out // 2
        return form(paths[0], ((half, d_out), (0, half)) if module.swap else (), (), kernel)
    if any(len(shape) > 2 for shape in shapes) or (kind not in OF_WEIGHTS and convolved):
        raise MergeRefused(f"{module.path} is a convolution of several modules, which is not converted.")
    if not all(shapes):
        raise MergeRefused(f"{module.path} is of several modules, of which no list has the sides; it is not converted.")
    total = sum(shape[0] for shape in shapes)
    d_out = d_out or total
    if any(d_out * shape[0] % total for shape in shapes):
        raise MergeRefused(f"{module.path}: {d_out} rows can not be split into its {len(paths)} modules.")
    start = d_out * sum(shape[0] for shape in shapes[:position]) // total
    stop = start + d_out * shapes[position][0] // total
    return form(paths[position], ((start, stop),), tuple(paths), ())


def _check_finite(path: str, tensors: Mapping[str, Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise MergeRefused(f"{path} holds NaN or infinite numbers.")


def _check_parts(module: TypedModule, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises MergeRefused: a part that the form does not read, or a type that is not used like this."""
    if module.swap and kind in OF_WEIGHTS and not module.d_out:
        raise MergeRefused(f"{module.path} has the halves of its rows exchanged, which is not converted of {kind}.")
    own: Sequence[str] = {
        "full": ("diff", MAGNITUDE),
        "oft": ("oft_blocks", "rescale"),
        "boft": ("oft_blocks", "rescale"),
        "ia3": ("weight", "on_input"),
        "glora": ("glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_bm"),
    }.get(kind, ())
    known = own or FACTORED_ROLES[kind]
    strange = sorted(role for role in tensors if role not in known and role not in _BIASES)
    if strange or not set(own[:1]) <= tensors.keys():
        raise MergeRefused(
            f"{module.path} is of type {kind} in another form than LyCORIS': it has {', '.join(sorted(tensors))}."
        )
    if kind == "full" and (tensors["diff"].ndim not in (2, 4) or 0 in tensors["diff"].shape):
        shape = tuple(tensors["diff"].shape)
        raise MergeRefused(f"{module.path}: a difference of shape {shape} is neither of a matrix nor of a convolution.")
    if kind == "oft" and module.alpha == 0 and module.tensors["oft_blocks"].startswith("oft_"):
        raise MergeRefused(f"{module.path}: its constraint (alpha) is 0: kohya's trainer lets it change nothing.")


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensor for role, tensor in tensors.items() if role != MAGNITUDE}


def as_matrices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a convolution as those of a matrix with c_in·kh·kw columns; a core goes into the factor beside it.

    With a core T: (r, r, kh, kw) both factors have their rank first, and LyCORIS (arXiv:2309.14859) computes
    W[o, i, k, l] = Σ_a Σ_b Wa[a, o]·T[a, b, k, l]·Wb[b, i]. Magnitudes stay as they are.
    """
    found = {role: tensor.flatten(1) for role, tensor in _factors(tensors).items() if role not in _CORES}
    for core, (left, right) in _CORES.items():
        if core in tensors:
            found[left] = tensors[left].T
            found[right] = torch.einsum("abkl,bi->aikl", tensors[core], tensors[right]).flatten(1)
    return found | ({MAGNITUDE: tensors[MAGNITUDE]} if MAGNITUDE in tensors else {})


_CORES = {
    "hada_t1": ("hada_w1_a", "hada_w1_b"),
    "hada_t2": ("hada_w2_a", "hada_w2_b"),
    "lokr_t2": ("lokr_w2_a", "lokr_w2_b"),
}
"""Core → the factors on both sides of it."""


def _kernel(
    path: str, sides: tuple[int, int], tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """(c_in, kh, kw), which the tensors of a convolution without a core do not tell; of its model's list."""
    if len(shape) == 4:
        if sides != (shape[0], math.prod(shape[1:])):
            raise MergeRefused(f"{path}: ΔW is {sides[0]}×{sides[1]}, the convolution of the model is {shape}.")
        return shape[1:]
    if "diff" in tensors:
        return tuple(tensors["diff"].shape[1:]) if tensors["diff"].ndim == 4 else ()
    if any(tensor.ndim > 2 for tensor in _factors(tensors).values()):
        raise MergeRefused(f"{path} is a convolution, and no model whose modules are listed here has it.")
    return ()


def _shape(reading: Reading, path: str) -> tuple[int, ...]:
    """The weight of a module of the file's base model; () where no list has it."""
    if reading.architecture is None or path.startswith("text_encoder"):
        return ()
    return architecture(reading.architecture).modules.get(path.partition(".")[2], ())
