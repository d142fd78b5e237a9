"""Parameters that an earlier version took, with numbers as texts: what is stored is still fired, retried and read."""

from __future__ import annotations

from typing import Any

import pytest
from patience import wait_for
from schedule_calls import firings, make_due, url
from sqlalchemy import update

from artifacts.errors import RequestInvalid
from artifacts.menu import accepted_parameters
from storage.tables import ScheduleRow
from transfer.catalog import parse_parameters
from transfer.options import RefreshOptions


def test_a_stored_schedule_is_fired_and_its_job_is_retried(
    server: Any, schedule: dict[str, Any], fake_pool: Any
) -> None:
    params = {**schedule["job"]["params"], "parameters": {"scale": "2"}}
    refused = server.client.post("/merge", json=params)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/parameters/scale")
    changed = {"job": {"kind": "merge", "params": params}}
    etag = server.client.get(url(schedule)).headers["etag"]
    assert server.client.patch(url(schedule), json=changed, headers={"If-Match": etag}).status_code == 422
    with server.services.database.write() as session:
        session.execute(update(ScheduleRow).where(ScheduleRow.id == schedule["id"]).values(job_params=params))
    make_due(server, schedule)
    (entry,) = wait_for(lambda: firings(server, schedule))
    assert entry["outcome"] == "job", entry
    pool = fake_pool(server)
    pool.fail(pool.claim())
    retried = server.client.post(f"/jobs/{entry['job_id']}/retry")
    assert retried.status_code == 202, retried.text
    assert retried.json()["params"]["parameters"] == {"scale": "2"}


def test_parameters_within_parameters_are_read_alike() -> None:
    stored = {"target_parameters": {"alpha": "16"}, "training": {"epochs": "2"}, "answer_tokens": 8}
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("refresh", stored)
    assert [item.pointer for item in caught.value.errors] == ["/parameters/training"]
    with accepted_parameters():
        found = parse_parameters("refresh", stored)
        assert isinstance(found, RefreshOptions)
        assert found.training.epochs == 2.0
        assert found.train_options(("q_proj",)).model_dump()["alpha"] == 16.0
        with pytest.raises(RequestInvalid, match="alpha"):
            parse_parameters("refresh", {"target_parameters": {"alpha": "many"}})
    with pytest.raises(RequestInvalid, match="alpha"):
        parse_parameters("refresh", {"target_parameters": {"alpha": "16"}})
