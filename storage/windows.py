"""Hours of the day, by the clocks of a time zone, in which something may happen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time
from typing import Any, Self

from artifacts.errors import FieldError, RequestInvalid
from storage.timetable import find_zone

_CLOCK = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
POINTER = "/window"


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` (included) to `end` (not included), every day; over midnight if `end` comes first.

    Attributes:
        timezone: IANA name.
    """

    start: time
    end: time
    timezone: str

    @classmethod
    def parse(cls, start: str, end: str, timezone: str) -> Self:
        """Times as "22:00". Raises RequestInvalid: not such times, equal ones, or an unknown time zone."""
        try:
            find_zone(timezone)
        except RequestInvalid as error:
            errors = [FieldError(f"{POINTER}/timezone", item.message) for item in error.errors]
            raise RequestInvalid(error.detail, hint=error.hint, errors=errors) from error
        found = cls(_clock(start, f"{POINTER}/from"), _clock(end, f"{POINTER}/to"), timezone)
        if found.start == found.end:
            raise _invalid(f"{POINTER}/to", "is the beginning: leave the window out if every hour will do")
        return found

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The window that `document` was made of."""
        return cls.parse(document["from"], document["to"], document["timezone"])

    def document(self) -> dict[str, str]:
        """As JSON."""
        return {"from": f"{self.start:%H:%M}", "to": f"{self.end:%H:%M}", "timezone": self.timezone}

    def is_open(self, moment: datetime) -> bool:
        """Whether the clocks show a time inside of it."""
        shown = moment.astimezone(find_zone(self.timezone)).time().replace(tzinfo=None)
        if self.start < self.end:
            return self.start <= shown < self.end
        return shown >= self.start or shown < self.end


def _clock(text: str, pointer: str) -> time:
    found = _CLOCK.fullmatch(text)
    if found is None:
        raise _invalid(pointer, f"must be a time of day such as 22:00, not {text[:20]!r}")
    return time(int(found[1]), int(found[2]))


def _invalid(pointer: str, problem: str) -> RequestInvalid:
    return RequestInvalid(f"{pointer} {problem}", errors=[FieldError(pointer, problem)])
