"""Options of FFA-LoRA. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, model_validator

from artifacts.errors import FieldError
from artifacts.menu import Number
from train.options.common import Circumstances, LowRankOptions

MAX_CLIENTS = 100
MAX_ROUNDS = 10_000
MAX_ROWS = 10**9
Norm = Annotated[Number, Field(gt=0, le=1e9)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Remote(_Part):
    """A client on a machine of its own: it takes the common adapter from the service, trains on rows that it shows
    nobody, and gives back what it trained."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = Field(
        description="What the client is called in reports."
    )
    key: Annotated[str, StringConstraints(pattern=r"^key_[0-9a-f]{32}$")] | None = Field(
        None,
        description="Id of the API key, of the scope `client`, that alone speaks for the client. Unset, only a key of "
        "the scope `admin` does.",
    )
    max_rows: Annotated[StrictInt, Field(ge=1, le=MAX_ROWS)] = Field(
        1_000_000, description="Most rows that it may say it trained on: they are its share of the average."
    )


class Client(_Part):
    """One client: a dataset that is trained on by itself, all its rows, or a machine of its own."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["dataset"], "properties": {"dataset": {"type": "string"}, "remote": {"type": "null"}}},
                {"required": ["remote"], "properties": {"remote": {"type": "object"}, "dataset": {"type": "null"}}},
            ]
        }
    )

    dataset: Annotated[str, StringConstraints(pattern=r"^dat_[0-9a-f]{32}$")] | None = Field(
        None, description="The client's rows (POST /datasets), all of which are trained on."
    )
    remote: Remote | None = Field(None, description="Instead: a client that trains on its own machine.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.dataset is None) == (self.remote is None):
            raise ValueError("give either dataset or remote")
        return self


class Privacy(_Part):
    """DP-SGD on every client. The unit of privacy is one row of one client's dataset, which may be added or removed.

    Clients' datasets are taken to be disjoint, so the ε of the run is the largest of the clients'.
    """

    epsilon: Annotated[Number, Field(gt=0, le=1000)] = Field(
        description="ε that no client's rows exceed over the whole run (arXiv:2403.12313 takes 6, 3 and 1)."
    )
    delta: Annotated[Number, Field(gt=0, lt=1)] = Field(
        1e-5, description="δ; below 1/n of every client with n rows (arXiv:2403.12313: 1e-5)."
    )
    clip_norm: Norm = Field(
        2.0,
        description="C: the gradient of a row, over all trained tensors together, is scaled down to this norm. Public "
        "re-implementations of arXiv:2403.12313 try 2, 5 and 10. It stands in for training.max_grad_norm.",
    )
    noise_multiplier: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        None,
        description="σ: the noise of a step has the standard deviation σ·C. Unset, the smallest with which all rounds "
        "stay within ε. Given, the run stops before the round that would exceed ε.",
    )
    noise_seed: Annotated[StrictInt, Field(ge=0, le=2**32 - 1)] | None = Field(
        None,
        description="For tests only: noise and sampling come from this seed, so that a run can be repeated. Whoever "
        "knows the seed can take the noise away: the run is not private, and its report says so.",
    )


class FfaLoraOptions(LowRankOptions):
    """FFA-LoRA, arXiv:2403.12313: lora_A stays as it was drawn, only lora_B is trained and averaged.

    Without `clients` it is an ordinary training of lora_B on the job's dataset. With them it is federated: each round
    every client trains the common adapter on its own rows, and what comes back is averaged. The job's dataset is then
    the server's: it is measured on before and after, and never trained on.
    """

    clients: Annotated[list[Client], Field(min_length=1, max_length=MAX_CLIENTS)] | None = Field(
        None,
        description="Whose rows are trained on, each by itself (3 in arXiv:2403.12313); one only with `privacy`, which "
        "remote clients can not have.",
    )
    freeze_a: StrictBool = Field(
        True,
        description="false trains and averages lora_A too, each factor by itself: FedAvg-LoRA, to compare with. The "
        "average of products is then not the product of averages.",
    )
    rounds: Annotated[StrictInt, Field(ge=1, le=MAX_ROUNDS)] = Field(
        10, description="T: how often the clients' adapters are averaged (re-implementations: 1,000)."
    )
    local_steps: Annotated[StrictInt, Field(ge=1, le=100_000)] = Field(
        10, description="E: steps of each client in a round (re-implementations: 10)."
    )
    weighting: Literal["rows", "equal"] = Field(
        "rows", description="Share of a client in the average: by its number of rows, or the same for all."
    )
    absent: Literal["fail", "skip"] = Field(
        "fail",
        description="What becomes of the run when a client gives nothing usable in a round: its job failed or was "
        "cancelled (lost), it was not done in time (late), or its tensors are not finite, have other shapes or moved "
        "too far (refused). skip averages the others, whose shares are scaled up to 1.",
    )
    min_clients: Annotated[StrictInt, Field(ge=1, le=MAX_CLIENTS)] = Field(
        1, description="With absent=skip: the run fails when fewer clients than this answer in a round."
    )
    round_seconds: Annotated[Number, Field(gt=0, le=604_800)] = Field(
        86_400.0, description="Seconds from the beginning of a round after which a client that is not done is late."
    )
    max_update_norm: Norm | None = Field(
        None,
        description="Refuse what a client gives when it is farther than this from the round's start: Frobenius norm "
        "over all trained tensors. Unset, only what is not finite is refused.",
    )
    privacy: Privacy | None = Field(None, description="Train with differential privacy (DP-SGD) on every client.")

    @property
    def federated(self) -> bool:
        return self.clients is not None

    @property
    def numerator(self) -> float:
        """The alpha in force; unset, the scaling is 1."""
        return self.alpha if self.alpha is not None else float(self.rank)

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * (d_out if self.freeze_a else d_out + d_in)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.clients is None:
            if self.privacy is not None:
                raise ValueError("privacy needs clients: name the dataset that is private as the only client")
            if not self.freeze_a:
                raise ValueError("freeze_a=false without clients is the method lora")
            return self
        count = len(self.clients)
        _check_apart("a dataset", [client.dataset for client in self.clients])
        _check_apart("the name of a remote client", [client.name for client in self.remotes.values()])
        _check_apart("the key of a remote client", [client.key for client in self.remotes.values()])
        if self.remotes and self.privacy is not None:
            raise ValueError(
                "privacy goes with datasets of this service only: whether a remote client adds noise can not be seen "
                "from here, so no epsilon could be promised"
            )
        if count == 1 and self.privacy is None:
            raise ValueError("a single client is trained without clients, unless with privacy")
        if self.min_clients > count:
            raise ValueError(f"min_clients is {self.min_clients}; there are {count} clients")
        return self

    @property
    def remotes(self) -> dict[int, Remote]:
        """The clients on machines of their own, by their places."""
        found = enumerate(self.clients or ())
        return {number: client.remote for number, client in found if client.remote is not None}

    def trains(self, name: str) -> bool:
        """Whether a tensor of the adapter's file, by its name, is trained, and so leaves a client."""
        return not (self.freeze_a and ".lora_A." in name)

    def problems(self, known: Circumstances) -> list[FieldError]:
        """Of the loop's settings a federated run takes what a client's local steps have."""
        if not self.federated:
            return []
        training = known.training
        refused = {
            "/training/steps": (training.steps is not None, "rounds and local_steps say how long it is"),
            "/training/epochs": (training.epochs is not None, "rounds and local_steps say how long it is"),
            "/training/gradient_accumulation": (
                training.gradient_accumulation != 1,
                "a local step takes one batch: raise batch_size",
            ),
            "/training/precision": (training.precision != "float32", "clients train in float32"),
            "/training/gradient_checkpointing": (training.gradient_checkpointing, "clients do not recompute"),
            "/training/early_stopping": (training.early_stopping is not None, "all rounds are done"),
            "/task/packing": (known.packed, "a client's step counts rows, each by itself"),
        }
        return [FieldError(pointer, f"not in a federated run: {why}") for pointer, (odd, why) in refused.items() if odd]

    def row_problems(self, rows: int, batch_size: int, pointer: str, client: int) -> list[FieldError]:
        """Why the client at that place can not take part with so many rows; `pointer` names them."""
        found = []
        remote = self.remotes.get(client)
        if remote is not None and rows > remote.max_rows:
            found.append(FieldError(pointer, f"has {rows} rows; max_rows of this client is {remote.max_rows}"))
        if rows < batch_size:
            found.append(FieldError(pointer, f"has {rows} rows, fewer than training.batch_size, {batch_size}"))
        if self.privacy is not None and self.privacy.delta * rows >= 1:
            problem = f"must be below 1/{rows}: {pointer} has {rows} rows"
            found.append(FieldError("/parameters/privacy/delta", problem))
        return found

    def warnings(self, known: Circumstances) -> list[str]:
        del known
        if self.privacy is not None and self.privacy.noise_seed is not None:
            return ["privacy.noise_seed is set: the noise can be taken away again, so this run is NOT private."]
        if self.remotes and self.max_update_norm is None:
            return ["max_update_norm is unset: one remote client could move the adapter as far as it likes."]
        return []


def _check_apart(what: str, names: Sequence[str | None]) -> None:
    given = [name for name in names if name is not None]
    if len(set(given)) < len(given):
        raise ValueError(f"clients names {what} twice: each client is one owner's rows")
