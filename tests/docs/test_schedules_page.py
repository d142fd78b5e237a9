"""The page on schedules: its bodies are taken by the service, its tables name what exists, its times are right."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from app.schemas.merge import MergeParams
from app.schemas.schedules import EventType, Misfire, Outcome, Overlap, ScheduleRequest
from merge.catalog import parse_parameters
from storage.domain_events import EVENT_TYPES
from storage.schedules import MISFIRES, OVERLAPS
from storage.timetable import Timetable


@pytest.fixture(scope="session")
def page(root: Path) -> str:
    return (root / "docs" / "how-to" / "schedules.md").read_text(encoding="utf-8")


def documents(page: str, option: str) -> list[Any]:
    counted = iter(range(1000))
    return [
        json.loads(re.sub(r"adp_…", lambda _: f"adp_{next(counted):032x}", text))
        for text in re.findall(rf"{option} '(\{{.*?\}})'", page, re.DOTALL)
    ]


def test_the_bodies_are_accepted(page: str) -> None:
    bodies, params = documents(page, "--json"), documents(page, "--params")
    assert bodies
    assert params
    params += [ScheduleRequest.model_validate(body).job.params for body in bodies]
    for item in params:
        merge = MergeParams.model_validate(item)
        parse_parameters(merge.method, merge.parameters)


def test_the_tables_name_every_choice(page: str) -> None:
    first = set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    assert first == {*OVERLAPS, *MISFIRES, *EVENT_TYPES, *get_args(Outcome)}


def test_the_interface_offers_what_is_stored() -> None:
    assert get_args(Overlap) == OVERLAPS
    assert get_args(Misfire) == MISFIRES
    assert get_args(EventType) == EVENT_TYPES


def test_the_command_line_offers_the_same() -> None:
    from app.cli import schedules

    assert tuple(item.value for item in schedules.Overlap) == OVERLAPS
    assert tuple(item.value for item in schedules.Misfire) == MISFIRES
    assert tuple(item.value for item in schedules.Event) == EVENT_TYPES


def test_what_the_page_says_of_changing_clocks() -> None:
    daily = Timetable("30 2 * * *", "Europe/Berlin")
    for year in (2026, 2027, 2028):
        times = [daily.local(time) for time in daily.upcoming(datetime(year, 1, 1, tzinfo=UTC), 365)]
        assert len({time.date() for time in times}) == len(times), "once a day"
        odd = [time for time in times if (time.hour, time.minute) != (2, 30)]
        assert [(time.month, time.weekday(), time.hour, time.minute) for time in odd] == [(3, 6, 3, 0)]


def test_every_expression_on_the_page_is_one(page: str) -> None:
    found = re.findall(r"[`'\"]((?:[\d*/,A-Z#-]+ ){4}[\d*/,A-Z#-]+)[`'\"]", page)
    assert len(found) >= 5
    for cron in found:
        assert Timetable(cron, "UTC").words()
