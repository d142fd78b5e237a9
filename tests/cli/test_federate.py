"""`rankwise federate`, without training: whom it waits for, and what ends it. Whole rounds are in tests/app."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.cli import remote_rounds
from app.cli.client import ProblemError
from app.cli.remote_rounds import RemoteRounds, check_base
from artifacts.base_model import BaseModelRef
from artifacts.errors import RequestInvalid

OVER = {"state": "over", "training_state": "succeeded"}
BASE = {"name": "base", "weights_digest": None, "tokenizer_digest": None}
ASKED = {"state": "asked", "round": 1, "parameters": {"rounds": 2}, "base_model": BASE, "wanted": {"adapter": "/a"}}
STATUSES = {"not_ready": 503, "internal_error": 500, "not_rankwise": 502, "quota_exceeded": 429, "not_found": 404}


class Scripted:
    """A service of few words: each question gets the next answer."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def get(self, path: str) -> Any:
        assert path == "/jobs/job_1/clients/2"
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise ProblemError({"code": answer, "detail": answer, "status": STATUSES.get(answer)})
        return answer

    def download(self, *_: Any) -> Any:
        return self.get("/jobs/job_1/clients/2")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept, on a clock that passes only so."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=found.append, monotonic=lambda: sum(found))
    monkeypatch.setattr(remote_rounds, "time", clock)
    return found


@pytest.fixture
def rounds(tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RemoteRounds]:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 + 1 =", "completion": "2"}\n')
    here = BaseModelRef("base", "path", str(tmp_path))
    monkeypatch.setattr(remote_rounds, "inspect_base", lambda path: here)

    def make(*answers: Any) -> RemoteRounds:
        client: Any = Scripted(*answers)
        return RemoteRounds(client, "job_1", 2, tmp_path, data, "cpu", 3.0, 5.0, True, lambda *_: None)

    return make


def test_it_waits_for_a_service_that_is_away_but_not_for_ever(
    rounds: Callable[..., RemoteRounds], slept: list[float]
) -> None:
    for away in ("unreachable", *(code for code in STATUSES if code != "not_found")):
        assert rounds(away, away, OVER).run() == {"training_state": "succeeded", "given": []}
        assert slept == [0.5, 1.0]
        slept.clear()
    with pytest.raises(ProblemError, match="unreachable"):
        rounds(*["unreachable"] * 9).run()
    assert 5.0 <= sum(slept) < 10.0


def test_a_round_that_went_on_without_it_is_no_reason_to_leave(
    rounds: Callable[..., RemoteRounds], slept: list[float]
) -> None:
    for code in ("state_conflict", "gone"):
        slept.clear()
        assert rounds(ASKED, code, {**ASKED, "state": "late"}, OVER).run()["given"] == []
        assert slept == [3.0, 3.0]


def test_a_refusal_ends_it(rounds: Callable[..., RemoteRounds]) -> None:
    for script in (("not_found",), (ASKED, "file_broken")):
        with pytest.raises(ProblemError, match=script[-1]):
            rounds(*script).run()


def test_another_base_model_is_refused(rounds: Callable[..., RemoteRounds]) -> None:
    with pytest.raises(RequestInvalid, match="other weights than the training's"):
        rounds({**ASKED, "base_model": {**BASE, "weights_digest": "a" * 64}}).run()
    here = BaseModelRef("base", "path", "/x", weights_digest="a" * 64, tokenizer_digest="b" * 64)
    check_base(here, {**BASE, "weights_digest": "a" * 64})
    with pytest.raises(RequestInvalid, match="other tokenizer"):
        check_base(here, {**BASE, "weights_digest": "a" * 64, "tokenizer_digest": "c" * 64})
