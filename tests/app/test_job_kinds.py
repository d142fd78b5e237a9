"""The table of what can be submitted, and where its errors point."""

from __future__ import annotations

from typing import Any

import pytest

from app.job_kinds import JOB_KINDS, check_submission, pointers_below
from artifacts.errors import FieldError, RequestInvalid, ShapeMismatch
from storage.jobs import CLIENT_UPDATE
from workers.kinds import KINDS


def test_every_kind_that_runs_can_be_submitted_and_no_other() -> None:
    assert set(JOB_KINDS) | {CLIENT_UPDATE} == set(KINDS)
    assert CLIENT_UPDATE not in JOB_KINDS, "a federated training opens its rounds itself"


def submit(server: Any, kind: str, params: dict[str, Any], resources: dict[str, Any] | None = None) -> Any:
    with server.services.database.read() as session:
        return check_submission(server.services.settings, session, kind, params, resources or {})


def test_a_submission_is_as_it_will_be_stored(server: Any, two_adapters: list[str]) -> None:
    found = submit(server, "merge", {"adapters": [{"id": two_adapters[0]}]}, {"devices": 1, "timeout_seconds": None})
    assert found.params == {
        "adapters": [{"id": two_adapters[0], "weight": 1.0}], "method": "lego", "parameters": {}, "name": None,
        "output": "adapter", "base_model": None, "dtype": "auto", "force": False, "target_engine": None,
        "convert": False, "evaluation": None,
    }  # fmt: skip
    assert (found.kind, found.resources, found.affinity) == ("merge", {"devices": 1}, None)
    assert submit(server, "merge", found.params, found.resources) == found, "what was stored can be submitted again"


@pytest.mark.parametrize(
    ("asked", "seconds"), [({}, 600), ({"timeout_seconds": None}, 600), ({"timeout_seconds": 5.0}, 5)]
)
def test_a_load_check_has_an_end_whichever_road_makes_it(
    server: Any, two_adapters: list[str], asked: dict[str, Any], seconds: float
) -> None:
    found = submit(server, "load_check", {"adapter": two_adapters[0], "engine": "peft"}, asked)
    assert found.resources == {"timeout_seconds": seconds}
    assert submit(server, "load_check", found.params, found.resources) == found


@pytest.mark.parametrize(
    ("kind", "changes", "resources", "pointer"),
    [
        ("bake", {}, {}, "/kind"),
        ("merge", {"adapters": []}, {}, "/params/adapters"),
        ("merge", {"adapters": [{"id": "adp_" + "f" * 32}]}, {}, "/params/adapters/0/id"),
        ("merge", {"method": "magic"}, {}, "/params/method"),
        ("merge", {"method": "svd", "parameters": {"rank": 0}}, {}, "/params/parameters/rank"),
        ("merge", {"method": "svd", "parameters": {"rank": 99}}, {}, "/params/parameters/rank"),
        ("merge", {"kind": "merge"}, {}, "/params/kind"),
        ("merge", {}, {"devices": 2}, "/resources/devices"),
        ("merge", {}, {"devices": True}, "/resources/devices"),
        ("merge", {}, {"timeout_seconds": 0}, "/resources/timeout_seconds"),
        ("merge", {}, {"gpus": 1}, "/resources/gpus"),
    ],
)
def test_errors_point_into_the_job(
    server: Any,
    two_adapters: list[str],
    kind: str,
    changes: dict[str, Any],
    resources: dict[str, Any],
    pointer: str,
) -> None:
    params = {"adapters": [{"id": key} for key in two_adapters], **changes}
    with pytest.raises(RequestInvalid) as caught:
        submit(server, kind, params, resources)
    assert pointer in [item.pointer for item in caught.value.errors]


def moved(pointers: list[str], prefix: str, instead_of: str = "") -> list[str]:
    with pytest.raises(ShapeMismatch) as caught, pointers_below(prefix, instead_of):
        raise ShapeMismatch("no", errors=[FieldError(pointer, "wrong") for pointer in pointers])
    return [item.pointer for item in caught.value.errors]


def test_pointers_are_moved_and_names_are_not() -> None:
    pointers = ["/params/a", "/paramsx", "/kind", "", "model.layers.0"]
    assert moved(pointers, "/job") == ["/job/params/a", "/job/paramsx", "/job/kind", "/job", "model.layers.0"]
    assert moved(pointers, "", "/params") == ["/a", "/paramsx", "/kind", "", "model.layers.0"]
