"""What a federated run is between two rounds: the common adapter, and what is known of the clients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.layout import WEIGHTS_NAME
from train.federation.accounting import spent
from train.options.ffa_lora import FfaLoraOptions

TENSORS, STATE = WEIGHTS_NAME, "run.json"
LISTED = 20
"""Absences that the report names."""


@dataclass(frozen=True, slots=True)
class ClientFacts:
    """A client.

    Attributes:
        rows: n, those that are trained on; of a remote client what it said last, and 0 before that.
        noise_multiplier, rate: σ and q of its steps; 0 without privacy.
        private_steps: noisy steps so far, of every round in which something of it may have left it.
    """

    rows: int
    noise_multiplier: float = 0.0
    rate: float = 0.0
    private_steps: int = 0

    def epsilon(self, delta: float, more: int = 0) -> float:
        """ε that is spent, or would be after so many more steps."""
        return spent(self.noise_multiplier, delta, self.rate, self.private_steps + more)


@dataclass(frozen=True, slots=True)
class RunState:
    """Attributes:
    tensors: of the adapter, by the names of PEFT's file: lora_A as drawn, lora_B as last averaged.
    round: how many rounds are done.
    before: the scores of the base model on the server's rows, as lists; None if nothing is measured.
    seconds: of the clients' steps, all together.
    absences: {round, client, why} of the first `LISTED` clients that gave nothing usable, and how many there were.
    stopped: why the run ends before its last round.
    """

    tensors: Mapping[str, Tensor]
    clients: tuple[ClientFacts, ...]
    round: int = 0
    before: Mapping[str, Any] | None = None
    seconds: float = 0.0
    final_loss: float | None = None
    absent: int = 0
    absences: tuple[Mapping[str, Any], ...] = field(default=())
    stopped: str | None = None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.tensors), folder / TENSORS, metadata={"format": "pt"})
        document = {name: getattr(self, name) for name in _PLAIN}
        document |= {"clients": [asdict(client) for client in self.clients], "absences": list(self.absences)}
        (folder / STATE).write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
        clients = tuple(ClientFacts(**item) for item in document.pop("clients"))
        return cls(
            tensors=load_file(folder / TENSORS),
            clients=clients,
            absences=tuple(document.pop("absences")),
            **document,
        )

    def trained(self, options: FfaLoraOptions) -> dict[str, Tensor]:
        """The tensors that clients train and give back."""
        return {name: value for name, value in self.tensors.items() if options.trains(name)}

    def epsilon(self, delta: float, more: int = 0) -> float:
        """ε of the run: clients' rows are disjoint, so the largest of theirs (parallel composition)."""
        return max(client.epsilon(delta, more) for client in self.clients)

    def budget_problem(self, options: FfaLoraOptions) -> str | None:
        """Why another round must not begin."""
        if options.privacy is None:
            return None
        wanted = self.epsilon(options.privacy.delta, options.local_steps)
        if wanted <= options.privacy.epsilon:
            return None
        return (
            f"round {self.round + 1} would spend ε = {wanted:.4g}; privacy.epsilon allows {options.privacy.epsilon:g}"
        )

    def with_rows(self, rows: Mapping[int, int]) -> RunState:
        """With the numbers of rows that these clients trained on last."""
        clients = [replace(client, rows=rows.get(number, client.rows)) for number, client in enumerate(self.clients)]
        return replace(self, clients=tuple(clients))

    def with_private_steps(self, numbers: Mapping[int, int]) -> RunState:
        """After so many more noisy steps of these clients."""
        clients = [
            replace(client, private_steps=client.private_steps + numbers.get(number, 0))
            for number, client in enumerate(self.clients)
        ]
        return replace(self, clients=tuple(clients))


_PLAIN = ("round", "before", "seconds", "final_loss", "absent", "stopped")
