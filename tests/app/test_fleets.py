"""Fleets of transfers over HTTP, without a pool: schedules with a selector, plans, firings adapter by adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from app.chores import chores
from storage import database as clock
from storage.tables import ScheduleRow

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))

FLEET = 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two bases that share their shapes, of one that does not, and of three adapters of the first."""
    from tiny_models import write_adapter, write_gemma, write_llama

    roots = tmp_path_factory.mktemp("roots")
    folders = {
        "roots": roots,
        "old": write_llama(roots / "old"),
        "new": write_llama(roots / "new", seed=5),
        "other": write_gemma(roots / "other"),
    }
    for number in range(FLEET):
        folders[f"adapter{number}"] = write_adapter(folders["old"], roots / f"adapter{number}", seed=number)
    return folders


class Fleet:
    """A server without a pool that knows the bases and the adapters; its chores are the test's to run."""

    def __init__(self, server: Any, folders: dict[str, Path]) -> None:
        self.server, self.client = server, server.client
        self.models = {}
        for name in ("old", "new", "other"):
            made = self.client.post("/models", json={"path": str(folders[name]), "name": name}, timeout=120)
            self.models[name] = made.json()["id"]
        self.adapters = []
        for number in range(FLEET):
            folder = folders[f"adapter{number}"]
            files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            files = [part for part in files if not part[1][0].endswith(".md")]
            fields = {"name": f"orders {number}", "base_model": "old", "tags": "odd" if number % 2 else "even"}
            self.adapters.append(server.upload(files, fields).json()["id"])
        server.services.clockwork.stop()

    def run_chores(self) -> None:
        services = self.server.services
        found = {chore.name: chore for chore in chores(services.settings, services.database, services.blobs)}
        for name in ("retirement", "schedules"):
            found[name].run()

    def body(self, **changes: Any) -> dict[str, Any]:
        job = {
            "kind": "transfer",
            "params": {"target_model": "new", "method": "copy"},
            "selector": {"base_model": "old"},
        }
        return {"name": "move", "trigger": {"cron": "0 3 * * *"}, "job": job | changes.pop("job", {}), **changes}

    def schedule(self, **changes: Any) -> dict[str, Any]:
        response = self.client.post("/schedules", json=self.body(**changes))
        assert response.status_code == 201, response.text
        made: dict[str, Any] = response.json()
        return made

    def make_due(self, schedule: dict[str, Any]) -> None:
        with self.server.services.database.write() as session:
            row = update(ScheduleRow).where(ScheduleRow.id == schedule["id"])
            session.execute(row.values(next_fire_at=clock.now(session)))

    def firing(self, schedule: dict[str, Any], **params: Any) -> dict[str, Any]:
        """The newest firing, in full."""
        path = f"/schedules/{schedule['id']}/firings"
        occurrence = self.client.get(path).json()["items"][0]["occurrence"]
        response = self.client.get(f"{path}/{occurrence}", params=params)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


@pytest.fixture
def fleet(serve: Any, bases: dict[str, Path]) -> Fleet:
    return Fleet(serve(model_roots=(bases["roots"],)), bases)


def test_a_schedule_with_a_selector_moves_every_adapter(fleet: Fleet, fake_pool: Any) -> None:
    made = fleet.schedule(max_parallel=2, window={"from": "00:00", "to": "23:59", "timezone": "UTC"})
    job = made["job"]
    assert job["selector"] == {"base_model": fleet.models["old"], "tags": []}
    assert (job["params"]["target_model"], "adapter" in job["params"]) == (fleet.models["new"], False)
    assert (made["max_parallel"], made["window"]["to"], made["overlap"]) == (2, "23:59", "skip")
    fleet.client.patch(f"/schedules/{made['id']}", json={"window": {"from": "00:00", "to": "00:01"}})
    unplaced = fleet.client.patch(f"/schedules/{made['id']}", json={"overlap": "queue"})
    assert unplaced.status_code == 422
    stays = fleet.client.patch(f"/schedules/{made['id']}", json={"window": None}).json()
    assert (stays["max_parallel"], stays["window"]) == (2, None), "null takes the hours away, and nothing else"
    unset = fleet.client.patch(f"/schedules/{made['id']}", json={"max_parallel": None}).json()
    assert (unset["max_parallel"], unset["window"], unset["version"]) == (8, None, stays["version"] + 1)
    made = fleet.schedule(max_parallel=2)
    fleet.make_due(made)
    fleet.run_chores()
    found = fleet.firing(made)
    assert (found["outcome"], found["job_id"]) == ("fleet", None)
    assert found["fleet"]["states"] == {"queued": 2, "pending": FLEET - 2}
    pool = fake_pool(fleet.server)
    pool.succeed(pool.claim())
    pool.fail(pool.claim())
    fleet.run_chores()
    found = fleet.firing(made)
    assert found["fleet"] == {
        "total": FLEET,
        "finished": False,
        "states": {"succeeded": 1, "failed": 1, "queued": 1},
        "verdicts": {},
    }
    assert sorted(item["adapter"] for item in found["items"]) == sorted(fleet.adapters)
    for item in found["items"]:
        shown = fleet.client.get(f"/jobs/{item['job_id']}").json()
        assert (shown["state"], shown["schedule_id"]) == (item["state"], made["id"])
        assert shown["params"]["adapter"] == item["adapter"]
    first = fleet.firing(made, limit=2)
    rest = fleet.firing(made, limit=2, cursor=first["next"])
    assert [len(page["items"]) for page in (first, rest)] == [2, 1]
    assert rest["next"] is None
    pool.succeed(pool.claim())
    fleet.make_due(made)
    fleet.run_chores()
    again = fleet.firing(made)
    assert again["fleet"]["states"] == {"already": 2, "queued": 1}, "only what failed is moved again"


def test_a_fleet_that_is_triggered(fleet: Fleet) -> None:
    made = fleet.schedule(job={"selector": {"base_model": fleet.models["old"], "tags": ["even"]}})
    path = f"/schedules/{made['id']}/trigger"
    fired = fleet.client.post(path, headers={"Idempotency-Key": "now"})
    assert fired.status_code == 202, fired.text
    assert fired.json()["fleet"]["states"] == {"pending": 2}
    assert fleet.client.get(fired.headers["location"]).json()["fleet"]["total"] == 2
    assert fleet.client.post(path, headers={"Idempotency-Key": "now"}).json() == fired.json()
    assert fleet.client.post(path).status_code == 409
    fleet.run_chores()
    assert fleet.firing(made)["fleet"]["states"] == {"queued": 2}
    assert fleet.client.post(path).status_code == 409
    fleet.client.patch(f"/schedules/{made['id']}", json={"enabled": False})
    for unknown in ("never", "2026-01-01T00:00:00Z"):
        assert fleet.client.get(f"/schedules/{made['id']}/firings/{unknown}").status_code == 404


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"job": {"kind": "merge"}}, "/job/selector"),
    "an adapter": ({"job": {"params": {"target_model": "new", "adapter": "adp_" + "0" * 32}}}, "/job/params/adapter"),
    "seeds": ({"job": {"params": {"target_model": "new", "seeds": ["a", "b", "c"]}}}, "/job/params/seeds"),
    "unknown base": ({"job": {"selector": {"base_model": "nowhere"}}}, "/job/selector/base_model"),
    "unknown target": ({"job": {"params": {"target_model": "nowhere"}}}, "/job/params/target_model"),
    "the same base": ({"job": {"params": {"target_model": "old"}}}, "/job/params/target_model"),
    "unknown method": ({"job": {"params": {"target_model": "new", "method": "teleport"}}}, "/job/params/method"),
    "bad option": (
        {"job": {"params": {"target_model": "new", "method": "copy", "parameters": {"rows": 3}}}},
        "/job/params/parameters/rows",
    ),
    "two devices": ({"job": {"resources": {"devices": 0}}}, "/job/resources/devices"),
    "owner": ({"job": {"selector": {"base_model": "old", "owner": "me"}}}, "/job/selector/owner"),
    "unknown field": ({"job": {"selector": {"base_model": "old", "rank": 4}}}, "/job/selector/rank"),
    "overlap": ({"overlap": "queue"}, "/overlap"),
    "no parallel": ({"max_parallel": 0}, "/max_parallel"),
    "bad window": ({"window": {"from": "22:00", "to": "25:00"}}, "/window/to"),
    "no window": ({"window": {"from": "22:00", "to": "22:00"}}, "/window/to"),
    "zone": ({"window": {"from": "22:00", "to": "23:00", "timezone": "Mars"}}, "/window/timezone"),
}


def test_fleets_that_can_not_be(fleet: Fleet) -> None:
    for name, (changes, pointer) in REFUSED.items():
        refused = fleet.client.post("/schedules", json=fleet.body(**changes))
        assert refused.status_code == 422, (name, refused.text)
        assert pointer in [item["pointer"] for item in refused.json()["errors"]], (name, refused.text)
    assert fleet.client.get("/schedules").json()["items"] == []


def test_a_plan_says_what_would_move_and_what_not_and_why(fleet: Fleet, fake_pool: Any) -> None:
    selector = {"base_model": "old"}
    before = fleet.server.rows()
    copied = fleet.client.post("/transfers/plan", json={"selector": selector, "params": fleet.body()["job"]["params"]})
    assert copied.status_code == 200, copied.text
    plan = copied.json()
    assert (plan["total"], plan["moves"], plan["truncated"], plan["reasons"]) == (FLEET, FLEET, False, {})
    assert (plan["seconds"], plan["measured"]) == (None, 0), "nothing is on record: unknown"
    assert not any(plan["cost"].values()), "copying costs no token"
    lora = {"target_model": "other", "method": "trans-lora"}
    refused = fleet.client.post("/transfers/plan", json={"selector": selector, "params": lora}).json()
    assert (refused["moves"], sum(refused["reasons"].values())) == (0, FLEET)
    assert "seeds" in refused["items"][0]["detail"]
    shapes = fleet.client.post("/transfers/plan", json={"selector": selector, "params": {**lora, "method": "copy"}})
    assert set(shapes.json()["reasons"]) == {"transfer_refused"}
    assert fleet.server.rows() == before, "asking makes nothing"

    made = fleet.schedule(job={"selector": {"base_model": "old", "tags": ["odd"]}})
    path = f"/schedules/{made['id']}/dry-run"
    assert fleet.client.post(path).json()["moves"] == 1
    fleet.client.post(f"/schedules/{made['id']}/trigger")
    fleet.run_chores()
    under_way = fleet.client.post(path).json()
    assert under_way["reasons"] == {"under_way": 1}
    pool = fake_pool(fleet.server)
    pool.succeed(pool.claim())
    judged = fleet.client.post(path).json()
    assert judged["reasons"] == {"already_judged": 1}
    assert judged["items"][0]["job_id"] == under_way["items"][0]["job_id"]
    rest = fleet.client.post("/transfers/plan", json={"selector": selector, "params": fleet.body()["job"]["params"]})
    assert (rest.json()["moves"], rest.json()["measured"]) == (FLEET - 1, 1)
    assert rest.json()["seconds"] >= 0
    one = {"adapter": fleet.adapters[0], "target_model": "new", "method": "copy"}
    plain = fleet.client.post("/schedules", json=fleet.body(job={"selector": None, "params": one})).json()
    assert "selector" not in plain["job"]
    assert fleet.client.post(f"/schedules/{plain['id']}/dry-run").status_code == 409


def test_a_deprecation_starts_a_fleet_and_the_base_waits_for_it(fleet: Fleet) -> None:
    old = fleet.models["old"]
    made = fleet.schedule(trigger={"event": "base_model.deprecated", "subject": old})
    fleet.run_chores()
    assert fleet.client.get(f"/schedules/{made['id']}/firings").json()["items"] == []
    fleet.client.post(f"/models/{old}/deprecate", json={"successor": "new"})
    fleet.run_chores()
    fleet.run_chores()
    assert fleet.firing(made)["fleet"]["states"] == {"queued": FLEET}
    refused = fleet.client.delete(f"/models/{old}")
    assert refused.status_code == 409
    assert f"{FLEET} jobs, {FLEET} adapters" in refused.json()["detail"]
    blocked = fleet.client.get(f"/models/{old}").json()["removal"]["blocked_by"]
    assert blocked == {"jobs": FLEET, "adapters": FLEET}, "the schedule is no reason"
    assert fleet.client.get(f"/models/{fleet.models['new']}").json()["removal"] is None
    target = fleet.client.delete(f"/models/{fleet.models['new']}")
    assert f"/schedules/{made['id']}" in [item["pointer"] for item in target.json()["errors"]]
