"""Trying again, ever more seldom, and telling it once."""

from __future__ import annotations

from structlog.testing import capture_logs

from workers.outage import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Outage


def test_the_pauses_double_up_to_a_limit_and_start_anew_after_success() -> None:
    outage, now, pauses = Outage(), 0.0, []
    for _ in range(8):
        outage.begin(now, "gone")
        began = now
        while not outage.may_try(now):
            now += 0.0625
        pauses.append(now - began)
    assert pauses[:4] == [FIRST_WAIT_SECONDS * factor for factor in (1, 2, 4, 8)]
    assert pauses[-1] == LONGEST_WAIT_SECONDS
    outage.end()
    assert outage.may_try(now)
    outage.begin(now, "gone")
    assert not outage.may_try(now)
    assert outage.may_try(now + FIRST_WAIT_SECONDS)


def test_an_outage_is_told_once_and_its_end_with_its_length() -> None:
    outage = Outage()
    with capture_logs() as logs:
        outage.end()
        for moment in (0.0, 1.0, 2.0):
            outage.begin(moment, "gone")
        outage.may_try(8.0)
        outage.end()
        outage.end()
    assert [(entry["event"], entry.get("seconds")) for entry in logs] == [
        ("database_outage", None),
        ("database_outage_over", 8.0),
    ]
