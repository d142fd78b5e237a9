"""What a reader is: it knows one way of naming modules, and says which module of which part of a model a name means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

DENOISER = ""
"""The UNet or transformer of a pipeline, when the name does not say which of the two."""

LANGUAGE_MODEL = "language_model"
"""A model that is no part of a pipeline, of which no list is stored: its names are transformers' own."""

COMPONENTS = frozenset(
    {
        "unet",
        "transformer",
        "transformer_2",
        "prior",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "connectors",
        "text_conditioner",
        "controlnet",
    }
)
"""What the parts of a pipeline are called in dotted names."""


class Place(NamedTuple):
    """Where a name points to.

    Attributes:
        component: "unet", "transformer", "text_encoder_2" …, or `DENOISER`.
        name: the module's name inside the component, as the file writes it.
        flat: the dots of the path were replaced by underscores, so that only a list of modules can tell the path.
        interleaved: the rows of a head are pairs that are rotated together, side by side as Meta's first implementation
            has them; transformers has the first of all pairs and then the second.
        kept: what a module that no stored architecture has is called; "" if it can not be told from its name.
    """

    component: str
    name: str
    flat: bool = False
    kept: str = ""
    interleaved: bool = False


class Reader(Protocol):
    """One naming of modules."""

    name: str
    """What the format is called in answers and reports."""
    description: str
    """Completes the sentence "it looks like …"."""

    def place(self, stem: str, role: str) -> Place | None:
        """What the stem of a key means; None if it is not of this naming."""
        ...


class Settings(NamedTuple):
    """What a file beside the weights tells of every module.

    Attributes:
        alpha: divided by a module's rank; None where `scaling` is told.
        scaling: what B·A is multiplied by, whatever the rank.
        rank: of every module; None where it is not told.
        head_rows: of one head of attention, whose rows change places where a name says that they are interleaved; 0
            where they do not.
    """

    alpha: float | None = None
    scaling: float | None = None
    rank: int | None = None
    head_rows: int = 0


NOTHING_TOLD = Settings()


@runtime_checkable
class ConfiguredReader(Reader, Protocol):
    """A naming of modules in which the tensors never tell the scaling: a file beside them does."""

    settings_name: str
    """What that file is called."""

    def settings(self, document: Mapping[str, Any]) -> Settings:
        """Raises ConfigRefused: a value is missing or means nothing here."""
        ...
