"""What a registration of a base model refers to: a name on the hub, or a folder that the operator has opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from app.schemas.models import ModelRequest
from artifacts.base_model import BaseModelRef, inspect_base
from artifacts.errors import FieldError, RequestInvalid


def reference(body: ModelRequest, roots: Sequence[Path]) -> BaseModelRef:
    """The base model that `body` describes. A folder is read and hashed; a hub id needs no network.

    Raises:
        RequestInvalid: a path outside of `roots`, or a folder that holds no model.
    """
    if body.path is not None:
        folder = resolve_under(body.path, roots)
        return _renamed(inspect_base(folder), body.name)
    assert body.hub_id is not None
    return BaseModelRef(
        name=body.name or body.hub_id,
        source="hub",
        location=body.hub_id,
        revision=body.revision,
        architecture=None,
        weights_digest=None,
        tokenizer_digest=None,
        fingerprint=None,
    )


def _renamed(ref: BaseModelRef, name: str | None) -> BaseModelRef:
    return ref if name is None else replace(ref, name=name)


def resolve_under(path: str, roots: Sequence[Path]) -> Path:
    """The real folder behind `path`, every symbolic link followed, if it lies under one of `roots`.

    What does not exist and what is not allowed get the same answer, so that nobody can probe the server's disk.

    Raises:
        RequestInvalid
    """
    given = Path(path)
    if given.is_absolute():
        try:
            real = given.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            real = None
        if real is not None and real.is_dir() and any(real.is_relative_to(_real_root(root)) for root in roots):
            return real
    allowed = ", ".join(map(str, roots)) or "none, since RANKWISE_MODEL_ROOTS is not set"
    raise RequestInvalid(
        f"{path[:200]!r} is not a folder under one of the server's model roots.",
        hint=f"Give an absolute path of a folder; allowed roots: {allowed}.",
        errors=[FieldError("/path", "is not a folder under an allowed root")],
    )


def _real_root(root: Path) -> Path:
    return root.resolve()
