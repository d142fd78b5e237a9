"""When a cron expression fires in a time zone: in UTC, strictly increasing, whatever the zone's clocks do.

The zones are those of the pinned `tzdata` package, not of the machine: servers of one database must agree on them.
An expression that names its minute and its hour fires once on the days on which the clocks change: a time that is
skipped fires when the gap ends, one that comes twice fires the first time. With a `*` in the minute or the hour it
follows the clock as it is shown: skipped times do not fire, and those that come twice fire twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from artifacts.errors import FieldError, RequestInvalid

CRON_LIMIT = 200
_FIRST_WINDOW = timedelta(hours=1)


@cache
def zone_names() -> frozenset[str]:
    """All IANA names of time zones, such as `Europe/Berlin`."""
    listed = (resources.files("tzdata") / "zones").read_text(encoding="utf-8")
    return frozenset(name for name in listed.splitlines() if name)


@cache
def _zone(name: str) -> ZoneInfo:
    with resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def find_zone(name: str) -> ZoneInfo:
    """The time zone with this IANA name.

    Raises:
        RequestInvalid: there is none; only names that are in the list are ever looked up.
    """
    if name in zone_names():
        return _zone(name)
    shown = name[:64]
    close = next((known for known in zone_names() if known.casefold() == name.casefold()), None)
    raise RequestInvalid(
        f"there is no time zone {shown!r}",
        hint=f"Write it {close!r}." if close else "Use an IANA name such as Europe/Berlin or UTC.",
        errors=[FieldError("/trigger/timezone", f"{shown!r} is not the IANA name of a time zone")],
    )


class Timetable:
    """The times of a cron expression of five fields (minute, hour, day of month, month, day of week) in a time zone.

    Raises:
        RequestInvalid: an expression that can not be parsed, or an unknown time zone.
    """

    def __init__(self, cron: str, timezone: str) -> None:
        self.cron = " ".join(cron.split())
        self.zone = find_zone(timezone)
        fields = len(self.cron.split())
        if len(cron) > CRON_LIMIT or not self.cron.isascii():
            raise _cron_invalid(f"must be at most {CRON_LIMIT} ASCII characters")
        if fields != 5:
            raise _cron_invalid(f"has {fields} fields; five are needed: minute, hour, day, month, day of week")
        try:
            self._start(datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise _cron_invalid(f"{cron[:80]!r} is not a cron expression: {str(error).lower()}") from error

    def words(self) -> str:
        """The expression in English, e.g. "At 02:30 every day"."""
        return self._start(datetime(2000, 1, 1, tzinfo=UTC)).explain()

    def after(self, moment: datetime) -> datetime | None:
        """The first time later than `moment`, in UTC; None if there is none within fifty years."""
        found = self._next(moment)
        while found is not None and self._shifts_by_a_part_of_an_hour(moment, found):
            # The parser goes in whole hours and so may come into this one at its middle: look from its beginning.
            hour = self.local(found).replace(minute=0).astimezone(UTC)
            closer = self._next(max(moment, hour - timedelta(seconds=1)))
            if closer is None or closer >= found:
                break
            found = closer
        return found

    def upcoming(self, moment: datetime, number: int) -> list[datetime]:
        """The next `number` times later than `moment`, in UTC."""
        return list(islice(self._following(moment), number))

    def local(self, time: datetime) -> datetime:
        """The time as the clocks of the zone show it."""
        return time.astimezone(self.zone)

    def latest(self, first: datetime, until: datetime) -> datetime:
        """The last time not later than `until`; `first` if none is behind it.

        Costs no more for years than for hours: it looks back ever farther until it meets a time.
        """
        window = _FIRST_WINDOW
        while True:
            start = max(first, until - window)
            found = first if start == first else None
            for time in self._following(start):
                if time > until:
                    break
                found = time
            if found is not None:
                return found
            window *= 2

    def count(self, first: datetime, until: datetime, limit: int) -> int:
        """How many times there are from `first`, which is one of them, to `until`; counting ends at `limit`."""
        counted = 1
        for time in self._following(first):
            if time > until or counted >= limit:
                break
            counted += 1
        return counted

    def _following(self, moment: datetime) -> Iterator[datetime]:
        time = self.after(moment)
        while time is not None:
            yield time
            time = self.after(time)

    def _next(self, moment: datetime) -> datetime | None:
        # A time that the clocks show twice may come out of the parser before `moment`.
        times = (time.astimezone(UTC) for time in self._start(moment))
        return next((time for time in times if time > moment), None)

    def _shifts_by_a_part_of_an_hour(self, before: datetime, after: datetime) -> bool:
        """As the clocks of Lord Howe Island do, by half an hour."""
        offsets = [self.local(time).utcoffset() or timedelta() for time in (before - timedelta(hours=1), after)]
        return bool((offsets[1] - offsets[0]) % timedelta(hours=1))

    def _start(self, moment: datetime) -> CronSim:
        return CronSim(self.cron, moment.astimezone(self.zone))


def _cron_invalid(problem: str) -> RequestInvalid:
    return RequestInvalid(
        f"cron {problem}",
        hint='For example "0 3 * * *" (at 03:00 every day) or "*/15 9-17 * * MON-FRI".',
        errors=[FieldError("/trigger/cron", problem)],
    )
