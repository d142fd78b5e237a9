"""The torch-free description of an adapter: what its files hold, found from headers and configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from artifacts.errors import ShapeMismatch

ModuleKind = Literal["linear", "conv", "embedding"]
ScaleMode = Literal["alpha_over_b", "constant"]
PEFT_FORMATS = ("peft", "safetensors-metadata")
"""Formats whose tensors carry PEFT's names."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One stored file of an adapter: path inside its directory, SHA-256 (hex) and size in bytes."""

    path: str
    sha256: str
    size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module, as the file describes it.

    `a_shape` and `b_shape` are the shapes in the file: (r, d_in) and (d_out, r) for a linear layer,
    (r, c_in, kh, kw) and (c_out, r, 1, 1) for a convolution, (r, vocabulary) and (dim, r) for an embedding
    (the matrices that PEFT stores as `lora_embedding_A` and `lora_embedding_B`).
    `d_in` and `d_out` are the flattened dimensions of ΔW = scaling·B·A, a d_out×d_in matrix.

    A MiSS adapter stores one block D of `block_shape` (r, m) in `block_key` instead of A and B, which are made from it
    (`artifacts.shard_blocks`); `a_key` and `b_key` are empty then. Its files may not tell d_in, or d_out: that is 0.

    A module can be a view of tensors that mean more than it: `b_rows` are the spans of rows of the stored B, in order,
    that are this module's (of a fused projection); `rank_span` is the span of components of A and B that are, where the
    stored B is block-diagonal; `mid_key` is the core of a Tucker decomposition, (r, r, kh, kw), between B and A;
    `transposed` says that A is stored as (d_in, r) and B as (r, d_out); `head_rows` is the size of the groups of
    rows of B that the view has in the order 0, 2, 4, … 1, 3, 5, …, or 0. The shapes are those of the view.
    """

    path: str
    kind: ModuleKind
    a_key: str
    b_key: str
    rank: int
    alpha: float
    scaling: float
    d_in: int
    d_out: int
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: str
    bias_key: str | None = None
    magnitude_key: str | None = None
    block_key: str | None = None
    block_shape: tuple[int, ...] = ()
    b_rows: tuple[tuple[int, int], ...] = ()
    rank_span: tuple[int, int] | None = None
    mid_key: str | None = None
    transposed: bool = False
    head_rows: int = 0

    @property
    def plain(self) -> bool:
        """Whether A and B are the stored tensors themselves."""
        viewed = self.b_rows or self.rank_span or self.mid_key or self.transposed or self.head_rows
        return self.block_key is None and not viewed

    @property
    def grouped(self) -> bool:
        """Whether it is a grouped convolution, whose B has the columns of one group."""
        return self.kind == "conv" and self.b_shape[1] != self.rank

    @property
    def complete(self) -> bool:
        """Whether the dimensions of ΔW are known."""
        return self.d_out > 0 and self.d_in > 0

    @property
    def factor_keys(self) -> tuple[str, ...]:
        """The tensors that B·A is made of."""
        if self.block_key is not None:
            return (self.block_key,)
        return (self.a_key, self.b_key) if self.mid_key is None else (self.a_key, self.mid_key, self.b_key)

    def with_sides(self, d_out: int, d_in: int) -> Self:
        """The module of a block, with the dimensions of its layer.

        Raises:
            ShapeMismatch: the block does not fit a layer of these dimensions.
        """
        r, m = self.block_shape
        if r > d_in or d_out % m or self.d_out not in (0, d_out):
            raise ShapeMismatch(f"{self.path}: a block of {r}×{m} does not fit a weight of {d_out}×{d_in}.")
        return replace(self, d_out=d_out, d_in=d_in, a_shape=(self.rank, d_in), b_shape=(d_out, self.rank))


@dataclass(frozen=True, slots=True)
class TypedModule:
    """A module whose ΔW is no scaling·B·A of stored factors.

    Attributes:
        path: the module's path; of a fused projection whose parts are several modules, its name in the file.
        type: "loha", "lokr", "oft", "boft", "ia3", "full", "norm", "glora", "bias" …
        rank, alpha, scaling: of the decomposition; 0 where it has none. `scaling` is what the product is multiplied by.
        d_out, d_in: of ΔW, flattened; 0 where the tensors do not tell.
        tensors: role ("hada_w1_a", "lokr_w2", "diff" …) → key in the file.
        targets: the modules, when a fused projection has several: in order of its rows.
        swap: the two halves of the file's rows change places in the module.
    """

    path: str
    type: str
    rank: int
    alpha: float
    scaling: float
    d_out: int
    d_in: int
    tensors: Mapping[str, str]
    targets: tuple[str, ...] = ()
    swap: bool = False


KeyUse = Literal["used", "kept", "ignored"]


@dataclass(frozen=True, slots=True)
class KeyVerdict:
    """What became of one tensor of an upload.

    Attributes:
        use: "used": part of a ΔW of factors. "kept": stored, part of something that no LoRA expresses. "ignored".
        role: which part it is ("lora_A", "alpha", "hada_w1_a" …), or "".
        modules: paths of the modules that it is part of.
        note: how it was converted, or why it is ignored.
    """

    key: str
    use: KeyUse
    role: str = ""
    modules: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Ability:
    """Whether something can be done with an adapter, and why not."""

    able: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """What was understood of a file.

    Attributes:
        architecture: stored list of modules that has the file's names ("sdxl", "flux" …), or None.
        modules_in_file: distinct names of modules in the file; fused ones count once.
        partial: whether tensors of an adapter were left out.
        composable: whether `POST /compose-image` can take it.
        exact_as_lora: whether every ΔW is exactly a low-rank product, be it after a conversion.
        typed: modules whose ΔW is no product of stored factors.
        lasting: reasons that keep it from being merged after a conversion too (`artifacts.refusals`).
    """

    architecture: str | None = None
    modules_in_file: int = 0
    partial: bool = False
    composable: Ability = Ability(True)
    exact_as_lora: Ability = Ability(True)
    typed: tuple[TypedModule, ...] = ()
    lasting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IgnoredKey:
    """A tensor of the file that is not used, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class NestedRanks:
    """Of an adapter whose first b components are the adapter of rank b: which b were trained, and their scaling.

    Attributes:
        ranks: rising; the last is the adapter's own rank r.
        scale_mode: "alpha_over_b": the scaling at rank b is alpha/b; "constant": it is alpha/r at every rank.
    """

    ranks: tuple[int, ...]
    scale_mode: ScaleMode

    def alpha_at(self, rank: int, alpha: float) -> float:
        """The `lora_alpha` of the adapter of `rank`, whose scaling is alpha over rank, from that of the whole."""
        scaled = alpha if self.scale_mode == "alpha_over_b" else alpha * rank / self.ranks[-1]
        return int(scaled) if scaled == int(scaled) else scaled

    def up_to(self, rank: int) -> NestedRanks:
        """What is left when the adapter is cut to `rank`."""
        return NestedRanks(tuple(item for item in self.ranks if item <= rank), self.scale_mode)


@dataclass(frozen=True, slots=True)
class IntakeReport:
    """Every key accounted for. `nonfinite` maps a tensor key to its count of NaN and Inf elements.

    `nested` says at which ranks the adapter can be cut; None if it was not trained for that.
    """

    used_keys: int
    ignored: tuple[IgnoredKey, ...] = ()
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    dropped_files: tuple[IgnoredKey, ...] = ()
    warnings: tuple[str, ...] = ()
    nested: NestedRanks | None = None
    facts: FormatFacts = FormatFacts()


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """What the service knows of an adapter without loading a tensor.

    Attributes:
        format: file layout, e.g. "peft", "safetensors-metadata" or the name of a reader in `artifacts.formats`.
        method: what kind of adapter it is: "lora", "rslora", "dora", "dylora" (a LoRA that can be cut to smaller
            ranks), or the lower-case `peft_type`.
        rank, alpha: the largest rank of any module, and the alpha of the configuration.
        mergeable: whether ΔW is exactly scaling·B·A for every module.
        refusal: why it is not mergeable, else None.
        weights_digest: SHA-256 over names, dtypes, shapes and bytes of the tensors in sorted order of their
            names, without metadata: a re-saved copy has the same digest.
        identity_digest: SHA-256 over the weights digest and the configuration that changes ΔW: two uploads with
            the same identity are the same adapter.
        keys: what became of every tensor of the weights.
    """

    format: str
    method: str
    base_model: str | None
    base_model_revision: str | None
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    parameter_count: int
    dtype: str
    files: tuple[FileEntry, ...]
    modules: tuple[LoraModule, ...]
    mergeable: bool
    refusal: str | None
    weights_digest: str
    identity_digest: str
    config: Mapping[str, Any]
    report: IntakeReport
    keys: tuple[KeyVerdict, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)
