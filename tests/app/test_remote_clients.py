"""Remote clients of federated trainings over HTTP: what they are told, what is taken of them, and what is refused."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remote_training import START, TRAINED, RemoteTraining, update
from safetensors.numpy import load, save
from sqlalchemy import update as change

from app.federations import settle_federations
from storage import federations, jobs, keys
from storage.conditions import AWAITING
from storage.database import now
from storage.sweep import sweep_blobs
from storage.tables import ClientUpdateRow
from train.catalog import parse_parameters
from train.options.ffa_lora import FfaLoraOptions

B = "x.lora_B.weight"
REMOTE = {"name": "site-0", "max_rows": 1000}


@pytest.fixture
def training(server: Any, tmp_path: Path) -> RemoteTraining:
    """Two remote clients, of which nothing has come in the first round."""
    found = RemoteTraining(server, tmp_path)
    answer = found.submit()
    assert answer.status_code == 202, answer.text
    found.open_round()
    return found


@pytest.fixture(scope="module")
def unanswered(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> RemoteTraining:
    """The same for tests after which it still waits."""
    found = RemoteTraining(module_servers(), tmp_path_factory.mktemp("unanswered"))
    found.submit()
    found.open_round()
    return found


def waits(training: RemoteTraining) -> bool:
    with training.server.services.database.read() as session:
        return jobs.get_job(session, training.id).available_at == AWAITING


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert (answer.status_code, found["code"]) == (status, code), answer.text
    return found


def test_a_client_is_told_what_to_do_and_gives_what_it_trained(training: RemoteTraining) -> None:
    task = training.task()
    assert (task["state"], task["round"], task["name"]) == ("asked", 1, "site-0")
    assert task["base_model"]["hub_id"] == "acme/tiny"
    assert task["training"]["batch_size"] == 4
    assert task["parameters"]["rounds"] == 2
    assert task["parameters"]["clients"] == [{"remote": REMOTE}, {"remote": {"name": "client-1"}}]
    wanted = task["wanted"]
    assert {name: item["shape"] for name, item in wanted["tensors"].items()} == {
        name: list(value.shape) for name, value in TRAINED.items()
    }
    assert (wanted["min_rows"], wanted["max_rows"], wanted["max_norm"]) == (4, 1000, 50.0)
    adapter = training.http.get(wanted["adapter"])
    given = load(adapter.content)
    assert {name: value.tolist() for name, value in given.items()} == {n: v.tolist() for n, v in START.items()}
    head = training.http.head(wanted["adapter"])
    assert int(head.headers["content-length"]) == len(adapter.content)

    problem(training.give(update(0.125, **{B: None})), 422, "file_broken")  # another try is taken
    answer = training.give(update())
    assert answer.status_code == 201, answer.text
    told = answer.json()
    assert told["norm"] == pytest.approx(np.sqrt(14 * 0.25))
    assert (told["rows"], told["bytes"], told["round"]) == (40, len(update()), 1)
    assert waits(training)
    again = training.give(update())
    assert (again.status_code, again.json()) == (200, told)
    assert training.give(update(), seconds=9.0).json() == told
    task = training.task()
    assert (task["state"], task["given"], task["wanted"]) == ("answered", told, None)
    assert training.give(update(), client=1, rows=8, loss=1.5).status_code == 201
    assert not waits(training)  # the last one has answered
    (first,) = training.http.get(f"/jobs/{training.id}/rounds").json()["items"]
    assert [(c["state"], c["rows"], c["loss"], c["job_id"]) for c in first["clients"]] == [
        ("answered", 40, None, None),
        ("answered", 8, 1.5, None),
    ]
    # Two clients may give the same bytes; they stay until they are averaged.
    assert sweep_blobs(training.server.services.database, training.server.services.blobs, timedelta(0)).deleted == ()
    assert training.server.staged() == []


def big(shape: list[int]) -> bytes:
    return update(**{B: np.zeros(shape, "<f4")})


def spoiled(value: float) -> np.ndarray[Any, Any]:
    found = np.zeros((4, 2), "<f4")
    found[2, 1] = value
    return found


@pytest.mark.parametrize(
    ("content", "fields", "pointer", "message"),
    [
        pytest.param(None, {}, "/file", "is missing", id="no file"),
        pytest.param(update(), {"rows": None}, "/rows", "required", id="no rows"),
        pytest.param(update(), {"rows": "many"}, "/rows", "integer", id="rows that are no number"),
        pytest.param(update(), {"rows": 0}, "/rows", "greater", id="no rows at all"),
        pytest.param(update(), {"rows": 3}, "/rows", "fewer than training.batch_size", id="rows below a batch"),
        pytest.param(update(), {"rows": 1001}, "/rows", "max_rows of this client is 1000", id="too many rows"),
        pytest.param(update(), {"loss": "nan"}, "/loss", "finite", id="a loss that is not finite"),
        pytest.param(update(), {"loss": 1e300}, "/loss", "less", id="a loss that no model has"),
        pytest.param(update(), {"loss": -1}, "/loss", "greater", id="a negative loss"),
        pytest.param(update(), {"seconds": -1}, "/seconds", "greater", id="negative seconds"),
        pytest.param(update(), {"colour": "red"}, "/colour", "unknown field", id="an unknown field"),
        pytest.param(update(**{B: None}), {}, f"/file/{B}", "is missing", id="a tensor is missing"),
        pytest.param(update(**{"a/b": np.zeros(1)}), {}, "/file/a~1b", "is not asked for", id="one too many"),
        pytest.param(
            update(**{"x.lora_A.weight": START["x.lora_A.weight"]}), {}, "/file/x.lora_A.weight", "asked", id="lora_A"
        ),
        pytest.param(big([2, 4]), {}, f"/file/{B}", "has the shape [2, 4], not [4, 2]", id="another shape"),
        pytest.param(update(**{B: np.zeros((4, 2))}), {}, f"/file/{B}", "is F64, not F32", id="another type"),
        pytest.param(update(**{B: spoiled(np.nan)}), {}, f"/file/{B}", "the first at [2, 1]", id="NaN"),
        pytest.param(update(**{B: spoiled(-np.inf)}), {}, f"/file/{B}", "not finite", id="infinite"),
        pytest.param(update(20.0), {}, "/file", "farther than max_update_norm, 50", id="too far away"),
    ],
)
def test_a_bad_update_is_refused_at_its_place(
    unanswered: RemoteTraining, content: bytes | None, fields: dict[str, Any], pointer: str, message: str
) -> None:
    blobs = unanswered.server.blob_count()
    answer = unanswered.give(content, **fields)
    found = answer.json()
    assert answer.status_code == 422, answer.text
    assert [item["pointer"] for item in found["errors"]] == [pointer], found
    assert message in found["errors"][0]["message"]
    assert unanswered.task()["state"] == "asked"
    assert unanswered.server.staged() == []
    assert unanswered.server.blob_count() == blobs


def test_all_odd_tensors_are_named_at_once(unanswered: RemoteTraining) -> None:
    found = problem(unanswered.give(save({"z": np.zeros(1, "<f4")})), 422, "file_broken")
    assert [item["pointer"] for item in found["errors"]] == [f"/file/{name}" for name in (*sorted(TRAINED), "z")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle",
        update()[:-1],
        update() + b"\0",
        b"\xff" * 8 + b"{",
        (9).to_bytes(8, "little") + b"not json!",
    ],
)
def test_what_is_no_safetensors_file_is_refused(unanswered: RemoteTraining, content: bytes) -> None:
    problem(unanswered.give(content), 422, "file_broken")
    assert unanswered.task()["state"] == "asked"


def test_a_body_that_is_too_large_or_no_form_is_refused(unanswered: RemoteTraining) -> None:
    large = b"\0" * (unanswered.task()["wanted"]["max_bytes"] + 1)
    found = problem(unanswered.give(large), 413, "too_large")
    assert found["errors"][0]["pointer"] == "/file"
    problem(unanswered.give(large + b"\0" * 2 * 1024**2), 413, "too_large")  # before all of it has come
    path = f"{unanswered.path()}/update"
    problem(unanswered.http.put(path, json={"rows": 3}), 415, "unsupported_media")
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(unanswered.http.put(path, content=b"--x\r\nbroken", headers=broken), 400, "malformed_request")
    assert unanswered.server.staged() == []


def test_other_bytes_or_rows_after_an_answer_are_a_conflict(training: RemoteTraining) -> None:
    assert training.give(update()).status_code == 201
    for answer in (training.give(update(0.25)), training.give(update(), rows=41), training.give(b"\0" * 2**22)):
        problem(answer, 409, "state_conflict")
    assert training.give(update()).status_code == 200


def test_rounds_and_clients_that_are_not_there(training: RemoteTraining) -> None:
    problem(training.give(update(), round_=2), 404, "not_found")
    problem(training.give(update(), client=2), 404, "not_found")
    problem(training.http.get(f"{training.path(0, 2)}/adapter"), 404, "not_found")
    problem(training.http.get(f"/jobs/job_{'0' * 32}/clients/0"), 404, "not_found")
    found = problem(training.http.get(f"/jobs/{training.id}/clients/100"), 422, "invalid_request")
    assert found["errors"][0]["pointer"] == "/path/client"


def test_an_answer_outlasts_its_round_and_an_old_round_takes_nothing_new(training: RemoteTraining) -> None:
    first = training.give(update()).json()
    training.give(update(), client=1)
    training.open_round(1)
    assert training.task()["round"] == 2
    again = training.give(update())  # a client that did not get the answer
    assert (again.status_code, again.json()) == (200, first)
    problem(training.give(update(0.25)), 409, "state_conflict")
    problem(training.http.get(f"{training.path(0, 1)}/adapter"), 409, "state_conflict")
    assert training.give(update(0.25), round_=2).status_code == 201


def pass_the_deadline(training: RemoteTraining) -> None:
    with training.server.services.database.write() as session:
        passed = now(session) - timedelta(seconds=1)
        session.execute(change(ClientUpdateRow).where(ClientUpdateRow.state == "pending").values(deadline=passed))


def test_a_late_client_is_refused_before_and_after_it_was_noticed(training: RemoteTraining) -> None:
    training.give(update())
    pass_the_deadline(training)
    found = problem(training.give(update(), client=1), 409, "state_conflict")
    assert "it ended at" in found["detail"]
    assert waits(training)
    settle_federations(training.server.services.database)
    assert not waits(training)
    found = problem(training.give(update(), client=1), 409, "state_conflict")
    assert "counts as late" in found["detail"]
    assert training.task(1)["state"] == "late"
    assert "not done at" in training.task(1)["reason"]


def test_no_client_is_told_of_another_that_has_its_own_name(server: Any, tmp_path: Path) -> None:
    training = RemoteTraining(server, tmp_path)
    clients = [{"remote": {"name": name}} for name in ("client-1", "client-2", "b")]
    assert training.submit(clients=clients).status_code == 202
    training.open_round(clients=3)
    for number in range(3):
        parameters = training.task(number)["parameters"]
        names = [client["remote"]["name"] for client in parameters["clients"]]
        assert names[number] == clients[number]["remote"]["name"]
        options = parse_parameters("ffa-lora", parameters)  # as the client itself does
        assert isinstance(options, FfaLoraOptions)
        assert len(options.remotes) == 3


@pytest.mark.parametrize("last", [True, False])
def test_what_clients_gave_is_gone_with_a_training_that_ends_without_averaging(
    training: RemoteTraining, last: bool
) -> None:
    training.give(update())
    if last:
        training.give(update(0.25), client=1)
    else:
        pass_the_deadline(training)
        settle_federations(training.server.services.database)
    assert not waits(training)
    assert training.http.post(f"/jobs/{training.id}/cancel").status_code == 200
    settle_federations(training.server.services.database)
    with training.server.services.database.read() as session:
        assert [row.sha256 for row in federations.updates_of(session, training.id, 0)] == [None, None]
        assert federations.unsettled(session) == []


def test_a_training_that_has_ended_takes_nothing(training: RemoteTraining) -> None:
    told = training.give(update()).json()
    assert training.http.post(f"/jobs/{training.id}/cancel").status_code == 200
    problem(training.give(update(), client=1), 410, "gone")
    settle_federations(training.server.services.database)
    problem(training.give(update(), client=1), 410, "gone")
    problem(training.give(update(0.25)), 410, "gone")
    assert training.give(update()).json() == told
    assert (training.task()["state"], training.task()["training_state"]) == ("over", "cancelled")
    with training.server.services.database.read() as session:
        assert [row.sha256 for row in federations.updates_of(session, training.id, 0)] == [None, None]


@pytest.fixture
def guarded(serve: Any, tmp_path: Path) -> tuple[RemoteTraining, list[dict[str, str]], list[str]]:
    """A training of two clients with keys of their own, at a server that asks for keys; their headers and ids."""
    server = serve(api_keys=True, log_level="info")
    with server.services.database.write() as session:
        _, admin = keys.create_key(session, "admin", ["admin"])
        made = [keys.create_key(session, f"site-{number}", ["client"]) for number in range(3)]
        ids = [row.id for row, _ in made]
    found = RemoteTraining(server, tmp_path, {"Authorization": f"Bearer {admin}"})
    return found, [{"Authorization": f"Bearer {secret}"} for _, secret in made], ids


def test_each_client_has_a_key_of_its_own(
    guarded: tuple[RemoteTraining, list[dict[str, str]], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    training, headers, ids = guarded
    assert training.submit((ids[0], ids[1])).status_code == 202
    training.open_round()
    assert training.task(0, headers[0])["name"] == "site-0"
    for client, key in ((1, 0), (0, 1), (0, 2)):
        path = training.path(client)
        problem(training.http.get(f"/jobs/{training.id}/clients/{client}", headers=headers[key]), 404, "not_found")
        problem(training.http.get(f"{path}/adapter", headers=headers[key]), 404, "not_found")
        problem(training.give(update(), client, headers=headers[key]), 404, "not_found")
    problem(training.http.get(f"/jobs/{training.id}", headers=headers[0]), 403, "scope_missing")
    problem(training.http.get("/adapters", headers=headers[0]), 403, "scope_missing")
    nobody = {"Authorization": "Bearer nothing"}
    problem(training.give(update(), headers=nobody), 401, "unauthenticated")
    assert training.give(update(), headers=headers[0]).status_code == 201
    assert training.give(update(), 1).status_code == 201  # an administrator may speak for anybody
    with training.server.services.database.write() as session:
        keys.revoke_key(session, ids[0])
    problem(training.give(update(), headers=headers[0]), 401, "unauthenticated")
    assert f"{training.path()}/update" in caplog.text
    assert not any(item["Authorization"].removeprefix("Bearer ") in caplog.text for item in headers)


def test_keys_that_can_not_speak_are_refused_when_submitted(
    guarded: tuple[RemoteTraining, list[dict[str, str]], list[str]],
) -> None:
    training, _, ids = guarded
    with training.server.services.database.write() as session:
        reader, _ = keys.create_key(session, "reader", ["read"])
        keys.revoke_key(session, ids[2])
        wrong = reader.id
    found = problem(training.submit((wrong, ids[2])), 422, "invalid_request")
    assert {item["pointer"]: item["message"] for item in found["errors"]} == {
        "/parameters/clients/0/remote/key": "has not the scope client; it has read",
        "/parameters/clients/1/remote/key": "can not be used: the API key 'site-2' was revoked",
    }
    found = problem(training.submit((f"key_{'0' * 32}", ids[1])), 422, "invalid_request")
    assert "there is no API key" in found["errors"][0]["message"]
    found = problem(training.submit((ids[0], ids[0])), 422, "invalid_request")
    assert "the key of a remote client twice" in found["errors"][0]["message"]


def test_no_epsilon_is_promised_for_clients_whose_noise_nobody_sees(server: Any, tmp_path: Path) -> None:
    training = RemoteTraining(server, tmp_path)
    found = problem(training.submit(privacy={"epsilon": 3.0}), 422, "invalid_request")
    assert "no epsilon could be promised" in found["errors"][0]["message"]
