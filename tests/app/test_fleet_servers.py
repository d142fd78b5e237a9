"""Two servers of one database retire a base model: its adapters are moved by real workers, by a clock that jumps."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import wait_for
from sqlalchemy import select

from storage import database as clock
from storage.tables import DomainEventRow, FiringItemRow, FiringRow, JobRow

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))
sys.path.insert(0, str(Path(__file__).parent.parent / "chaos"))

ADAPTERS = 5
DEADLINE = 240.0
PAUSE = 0.2  # a question is a whole answer of a server, on the cores that do the work
DAY = timedelta(days=1)


class Site:
    """Two servers, the first of which is asked, and the clock of the database that they share."""

    def __init__(self, serve: Any, under: Any, folder: Path, roots: Path, **settings: Any) -> None:
        import chaos_clock

        self.under = under
        shared = {"database_url": under.url, "blob_url": (folder / "blobs").as_uri(), "model_roots": (roots,)}
        self.servers = [serve(**{"pool": "local", "devices": "cpu:1", **shared, **settings}) for _ in range(2)]
        self.client = self.servers[0].client
        self.database = self.servers[0].services.database
        if under.clock_file is not None:
            for server in self.servers:
                chaos_clock.follow(server.services.database.engine, under.clock_file)
                server.services.database.engine.dispose()  # connections that are open do not follow

    def now(self) -> datetime:
        with self.database.read() as session:
            return clock.now(session)

    def jump_to(self, moment: datetime) -> None:
        """Only while nothing runs: a lease would end on the way."""
        self.under.jump((moment - self.now()).total_seconds())

    def post(self, path: str, body: Any, status: int = 201) -> Any:
        response = self.client.post(path, json=body, timeout=120)
        assert response.status_code == status, response.text
        return response.json()

    def upload(self, folder: Path, name: str) -> str:
        files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir()) if path.suffix != ".md"]
        response = self.servers[0].upload(files, {"name": name, "base_model": "old"})
        assert response.status_code == 201, response.text
        found: str = response.json()["id"]
        return found

    def fleet(self, schedule: str) -> dict[str, Any]:
        """The only firing of a schedule, once all of it has ended."""
        path = f"/schedules/{schedule}/firings"

        def finished() -> Any:
            firings = self.client.get(path).json()["items"]
            if not firings:
                return None
            found = self.client.get(f"{path}/{firings[0]['occurrence']}").json()
            return found if found["fleet"]["finished"] else None

        found: dict[str, Any] = wait_for(finished, seconds=DEADLINE, pause=PAUSE)
        assert len(self.client.get(path).json()["items"]) == 1
        return found


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def under(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A database with all tables, whose clock the test sets."""
    import chaos_databases

    from storage.database import Database

    server = chaos_databases.PostgresServer() if request.param == "postgres" else None
    if server is None:
        found: Any = chaos_databases.SqliteUnderChaos(tmp_path, tmp_path / "clock")
    else:
        found = chaos_databases.PostgresUnderChaos(server, "fleets")
    database = Database(found.url)
    database.upgrade()
    database.dispose()
    yield found
    if server is not None:
        server.close()


@pytest.fixture
def site(under: Any, serve: Any, tmp_path: Path) -> Site:
    (tmp_path / "roots").mkdir()
    return Site(serve, under, tmp_path, tmp_path / "roots")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_base_model_is_retired(site: Site, tmp_path: Path) -> None:
    from tiny_models import write_adapter, write_llama

    roots = tmp_path / "roots"
    bases = {"old": write_llama(roots / "old"), "new": write_llama(roots / "new", seed=5)}
    models = {name: site.post("/models", {"path": str(path), "name": name})["id"] for name, path in bases.items()}
    adapters = [
        site.upload(write_adapter(bases["old"], tmp_path / f"adapter{number}", seed=number), f"orders {number}")
        for number in range(ADAPTERS)
    ]
    rows = "".join(f'{{"prompt": "ship {number} mugs", "completion": " no {number}"}}\n' for number in range(24))
    holdout = site.client.post("/datasets", files=[("file", ("rows.jsonl", rows.encode()))]).json()["id"]
    job = {
        "kind": "transfer",
        "params": {"target_model": "new", "method": "copy", "holdout": holdout},
        "selector": {"base_model": "old", "without_transfer_to": True},
    }
    nightly = site.post("/schedules", {"trigger": {"cron": "0 3 * * *"}, "job": job, "max_parallel": 2})
    waiting = {"event": "base_model.deprecated", "subject": models["old"]}
    at_the_end = site.post("/schedules", {"trigger": waiting, "job": job})["id"]
    assert site.post(f"/schedules/{nightly['id']}/dry-run", None, 200)["moves"] == ADAPTERS
    refused = site.client.delete(f"/models/{models['old']}")
    assert (refused.status_code, len(refused.json()["errors"])) == (409, ADAPTERS)

    site.jump_to(datetime.fromisoformat(nightly["next_fire_at"]) + timedelta(seconds=1))
    found = site.fleet(nightly["id"])
    assert found["outcome"] == "fleet"
    assert found["fleet"] == {
        "total": ADAPTERS,
        "finished": True,
        "states": {"succeeded": ADAPTERS},
        "verdicts": {"pass": ADAPTERS},
    }
    new = {item["adapter"]: item["new_adapter"] for item in found["items"]}
    assert sorted(new) == sorted(adapters)
    for old_id, new_id in new.items():
        assert site.client.get(f"/adapters/{new_id}").json()["model_id"] == models["new"]
        [edge] = site.client.get(f"/adapters/{new_id}/lineage").json()["edges"]
        assert edge["parent"] == old_id

    # One more comes late; then the dates pass, and the event moves it.
    late = site.upload(write_adapter(bases["old"], tmp_path / "late", seed=99), "late")
    site.client.patch(f"/schedules/{nightly['id']}", json={"enabled": False})
    ahead = site.now() + DAY
    plan = {"deprecate_at": ahead.isoformat(), "remove_at": (ahead + DAY).isoformat(), "successor": "new"}
    site.post(f"/models/{models['old']}/deprecate", plan, 200)
    site.jump_to(ahead + timedelta(seconds=1))
    found = site.fleet(at_the_end)
    assert [item["adapter"] for item in found["items"]] == [late]
    assert found["fleet"]["verdicts"] == {"pass": 1}
    shown = site.client.get(f"/models/{models['old']}").json()
    assert (shown["removal"], shown["removed_at"]) == ({"blocked_by": {}}, None)
    site.jump_to(ahead + DAY + timedelta(seconds=1))
    wait_for(lambda: site.client.get(f"/models/{models['old']}").json()["removed_at"], seconds=DEADLINE, pause=PAUSE)
    nowhere = {"adapter": late, "target_model": "old", "method": "seeds-only"}
    assert site.client.post("/transfer", json=nowhere).status_code == 422

    with site.database.read() as session:
        moved = Counter(params["adapter"] for params in session.scalars(select(JobRow.params)))
        items = Counter(session.scalars(select(FiringItemRow.adapter_id)))
        assert len(session.scalars(select(FiringRow.occurrence)).all()) == 2
        events = Counter(session.scalars(select(DomainEventRow.type)))
    assert moved == items == Counter([*adapters, late]), "one job for each adapter and firing"
    assert events == {"base_model.registered": 2, "base_model.deprecated": 1, "base_model.removed": 1}
    assert site.now().astimezone(UTC) > ahead


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("key", ["same", None])
def test_a_transfer_asked_of_two_servers_at_once_is_one_job(
    under: Any, serve: Any, tmp_path: Path, key: str | None
) -> None:
    """With an idempotency key all get the first one's answer; without, the job's own key tells that it is the same."""
    from tiny_models import write_adapter, write_llama

    roots = tmp_path / "roots"
    roots.mkdir()
    site = Site(serve, under, tmp_path, roots, pool="off")
    for seed, name in enumerate(("old", "new")):
        site.post("/models", {"path": str(write_llama(roots / name, seed=seed)), "name": name})
    adapter = site.upload(write_adapter(roots / "old", tmp_path / "adapter"), "orders")
    body = {"adapter": adapter, "target_model": "new", "method": "copy"}
    headers = {} if key is None else {"Idempotency-Key": key}
    together = threading.Barrier(8)

    def ask(number: int) -> Any:
        with httpx.Client(base_url=site.servers[number % 2].url, timeout=120, trust_env=False) as client:
            together.wait()
            return client.post("/transfer", json=body, headers=headers)

    with ThreadPoolExecutor(together.parties) as threads:
        answers = list(threads.map(ask, range(together.parties)))
    assert Counter(answer.status_code for answer in answers) == ({202: 8} if key else {202: 1, 200: 7})
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == (7 if key else 0)
    [job] = {answer.json()["id"] for answer in answers}
    with site.database.read() as session:
        assert list(session.scalars(select(JobRow.id))) == [job]
