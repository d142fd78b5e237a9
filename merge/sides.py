"""The sides of modules whose files do not tell them: a MiSS adapter holds no trace of the width of a layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from artifacts.base_model import Fingerprint, sides_of
from artifacts.errors import FieldError, MergeRefused, ShapeMismatch
from artifacts.manifest import LoraModule

if TYPE_CHECKING:
    from merge.plan import MergeInput

NAMED = 20


def with_sides(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    """The inputs, with the sides of every module: from its base model, else from an adapter of the merge that has it.

    Raises:
        MergeRefused: nothing tells them; the modules are named.
        ShapeMismatch: the base model's layer has sides that the adapter does not fit.
    """
    if all(module.complete for item in inputs for module in item.modules):
        return list(inputs)
    told = {module.path: (module.d_out, module.d_in) for item in inputs for module in item.modules if module.complete}
    others = tuple((path, *sides) for path, sides in told.items())
    return [_completed(position, item, others) for position, item in enumerate(inputs)]


def _completed(position: int, item: MergeInput, others: Fingerprint) -> MergeInput:
    in_base, in_others = sides_of(item.base.fingerprint or ()), sides_of(others)
    modules: list[LoraModule] = []
    unknown: list[str] = []
    misfits: list[FieldError] = []
    for module in item.modules:
        sides = in_base(module.path) or in_others(module.path)
        if module.complete:
            modules.append(module)
        elif sides is None:
            unknown.append(module.path)
        else:
            try:
                modules.append(module.with_sides(*sides))
            except ShapeMismatch as error:
                misfits.append(FieldError(module.path, error.detail))
    if unknown:
        raise MergeRefused(
            f"Adapter {item.id} ({item.name}) is of type {item.method!r}, whose files do not tell the sides of its "
            f"layers, and neither does what is known of its base model {item.base.name}: {', '.join(unknown[:NAMED])}.",
            hint="Register the base model from a folder of the server (POST /models), so that its layers are known.",
            errors=[FieldError(f"/adapters/{position}/id", f"{path}: sides unknown") for path in unknown[:NAMED]],
        )
    if misfits:
        raise ShapeMismatch(
            f"Adapter {item.id} ({item.name}) does not fit {item.base.name}: {misfits[0].message}",
            hint="Name the base model that the adapter was trained on.",
            errors=misfits[:NAMED],
        )
    return replace(item, modules=tuple(modules))
