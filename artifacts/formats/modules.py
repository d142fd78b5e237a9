"""From the tensors of one stem to modules: a low-rank pair, or a decomposition of another type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from artifacts.errors import FileBroken
from artifacts.formats.protocol import NOTHING_TOLD, Settings
from artifacts.formats.resolution import Resolved
from artifacts.formats.roles import A_T, ALPHA, B_T, MAGNITUDE, A, B
from artifacts.formats.values import Values
from artifacts.manifest import LoraModule, TypedModule
from artifacts.peft_keys import FLOATS, pair
from artifacts.safetensors_header import TensorInfo

Parts = Mapping[str, TensorInfo]

_TYPES = (
    ("loha", "hada_"),
    ("lokr", "lokr_"),
    ("boft", "boft_"),
    ("oft", "oft_"),
    ("glora", "glora_"),
    ("ia3", "on_input"),
    ("ia3", "ia3_l"),
    ("adalora", "lora_E"),
    ("full", "diff"),
    ("norm", "w_norm"),
    ("norm", "b_norm"),
    ("norm", "scale"),
    ("full", "set_weight"),
)
"""Type → beginning of the roles that show it; the first that occurs counts."""

NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "lokr": tuple(
        (*one, *two)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "glora": (("glora_a1", "glora_a2", "glora_b1", "glora_b2"),),
}
"""Type → the sets of roles of which one must be complete."""

WHY_NO_LORA: Mapping[str, str] = {
    "loha": "LoHa's ΔW is a Hadamard product of two low-rank products, of rank up to r²",
    "lokr": "LoKr's ΔW is a Kronecker product",
    "oft": "OFT rotates the base weight, so ΔW depends on it",
    "boft": "BOFT rotates the base weight, so ΔW depends on it",
    "ia3": "IA3 scales activations, so ΔW depends on the base weight",
    "glora": "GLoRA's ΔW depends on the base weight",
    "adalora": "AdaLoRA stores singular values besides its factors",
    "full": "a full weight difference is stored, of any rank",
    "norm": "weights of a normalisation were trained, which are vectors",
    "bias": "biases were trained, which are vectors",
    "dora": "DoRA rescales W + scaling·B·A to a learned norm, so ΔW depends on the base weight",
}


def sides_of(parts: Parts) -> tuple[int, int]:
    """(d_out, d_in) of the ΔW that the tensors of a stem make; 0 where they do not tell."""
    a, b, mid = parts.get(A), parts.get(B), parts.get("lora_mid")
    if a is not None and b is not None and len(a.shape) >= 2 and len(b.shape) >= 2:
        kernel = math.prod(mid.shape[2:]) if mid is not None and len(mid.shape) == 4 else 1
        return b.shape[0], math.prod(a.shape[1:]) * kernel
    a, b = parts.get(A_T), parts.get(B_T)
    if a is not None and b is not None and len(a.shape) == len(b.shape) == 2:
        return b.shape[1], a.shape[0]
    for role in ("diff", "set_weight"):
        info = parts.get(role)
        if info is not None and len(info.shape) >= 2:
            return info.shape[0], math.prod(info.shape[1:])
    left, right = parts.get("hada_w1_a"), parts.get("hada_w1_b")
    if left is not None and right is not None and left.shape and right.shape and "hada_t1" not in parts:
        return left.shape[0], math.prod(right.shape[1:])
    return _lokr_sides(parts)


def _lokr_sides(parts: Parts) -> tuple[int, int]:
    sides = [1, 1]
    for factor in ("lokr_w1", "lokr_w2"):
        whole, left, right = parts.get(factor), parts.get(f"{factor}_a"), parts.get(f"{factor}_b")
        core = parts.get("lokr_t2") if factor == "lokr_w2" else None
        if whole is not None and len(whole.shape) >= 2:
            sides = [sides[0] * whole.shape[0], sides[1] * math.prod(whole.shape[1:])]
        elif left is not None and right is not None and len(left.shape) == 2 and len(right.shape) >= 2:
            if core is not None:
                if len(core.shape) != 4:
                    return 0, 0
                # with a core both factors have their rank first
                sides = [sides[0] * left.shape[1], sides[1] * right.shape[1] * math.prod(core.shape[2:])]
            else:
                sides = [sides[0] * left.shape[0], sides[1] * math.prod(right.shape[1:])]
        else:
            return 0, 0
    return sides[0], sides[1]


_BESIDE_FACTORED = frozenset({ALPHA, MAGNITUDE, "diff_b", "w_norm", "b_norm"})

FACTORED_ROLES: Mapping[str, frozenset[str]] = {
    "loha": frozenset(f"hada_{end}" for end in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")) | _BESIDE_FACTORED,
    "lokr": frozenset(f"lokr_{end}" for end in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")) | _BESIDE_FACTORED,
}
"""Type → what its tensors may be: what else stands beside them may change ΔW, and is not understood."""

_FACTORS = frozenset({A, B, A_T, B_T, "lora_embedding_A", "lora_embedding_B"})

PAIR_ROLES = _FACTORS | {ALPHA, MAGNITUDE, "lora_mid", "lora_A.bias", "lora_B.bias", "diff_b", "w_norm", "b_norm"}
"""What may stand beside a low-rank pair: each has its meaning, or its own reason why it can not be merged."""


def is_lora(parts: Parts) -> bool:
    """Whether the tensors are a low-rank pair, or one half of it."""
    return not parts.keys().isdisjoint(_FACTORS) and "lora_E" not in parts


def type_of(parts: Parts) -> str | None:
    """The type of what is no low-rank pair: None where no tensor shows any."""
    for name, start in _TYPES:
        if any(role.startswith(start) for role in parts):
            if name == "oft" and len(parts.get("oft_blocks", _NOTHING).shape) == 4:
                return "boft"
            if name == "full" and parts.keys() & {"diff", "set_weight"} == set():
                return "bias"
            return name
    return None


_NOTHING = TensorInfo("", "F32", (), 0, 0)


@dataclass(frozen=True, slots=True)
class Scale:
    """alpha as it is stored, None where there is none."""

    alpha: float | None

    @classmethod
    def of(cls, stem: str, parts: Parts, values: Values) -> Scale:
        """Raises FileBroken: alpha is no single finite number."""
        info = parts.get(ALPHA)
        if info is None:
            return cls(None)
        alpha = values.scalar(info)
        if not math.isfinite(alpha):
            raise FileBroken(f"{stem}: alpha is {alpha}.")
        return cls(alpha)


def lora_modules(
    stem: str, parts: Parts, resolved: Resolved, values: Values, *, told: Settings = NOTHING_TOLD
) -> tuple[LoraModule, ...]:
    """The modules of a low-rank pair: one, or one for each part of a fused projection.

    Args:
        told: what holds where the tensors tell no alpha; with nothing told it is the rank, so that ΔW is B·A.

    Raises:
        FileBroken: a half is missing, the shapes are no pair, or the rows can not be split.
    """
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    transposed = A_T in parts or B_T in parts
    roles = ("lora_embedding_A", "lora_embedding_B") if embedding else (A_T, B_T) if transposed else (A, B)
    for role, name in zip(roles, ("down (A)", "up (B)"), strict=True):
        if role not in parts:
            raise FileBroken(f"{stem}: the {name} matrix is missing.")
    others = sorted((parts.keys() & _FACTORS) - set(roles))
    if others:
        raise FileBroken(f"{stem}: there are factors of two kinds, {roles[0]} and {others[0]}.")
    a, b = parts[roles[0]], parts[roles[1]]
    if transposed:
        a, b = (_turned(stem, info) for info in (a, b))
    if len(a.shape) == 4 and len(b.shape) == 2:
        b = replace(b, shape=(*b.shape, 1, 1))  # LyCORIS' DyLoRA stores the up matrix of a convolution flat
    module = _with_core(stem, pair(stem, a, b, embedding=embedding), parts.get("lora_mid"))
    stored = Scale.of(stem, parts, values).alpha
    if told.head_rows and module.d_out % told.head_rows:
        raise FileBroken(f"{stem}: {module.d_out} rows are not heads of {told.head_rows} rows.")
    total = stored if stored is not None else _alpha(stem, module.rank, told)
    magnitude, bias = parts.get(MAGNITUDE), parts.get("lora_B.bias") or parts.get("diff_b")
    module = replace(
        module,
        path=resolved.paths[0],
        alpha=total,
        scaling=total / module.rank,
        transposed=transposed,
        head_rows=told.head_rows,
        magnitude_key=None if magnitude is None else magnitude.name,
        bias_key=bias.name if bias is not None and len(resolved.paths) == 1 else None,
    )
    if resolved.swap:
        half = module.d_out // 2
        module = replace(module, b_rows=((half, module.d_out), (0, half)))
    if len(resolved.paths) == 1:
        return (module,)
    return _split(stem, module, b, resolved, values)


def _turned(stem: str, info: TensorInfo) -> TensorInfo:
    if len(info.shape) != 2:
        raise FileBroken(
            f"{stem}: {info.name!r} has shape {info.shape}, where a factor is a matrix.",
            hint="Adapters of several experts in one tensor are not read.",
        )
    return replace(info, shape=info.shape[::-1])


def _alpha(stem: str, rank: int, told: Settings) -> float:
    if told.rank not in (None, rank):
        raise FileBroken(f"{stem}: its factors are of rank {rank}, the configuration tells {told.rank}.")
    if told.scaling is not None:
        return told.scaling * rank
    return float(rank) if told.alpha is None else told.alpha


def _with_core(stem: str, module: LoraModule, core: TensorInfo | None) -> LoraModule:
    if core is None:
        return module
    rank = module.rank
    if len(core.shape) != 4 or core.shape[:2] != (rank, rank) or core.dtype not in FLOATS or 0 in core.shape:
        raise FileBroken(f"{stem}: the core of shape {core.shape} does not fit factors of rank {rank}.")
    if module.kind != "conv" or math.prod(module.a_shape[2:]) != 1:
        raise FileBroken(f"{stem}: there is a core, but the factors are of no 1×1 convolution.")
    shape = (rank, module.a_shape[1], *core.shape[2:])
    return replace(module, mid_key=core.name, a_shape=shape, d_in=math.prod(shape[1:]))


def _split(stem: str, module: LoraModule, b: TensorInfo, resolved: Resolved, values: Values) -> tuple[LoraModule, ...]:
    """One module for each part of the rows."""
    total = sum(resolved.shares)
    if any(module.d_out * share % total for share in resolved.shares):
        raise FileBroken(
            f"{stem}: {module.d_out} rows can not be split as {' + '.join(map(str, resolved.shares))}.",
            hint="Is the file of a pruned model? Its fused projections have other parts.",
        )
    sizes = [module.d_out * share // total for share in resolved.shares]
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    spans = _rank_spans(module, b, starts, sizes, values)
    return tuple(
        replace(
            module,
            path=path,
            d_out=size,
            b_rows=((start, start + size),),
            rank=module.rank if span is None else span[1] - span[0],
            alpha=module.alpha if span is None else module.scaling * (span[1] - span[0]),
            rank_span=span,
            a_shape=module.a_shape if span is None else (span[1] - span[0], *module.a_shape[1:]),
            b_shape=(size, module.b_shape[1] if span is None else span[1] - span[0], *module.b_shape[2:]),
        )
        for path, start, size, span in zip(resolved.paths, starts, sizes, spans, strict=True)
    )


def _rank_spans(
    module: LoraModule, b: TensorInfo, starts: list[int], sizes: list[int], values: Values
) -> list[tuple[int, int] | None]:
    """The components of each part, where the parts were trained as adapters of their own (sd-scripts' split_qkv)."""
    count = len(sizes)
    if module.rank % count or len(b.shape) != 2 or b.dtype not in FLOATS or module.magnitude_key is not None:
        return [None] * count
    width = module.rank // count
    blocks = tuple(
        (start, start + size, position * width, (position + 1) * width)
        for position, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )
    if not values.zero_outside(b, blocks, True) or not values.zero_outside(b, blocks, False):
        return [None] * count
    return [(left, right) for _, _, left, right in blocks]


def typed_module(stem: str, parts: Parts, resolved: Resolved, values: Values) -> TypedModule:
    """A module of another type, described.

    Raises:
        FileBroken: tensors of the decomposition are missing, or alpha is no number.
    """
    kind = type_of(parts) or "bias"
    needed = NEEDED.get(kind)
    if needed is not None and not any(set(roles) <= parts.keys() for roles in needed):
        there = ", ".join(sorted(parts))
        raise FileBroken(f"{stem}: a {kind} module needs {' and '.join(needed[0])}; it has {there}.")
    rank = _rank(kind, parts)
    alpha = Scale.of(stem, parts, values).alpha
    scaling = 0.0
    if kind in ("loha", "lokr", "glora", "adalora") and rank:
        scaling = 1.0 if alpha is None else alpha / rank
    elif kind in ("lokr", "full"):
        scaling = 1.0  # both Kronecker factors are full: alpha means nothing
    d_out, d_in = sides_of(parts)
    return TypedModule(
        path=resolved.paths[0] if len(resolved.paths) == 1 else stem,
        type=kind if MAGNITUDE not in parts else f"{kind}-dora",
        rank=rank,
        alpha=(alpha or 0.0) if scaling or kind in ("oft", "boft") else 0.0,
        scaling=scaling,
        d_out=d_out,
        d_in=d_in,
        tensors={role: info.name for role, info in parts.items()},
        targets=resolved.paths if len(resolved.paths) > 1 else (),
        swap=resolved.swap,
    )


def _rank(kind: str, parts: Parts) -> int:
    if kind == "glora" and len(parts["glora_a1"].shape) >= 2:
        return min(parts["glora_a1"].shape[:2])  # which of its sides is the rank differs between releases
    role = {"loha": "hada_w1_b", "adalora": A}.get(kind)
    if role is not None and role in parts and parts[role].shape:
        return parts[role].shape[0]
    if kind == "lokr":
        for role in ("lokr_w2_b", "lokr_w1_b"):
            if role in parts and parts[role].shape:
                return parts[role].shape[0]
    return 0
