"""Which layers an adapter gets, and whether the rank fits them. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

from artifacts.errors import FieldError, RequestInvalid
from train.options.common import Circumstances, Target, TrainOptions
from train.settings import TaskSettings

# The ends of paths in a checkpoint: of what looks like a linear layer and is none, and of output heads.
EMBEDDINGS = frozenset(
    {
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embeddings",
        "shared",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
HEADS = frozenset({"classifier", "embed_out", "lm_head", "score"})
_SHOWN = 20


def resolve_targets(
    linear: Mapping[str, tuple[int, int]], wanted: Literal["all-linear"] | Sequence[str]
) -> list[Target]:
    """The layers that are meant, sorted by path; a name means every layer whose path is it or ends with it.

    A first component that a whole path has, and the base model's path has not, makes no difference.

    Args:
        linear: path → (d_out, d_in) of the base model's layers.

    Raises:
        RequestInvalid: a name that no layer has; the names that the base model has are listed.
    """
    if wanted == "all-linear":
        found = {path for path in linear if path.rpartition(".")[2] not in EMBEDDINGS | HEADS}
    else:
        found = set()
        problems = []
        for position, name in enumerate(wanted):
            hits = {path for path in linear if path == name or path.endswith(f".{name}")}
            # Classes with a head, and pipelines, put a component before the paths of the checkpoint.
            hits = hits or {name.partition(".")[2]} & linear.keys()
            found |= hits
            if not hits:
                problems.append(
                    FieldError(
                        f"/parameters/target_modules/{position}",
                        f"no linear layer is called {name!r}{_near(name, linear)}",
                    )
                )
        if problems:
            raise RequestInvalid(
                f"The base model has no linear layer called {wanted[_position(problems[0])]!r}.",
                hint=f"Its layers: {', '.join(leaves(linear))}.",
                errors=problems,
            )
    if not found:
        raise RequestInvalid(
            "The base model has no linear layer that could be adapted.",
            errors=[FieldError("/parameters/target_modules", "no layer is left")],
        )
    return [Target(path, *linear[path]) for path in sorted(found)]


def wanted_targets(linear: Mapping[str, tuple[int, int]], options: TrainOptions, task: TaskSettings) -> list[Target]:
    """The layers that the request names; if it names none, those that the task adapts; none if the method adapts none.

    Raises:
        RequestInvalid: as `resolve_targets`.
    """
    if not options.adapts_layers:
        return []
    named = "target_modules" in options.model_fields_set
    return resolve_targets(linear, options.target_modules if named else task.default_targets)


def check_rank(options: TrainOptions, targets: Sequence[Target]) -> None:
    """Refuse a rank above the smaller side of a weight.

    Raises:
        RequestInvalid: at the parameter that holds it, naming the layer.
    """
    rank = options.largest_rank
    if rank is None or not targets:
        return
    smallest = min(targets, key=lambda target: min(target.d_out, target.d_in))
    limit = min(smallest.d_out, smallest.d_in)
    if rank > limit:
        name = "rank" if "rank" in type(options).model_fields else "initial_rank"
        sides = f"{smallest.d_out}×{smallest.d_in}"
        problem = f"rank {rank} is above {limit}, the smaller side of {smallest.path} ({sides})"
        raise RequestInvalid(
            f"{problem[0].upper()}{problem[1:]}.",
            hint=f"Take a rank of at most {limit}, or leave that layer out of target_modules.",
            errors=[FieldError(f"/parameters/{name}", problem)],
        )


def check_method(options: TrainOptions, known: Circumstances) -> None:
    """Refuse what the method can not do with these layers and settings.

    Raises:
        RequestInvalid: with every finding.
    """
    check_rank(options, known.targets)
    problems = [*_embeddings(known.targets), *options.problems(known)]
    if problems:
        first = problems[0].message
        raise RequestInvalid(f"{first[0].upper()}{first[1:].rstrip('.')}.", errors=problems)


def _embeddings(targets: Sequence[Target]) -> list[FieldError]:
    """Tables that are looked up, not multiplied by."""
    return [
        FieldError("/parameters/target_modules", f"{target.path} is an embedding and no linear layer")
        for target in targets
        if target.path.rpartition(".")[2] in EMBEDDINGS
    ]


def leaves(linear: Mapping[str, tuple[int, int]]) -> list[str]:
    """The ends of the paths, each once, sorted; at most twenty."""
    return sorted({path.rpartition(".")[2] for path in linear})[:_SHOWN]


def _near(name: str, linear: Mapping[str, tuple[int, int]]) -> str:
    close = difflib.get_close_matches(name.rpartition(".")[2], leaves(linear), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _position(problem: FieldError) -> int:
    return int(problem.pointer.rpartition("/")[2])
