"""When cron expressions fire: days on which the clocks change, leap days, what is refused, properties over zones."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import RequestInvalid
from storage.timetable import CRON_LIMIT, Timetable, find_zone, zone_names

SEED = 20240916
YEAR = datetime(2026, 1, 1, tzinfo=UTC)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def shown(table: Timetable, moment: datetime, number: int) -> list[str]:
    return [table.local(time).isoformat() for time in table.upcoming(moment, number)]


def test_a_time_that_the_clocks_skip_fires_when_the_gap_ends() -> None:
    """Berlin, 29 March 2026: 01:59:59 is followed by 03:00:00."""
    table = Timetable("30 2 * * *", "Europe/Berlin")
    assert shown(table, utc("2026-03-27T12:00"), 3) == [
        "2026-03-28T02:30:00+01:00",
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
    ]


def test_several_times_in_one_gap_fire_once() -> None:
    table = Timetable("0,15,30,45 2,3 * * *", "Europe/Berlin")
    assert shown(table, utc("2026-03-29T00:00"), 4) == [f"2026-03-29T03:{m}:00+02:00" for m in ("00", "15", "30", "45")]


def test_a_time_that_comes_twice_fires_the_first_time() -> None:
    """Berlin, 25 October 2026: 02:59:59 is followed by 02:00:00."""
    table = Timetable("30 2 * * *", "Europe/Berlin")
    assert shown(table, utc("2026-10-24T12:00"), 2) == ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"]
    for between in ("2026-10-25T00:30", "2026-10-25T00:45", "2026-10-25T01:15", "2026-10-25T01:30", "2026-10-25T02:00"):
        assert table.after(utc(between)) == utc("2026-10-26T01:30"), "not the second 02:30 of that day"


def test_a_star_follows_the_clocks_as_they_are_shown() -> None:
    quarter = Timetable("*/30 * * * *", "Europe/Berlin")
    spring = quarter.upcoming(utc("2026-03-29T00:15"), 4)
    assert [b - a for a, b in pairwise(spring)] == [timedelta(minutes=30)] * 3
    autumn = shown(quarter, utc("2026-10-25T00:15"), 4)
    assert [text[11:16] for text in autumn] == ["02:30", "02:00", "02:30", "03:00"]
    hour = Timetable("*/30 2 * * *", "Europe/Berlin")
    assert hour.after(utc("2026-03-28T12:00")) == utc("2026-03-30T00:00"), "no 02:xx on the day of the gap"


def test_half_an_hour_more_or_less() -> None:
    """Lord Howe Island, 5 April 2026: 01:59:59 is followed by 01:30:00."""
    table = Timetable("*/20 2 * * *", "Australia/Lord_Howe")
    assert shown(table, datetime.fromisoformat("2026-04-05T00:30:00+11:00"), 2) == [
        "2026-04-05T02:00:00+10:30",
        "2026-04-05T02:20:00+10:30",
    ]


def test_the_29th_of_february() -> None:
    table = Timetable("0 12 29 2 *", "UTC")
    assert table.upcoming(utc("2026-01-01"), 3) == [utc(f"{year}-02-29T12:00") for year in (2028, 2032, 2036)]
    assert table.after(utc("2096-03-01")) == utc("2104-02-29T12:00"), "2100 is no leap year"


def test_the_last_days() -> None:
    assert Timetable("0 0 L * *", "UTC").upcoming(utc("2028-01-01"), 2) == [utc("2028-01-31"), utc("2028-02-29")]
    assert Timetable("0 0 * * FRI#1", "UTC").after(utc("2026-11-24")) == utc("2026-12-04")


def test_words() -> None:
    assert Timetable("30 2 * * *", "Europe/Berlin").words() == "At 02:30 every day"
    assert Timetable(" */15  9-17 * * mon-fri ", "UTC").cron == "*/15 9-17 * * mon-fri"


@pytest.mark.parametrize(
    "cron",
    [
        "",
        "* * * *",
        "0 * * * * *",
        "@daily",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 32 * *",
        "* * * 13 *",
        "* * * * 8",
        "* * * * MONDAY",
        "* * * FEBR *",
        "5-1 * * * *",
        "*/0 * * * *",
        "*/x * * * *",
        "1,,2 * * * *",
        "-1 * * * *",
        "1.5 * * * *",
        "٣ * * * *",
        "* * * * MON#6",
        "* * 30 2 *",
        "* * 31 2,4,6,9,11 *",
        "* * * * *" + " " * CRON_LIMIT,
        "1" + "0" * 150 + " * * * *",
    ],
)
def test_what_is_no_cron_expression(cron: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        Timetable(cron, "UTC")
    assert [item.pointer for item in caught.value.errors] == ["/trigger/cron"]


def test_what_never_fires_has_no_time() -> None:
    assert Timetable("0 0 */31 * MON#2", "UTC").after(YEAR) is None
    assert Timetable("0 0 */31 * MON#2", "UTC").upcoming(YEAR, 3) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Europe/Atlantis",
        "../../../etc/passwd",
        "/etc/localtime",
        "Europe/../Europe/Berlin",
        "Europe",
        "Europe/Berlin/",
        "localtime",
        "posixrules",
        "right/UTC",
        "zone.tab",
        "Europe/Berlin\x00",
        "Europe\\Berlin",
        "E" * 100_000,
    ],
)
def test_what_is_no_time_zone(name: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        find_zone(name)
    assert [item.pointer for item in caught.value.errors] == ["/trigger/timezone"]
    assert len(caught.value.detail) < 200


def test_a_zone_in_other_letters_is_named() -> None:
    with pytest.raises(RequestInvalid) as caught:
        find_zone("europe/berlin")
    assert "'Europe/Berlin'" in str(caught.value.hint)


def test_every_zone_loads() -> None:
    assert len(zone_names()) > 400
    for name in zone_names():
        assert isinstance(find_zone(name).utcoffset(YEAR), timedelta)


def _field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    span = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    lists = st.lists(number, min_size=1, max_size=3).map(lambda some: ",".join(map(str, some)))
    steps = st.sampled_from([2, 3, 5, 10, 15, 20]).map(lambda step: f"*/{step}")
    return st.one_of(st.just("*"), number.map(str), span, lists, steps)


CRONS = st.tuples(_field(0, 59), _field(0, 23), _field(1, 28), _field(1, 12), _field(0, 6)).map(" ".join)
DAILY = st.tuples(_field(0, 59), _field(0, 23)).map(lambda pair: f"{pair[0]} {pair[1]} * * *")
ZONES = st.sampled_from(sorted(zone_names()))
MOMENTS = st.datetimes(datetime(2025, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cron=CRONS, zone=ZONES, moment=MOMENTS)
def test_times_strictly_increase_in_utc(cron: str, zone: str, moment: datetime) -> None:
    table = Timetable(cron, zone)
    times = [moment, *table.upcoming(moment, 6)]
    assert all(earlier < later for earlier, later in pairwise(times))
    assert all(time.utcoffset() == timedelta() and time.second == time.microsecond == 0 for time in times[1:])
    assert table.words()


def transitions(zone: str) -> list[datetime]:
    """The hours of 2026 in which the offset changes."""
    found, moment = [], YEAR
    tz = find_zone(zone)
    while moment.year == 2026:
        later = moment + timedelta(hours=1)
        if moment.astimezone(tz).utcoffset() != later.astimezone(tz).utcoffset():
            found.append(later)
        moment = later
    return found


CHANGES = {
    zone: changes
    for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo", "America/Havana",
                 "Asia/Beirut", "Antarctica/Troll", "America/Santiago", "Africa/Casablanca", "Atlantic/Azores")
    if (changes := transitions(zone))
}  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cron=DAILY, zone=st.sampled_from(sorted(CHANGES)), seed=st.integers(0, 2**32))
def test_it_does_not_matter_from_where_one_looks(cron: str, zone: str, seed: int) -> None:
    """From any moment before a time, that time comes next: a server that looks late sees what the others saw."""
    chance = random.Random(seed)
    table = Timetable(cron, zone)
    start = chance.choice(CHANGES[zone]) + timedelta(seconds=chance.randrange(-20_000, 20_000))
    found = table.after(start)
    assert found is not None
    for _ in range(5):
        between = start + (found - start) * chance.random()
        if between < found:
            assert table.after(between) == found


def instants(day: date, hour: int, minute: int, tz: tzinfo) -> datetime:
    """What a time of day means on one day, by the definition: the first of two, or the end of the gap."""
    naive = datetime(day.year, day.month, day.day, hour, minute)  # noqa: DTZ001
    while True:
        moment = naive.replace(tzinfo=tz, fold=0).astimezone(UTC)
        if moment.astimezone(tz).replace(tzinfo=None) == naive:
            return moment
        naive += timedelta(minutes=1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    hours=st.sets(st.integers(0, 23), min_size=1, max_size=4),
    minutes=st.sets(st.integers(0, 59), min_size=1, max_size=4),
    zone=st.sampled_from(sorted(CHANGES)),
    which=st.integers(0, 9),
)
def test_fixed_times_are_as_defined(hours: set[int], minutes: set[int], zone: str, which: int) -> None:
    """Against an independent definition, around a change of the clocks."""
    table = Timetable(f"{','.join(map(str, minutes))} {','.join(map(str, hours))} * * *", zone)
    change = CHANGES[zone][which % len(CHANGES[zone])]
    start, end = change - timedelta(days=1, hours=7), change + timedelta(days=1, hours=5)
    days = [change.date() + timedelta(days=shift) for shift in range(-3, 4)]
    expected = sorted({instants(day, hour, minute, table.zone) for day in days for hour in hours for minute in minutes})
    found = [time for time in table.upcoming(start, 60) if time <= end]
    assert found == [time for time in expected if start < time <= end]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cron=CRONS, moment=MOMENTS, length=st.integers(0, 40 * 86400))
def test_latest_and_count_agree_with_walking(cron: str, moment: datetime, length: int) -> None:
    table = Timetable(cron, "Europe/Berlin")
    first = table.after(moment)
    assert first is not None
    until = first + timedelta(seconds=length)
    walked = [first]
    while len(walked) < 300 and (later := table.after(walked[-1])) is not None and later <= until:
        walked.append(later)
    assert table.count(first, until, 300) == len(walked)
    if len(walked) < 300:
        assert table.latest(first, until) == walked[-1]


def test_years_of_minutes_are_not_walked_through() -> None:
    table = Timetable("* * * * *", "Europe/Berlin")
    until = YEAR + timedelta(days=3650, seconds=30)
    assert table.latest(YEAR, until) == until - timedelta(seconds=30)
    assert table.count(YEAR, until, 1001) == 1001
