"""How an adapter is asked for: format, rank and dtype, as every download of one takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlencode

from fastapi import Depends, Query

from artifacts.peft_config import MAX_RANK
from storage.downloads import DownloadDtype, DownloadFormat

Format = Annotated[
    DownloadFormat,
    Query(
        alias="format",
        description="peft: a zip of a PEFT directory; safetensors: one file, the stored one where it carries its "
        "configuration; diffusers, kohya, comfy, gguf: one file with the names that these use, gguf for llama.cpp.",
    ),
]
CutRank = Annotated[
    int | None,
    Query(
        alias="rank",
        ge=1,
        le=MAX_RANK,
        description="A smaller rank: of an adapter that was trained for several (its `ranks`, method dylora) that "
        "rank as it was trained; of any other the nearest ΔW of at most this rank.",
    ),
]
Dtype = Annotated[
    DownloadDtype | None, Query(alias="dtype", description="The dtype of the factors; unset: as they are stored.")
]


@dataclass(frozen=True, slots=True)
class DownloadQuery:
    """How an adapter is to be handed out."""

    layout: Format = "peft"
    rank: CutRank = None
    dtype: Dtype = None

    @property
    def text(self) -> str:
        """The query of an address."""
        values = {"format": self.layout, "rank": self.rank, "dtype": self.dtype}
        return urlencode({name: value for name, value in values.items() if value is not None})


Wanted = Annotated[DownloadQuery, Depends()]
