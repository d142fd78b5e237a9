"""Where concepts shall be, as the user says: boxes and masks. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from artifacts.errors import FieldError
from artifacts.menu import NO_NUL
from compose.options.common import Share
from compose.png_mask import MAX_BYTES, MAX_SIDE, MAX_TEXT, MaskUnreadable, read_mask

MAX_BOXES = 16


class Box(BaseModel):
    """A rectangle in fractions of the image's sides, from its left upper corner."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    left: Share
    top: Share
    right: Share
    bottom: Share

    def problems(self, pointer: str) -> list[FieldError]:
        """What is wrong with it."""
        found = []
        for first, second in (("left", "right"), ("top", "bottom")):
            if getattr(self, first) >= getattr(self, second):
                found.append(FieldError(f"{pointer}/{second}", f"{second} must be above {first}"))
        return found


class Place(BaseModel):
    """Where one concept is: inside any of the boxes, or where a mask is white."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boxes: Annotated[list[Box], Field(min_length=1, max_length=MAX_BOXES)] | None = Field(
        None, description="Rectangles in fractions of the image's sides."
    )
    png: Annotated[str, StringConstraints(max_length=MAX_TEXT, pattern=NO_NUL)] | None = Field(
        None,
        description=f"A PNG in base64, at most {MAX_BYTES} bytes and {MAX_SIDE} pixels a side, white where the concept "
        "is; it is stretched over the image.",
    )

    def problems(self, pointer: str) -> list[FieldError]:
        """What is wrong with it: both or nothing given, boxes that are none, a mask that is empty or unreadable."""
        if (self.boxes is None) == (self.png is None):
            return [FieldError(pointer, "must have either boxes or png")]
        if self.boxes is not None:
            return [item for index, box in enumerate(self.boxes) for item in box.problems(f"{pointer}/boxes/{index}")]
        try:
            mask = read_mask(self.png or "")
        except MaskUnreadable as error:
            return [FieldError(f"{pointer}/png", f"the mask {error}")]
        return [] if mask.getbbox() else [FieldError(f"{pointer}/png", "the mask has no white pixel")]
