"""GET /jobs/{id}/pictures: what a finished job shows of its result."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from artifacts.heat_map import HeatMap

RANKS = HeatMap("ranks", "Rank of every layer", ["0", "1"], ["q_proj"], [[1], [7]], unit="ranks")


@pytest.fixture
def job(server: Any, two_adapters: list[str], fake_pool: Any) -> tuple[Any, str]:
    """A job that has ended with a picture in its report."""
    body = {"adapters": [{"id": adapter} for adapter in two_adapters], "method": "cat"}
    job_id = server.client.post("/merge", json=body).json()["id"]
    assert server.client.get(f"/jobs/{job_id}/pictures").json() == {"items": []}
    pool = fake_pool(server)
    result = {"adapters": [], "images": [], "report": {"own": {"pictures": [RANKS.to_dict()]}}}
    pool.succeed(pool.claim(), result)
    return server.client, job_id


def test_pictures_are_listed_and_drawn(job: tuple[Any, str]) -> None:
    client, job_id = job
    link = f"/jobs/{job_id}/pictures/ranks"
    listed = client.get(f"/jobs/{job_id}/pictures").json()
    assert listed == {"items": [{"name": "ranks", "title": "Rank of every layer", "link": link}]}
    response = client.get(link)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("image/svg+xml")
    assert response.text == RANKS.draw()
    assert ElementTree.fromstring(response.text).tag.endswith("svg")


def test_a_picture_that_is_not_there_is_a_problem_that_names_those_that_are(job: tuple[Any, str]) -> None:
    client, job_id = job
    response = client.get(f"/jobs/{job_id}/pictures/weights")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert "has no picture 'weights'" in response.json()["detail"]
    assert response.json()["hint"] == "It has: ranks."
    nobody = "job_" + "0" * 32
    assert client.get(f"/jobs/{nobody}/pictures").status_code == 404
    assert client.get(f"/jobs/{nobody}/pictures/ranks").status_code == 404
    assert client.get(f"/jobs/{job_id}/pictures/Not a name").status_code == 422
