"""The rounds of a remote client, as this machine does them: ask, fetch, train, send, until the training has ended."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from app.cli.client import Client, ProblemError
from artifacts.base_model import BaseModelRef, inspect_base
from artifacts.errors import RequestInvalid
from train.rows import find_format, inspect
from workers.remote_client import is_passing

T = TypeVar("T")
_OVER = frozenset({"state_conflict", "gone"})
"""The round went on without this client."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0


class RemoteRounds:
    """One remote client.

    Args:
        poll: seconds between two questions.
        patience: seconds for which a service that does not answer is asked again.
        tell_loss: whether the mean loss of the steps is sent beside what they made.
        advance: told the share of the rounds that are done, and what is being done.

    Raises:
        RequestInvalid and its kin: the rows or the base model are not what the training takes.
    """

    def __init__(
        self,
        client: Client,
        job_id: str,
        number: int,
        base_model: Path,
        data: Path,
        device: str,
        poll: float,
        patience: float,
        tell_loss: bool,
        advance: Callable[[float, str], None],
    ) -> None:
        self._client = client
        self._path = f"/jobs/{job_id}/clients/{number}"
        self._base, self._data, self._device = base_model, data, device
        self._poll, self._patience, self._tell_loss = poll, patience, tell_loss
        self._advance = advance
        self._format = find_format(data, data.name)
        inspect(data, self._format)
        self._given: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Take part to the end. Returns {training_state, given}: what was taken, round by round.

        Raises:
            ProblemError: the service refuses this client, or what it made; or does not answer for longer than patience.
            RequestInvalid: the base model here is another one.
        """
        with tempfile.TemporaryDirectory(prefix="rankwise-federate-") as folder:
            checked = False
            while True:
                task = self._patiently(lambda: self._client.get(self._path))
                if task["state"] == "over":
                    return {"training_state": task["training_state"], "given": self._given}
                if not checked:
                    self._tell(task, "reading the base model")
                    check_base(inspect_base(self._base), task["base_model"])
                    checked = True
                if task["state"] == "asked":
                    self._do(task, Path(tempfile.mkdtemp(dir=folder)))
                else:
                    self._tell(task, "waiting for the next round")
                    time.sleep(self._poll)

    def _do(self, task: Mapping[str, Any], folder: Path) -> None:
        """The round, unless it ends before this client is done."""
        from safetensors.torch import save_file

        from train.base_files import BaseFiles
        from train.data import DataFile
        from train.federation.remote import train_round

        try:
            self._tell(task, "fetching the adapter")
            wanted = task["wanted"]
            _, adapter = self._patiently(lambda: self._client.download(wanted["adapter"], folder, _nothing))
            self._tell(task, "training")
            base = BaseFiles(task["base_model"]["name"], str(self._base))
            update = train_round(task, adapter, base, DataFile(self._data, self._format), folder, self._device)
            path = folder / "update.safetensors"
            save_file(dict(update.tensors), path)
            form: dict[str, Any] = {"rows": update.rows, "seconds": round(update.seconds, 3)}
            if self._tell_loss and update.loss is not None:
                form["loss"] = update.loss
            self._tell(task, "sending what was trained")
            # The same bytes again are the same update: whether an answer was lost does not matter.
            given, _ = self._patiently(
                lambda: self._client.upload([path], form, lambda _: None, to=wanted["update"], method="PUT")
            )
            self._given.append(given)
        except ProblemError as error:
            if error.problem.get("code") not in _OVER:
                raise
            self._tell(task, "too late")
            time.sleep(self._poll)

    def _tell(self, task: Mapping[str, Any], what: str) -> None:
        rounds = task["parameters"]["rounds"]
        number = task["round"] or 1
        self._advance((number - 1) / rounds, f"round {number} of {rounds}: {what}")

    def _patiently(self, act: Callable[[], T]) -> T:
        """Act, again and again while the service is away."""
        pause, since = _FIRST_PAUSE, time.monotonic()
        while True:
            try:
                return act()
            except ProblemError as error:
                if not _passes(error.problem) or time.monotonic() - since >= self._patience:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _passes(problem: Mapping[str, Any]) -> bool:
    """Whether it goes by itself: the service is restarted or busy, or what it stands on is, or a proxy before it."""
    status = problem.get("status")
    return problem.get("code") == "unreachable" or (isinstance(status, int) and is_passing(status))


def check_base(here: BaseModelRef, wanted: Mapping[str, Any]) -> None:
    """Whether the base model here is the training's, as far as that is known: weights and tokenizer by their digests.

    Raises:
        RequestInvalid: it is another one.
    """
    for what, found in (("weights", here.weights_digest), ("tokenizer", here.tokenizer_digest)):
        asked = wanted[f"{what}_digest"]
        if asked is not None and found != asked:
            raise RequestInvalid(
                f"The base model here has other {what} than the training's, {wanted['name']}: {found}, not {asked}.",
                hint="Take the same folder that the service was given, or the same revision of the hub.",
            )


def _nothing(count: int, total: int | None) -> None:
    """Nobody watches a download that is over in a moment."""
