"""The parts of a federated training: what the server does before the rounds and after them, what a client does in one.

Each part runs in a process of its own, and knows the others by `RunState` and by what clients give back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import set_seed

from artifacts.errors import FieldError, RequestInvalid
from train.base_files import BaseFiles
from train.catalog import find_method
from train.data import DataFile, Examples
from train.engine import Plan, check_plan
from train.evaluation import Scores, compare
from train.federation.accounting import ACCOUNTANT, noise_for, spent
from train.federation.local_steps import LocalPlan, Noise, seed_of, train_locally
from train.federation.state import ClientFacts, RunState
from train.methods.peft_adapter import adapter_tensors, put_adapter_tensors, write_adapter
from train.options.common import Circumstances
from train.options.ffa_lora import FfaLoraOptions
from train.protocol import MethodContext
from train.reload import check_reload
from train.report import MemoryMeter, TrainReport
from train.tasks.catalog import make_task
from train.tasks.protocol import Task, TaskContext
from train.tasks.rows import IGNORED

METADATA = "ffa_lora"
UNIT = "one row of one client's dataset, added or removed (example-level; the server sees noisy tensors only)"
_PROBES = 4


@dataclass(frozen=True, slots=True)
class Update:
    """What a client gives back in a round.

    Attributes:
        loss: mean of its steps; None with privacy, which the loss of private rows has not been paid for.
    """

    tensors: Mapping[str, Tensor]
    rows: int
    seconds: float
    loss: float | None


class Federation:
    """One run, as one of its processes sees it."""

    def __init__(self, plan: Plan, base: BaseFiles, folder: Path) -> None:
        assert isinstance(plan.options, FfaLoraOptions)
        self.plan = plan
        self.options: FfaLoraOptions = plan.options
        self.task: Task[Any] = make_task(plan.task, TaskContext(base, plan.training, plan.device, plan.seed, folder))

    def begin(self, server: DataFile, clients: Sequence[DataFile | None]) -> RunState:
        """Draw lora_A from the seed, measure the base model, look at every client's rows and settle its noise.

        Args:
            clients: None for a remote one, whose rows nobody here sees.

        Raises:
            FileBroken, RequestInvalid: a dataset, the layers or the privacy do not fit.
        """
        measured = self._measured(server)
        rows = [
            0 if file is None else len(self._client_rows(file, number, "dataset"))
            for number, file in enumerate(clients)
        ]
        model = self.task.load()
        known, _ = check_plan(self.plan, model, measured, self.task.whole(model), 1)
        before = self._scores(model, measured)
        trainable = self._prepared(model, known)
        facts = tuple(self._facts(count, number) for number, count in enumerate(rows))
        tensors = adapter_tensors(trainable)
        _check_frozen(tensors)
        state = RunState(tensors, facts, before=None if before is None else before.to_lists())
        problem = state.budget_problem(self.options)
        if problem is not None:
            raise RequestInvalid(
                f"Not one round fits the privacy that was asked for: {problem}.",
                hint="Raise noise_multiplier, or take fewer local steps.",
                errors=[FieldError("/parameters/privacy/noise_multiplier", problem)],
            )
        return state

    def update(self, state: RunState, client: int, data: DataFile, tick: Callable[[], None] = lambda: None) -> Update:
        """What the client makes of the common adapter in the next round.

        Args:
            tick: called before each step; raises to stop.

        Raises:
            RequestInvalid: it has fewer usable rows than a batch, or more than it may have.
            FileBroken: its rows can not be read.
        """
        examples = self._client_rows(data, client, "remote" if client in self.options.remotes else "dataset")
        model = self.task.load()
        known, _ = check_plan(self.plan, model, Examples(examples, (), {}), self.task.whole(model), 1)
        trainable = self._prepared(model, known)
        put_adapter_tensors(trainable, dict(state.tensors))
        began = time.monotonic()
        loss = train_locally(trainable, examples, self._losses, self._local_plan(state, client), tick)
        seconds = time.monotonic() - began
        tensors = adapter_tensors(trainable)
        given = {name: value for name, value in tensors.items() if self.options.trains(name)}
        return Update(given, len(examples), seconds, loss)

    def finish(self, state: RunState, server: DataFile, output: Path) -> TrainReport:
        """Write the adapter, load it onto a fresh base model, compare and measure it there.

        Raises:
            ReloadMismatch: the written adapter does not predict what the common one does.
        """
        meter = MemoryMeter(self.plan.device)
        measured = self._measured(server)
        model = self.task.load()
        known, needed = check_plan(self.plan, model, measured, self.task.whole(model), 1)
        trainable = self._prepared(model, known)
        put_adapter_tensors(trainable, dict(state.tensors))
        trainable.eval()
        probes = measured.train[:_PROBES]
        expected = self.task.predict(trainable, probes)
        config: Any = trainable.peft_config["default"]  # type: ignore[index]
        own = self._told(state)
        write_adapter(output, state.tensors, config, {METADATA: json.dumps(own, sort_keys=True)})
        del model, trainable
        method = find_method(self.plan.method).load(self.options)
        fresh, reload = check_reload(self.task, partial(self.task.reload, method.reload), output, probes, expected)
        evaluation: dict[str, Any] = {}
        after = self._scores(fresh, measured)
        if state.before is not None and after is not None:
            before = self.task.scores_of(state.before)
            evaluation = {
                "before": before.to_dict(),
                "after": after.to_dict(),
                "difference": compare(before, after, self.plan.evaluation, self.plan.seed),
            }
        return TrainReport(
            method=self.plan.method,
            steps=state.round * self.options.local_steps,
            resumed_at=0,
            seconds=round(state.seconds, 3),
            tokens_per_second=None,
            final_loss=state.final_loss,
            trainable_parameters=sum(value.numel() for value in state.trained(self.options).values()),
            target_modules=len(known.targets),
            peak_memory=meter.peak(),
            estimate=needed.to_dict(),
            data=measured.report | {"client_rows": [client.rows for client in state.clients]},
            evaluation=evaluation,
            reload=reload.to_dict(),
            own=own | {"absent": state.absent, "absences": list(state.absences), "stopped": state.stopped},
            warnings=self.options.warnings(known),
        )

    def epsilons(self, state: RunState) -> list[float]:
        """ε that each client has spent; none without privacy."""
        privacy = self.options.privacy
        return [] if privacy is None else [client.epsilon(privacy.delta) for client in state.clients]

    def _told(self, state: RunState) -> dict[str, Any]:
        """What the file itself says of its making: the same for the same run."""
        told: dict[str, Any] = {
            "rounds": state.round,
            "local_steps": self.options.local_steps,
            "clients": len(state.clients),
            "seed": self.plan.seed,
            "lora_A_sha256": digest_of(state.tensors) if self.options.freeze_a else None,
            "upload_bytes": sum(value.numel() * value.element_size() for value in state.trained(self.options).values()),
        }
        privacy = self.options.privacy
        if privacy is None:
            return told
        return told | {
            "privacy": {
                "private": privacy.noise_seed is None,
                "unit": UNIT,
                "epsilon": state.epsilon(privacy.delta),
                "epsilon_limit": privacy.epsilon,
                "delta": privacy.delta,
                "clip_norm": privacy.clip_norm,
                "accountant": ACCOUNTANT,
                "clients": [
                    {
                        "epsilon": client.epsilon(privacy.delta),
                        "noise_multiplier": client.noise_multiplier,
                        "sampling_rate": client.rate,
                        "steps": client.private_steps,
                    }
                    for client in state.clients
                ],
            }
        }

    def _read(self, file: DataFile) -> Examples:
        """All rows, none held out."""
        return self.task.read(file, self.plan.evaluation.model_copy(update={"validation_fraction": 0.0}))

    def _measured(self, file: DataFile) -> Examples:
        """The server's rows: nothing is trained on them."""
        found = self._read(file)
        return Examples(found.train[: self.plan.evaluation.max_rows], (), {"server": found.report})

    def _scores(self, model: nn.Module, measured: Examples) -> Scores | None:
        if self.plan.evaluation.validation_fraction == 0:
            return None
        return self.task.score(model, measured.train, self.plan.evaluation, lambda _: None)

    def _client_rows(self, file: DataFile, number: int, source: str) -> tuple[Any, ...]:
        """What a client trains on. Raises RequestInvalid: too few rows, or too many for it or for δ."""
        rows = self._read(file).train
        pointer = f"/parameters/clients/{number}/{source}"
        problems = self.options.row_problems(len(rows), self.plan.training.batch_size, pointer, number)
        if problems:
            raise RequestInvalid(f"Client {number} can not take part: it {problems[0].message}.", errors=problems)
        return rows

    def _facts(self, rows: int, number: int) -> ClientFacts:
        privacy = self.options.privacy
        if privacy is None:
            return ClientFacts(rows)
        rate, steps = self.plan.training.batch_size / rows, self.options.rounds * self.options.local_steps
        noise = privacy.noise_multiplier
        if noise is None:
            noise = noise_for(privacy.epsilon, privacy.delta, rate, steps)
            assert spent(noise, privacy.delta, rate, steps) <= privacy.epsilon, number
        return ClientFacts(rows, noise, rate)

    def _prepared(self, model: nn.Module, known: Circumstances) -> nn.Module:
        """The model with the adapter, whose lora_A comes from the seed."""

        def batches() -> Iterator[Mapping[str, Tensor]]:
            return iter(())

        self.task.before_training(model)
        set_seed(self.plan.seed)
        method = find_method(self.plan.method).load(self.options)
        context = MethodContext(
            targets=[target.path for target in known.targets],
            total_steps=self._steps,
            batches=batches,
            settings=self.plan.training,
            seed=self.plan.seed,
            task_type=self.task.peft_type,
        )
        return method.prepare(model, context)

    @property
    def _steps(self) -> int:
        return self.options.rounds * self.options.local_steps

    def _local_plan(self, state: RunState, client: int) -> LocalPlan:
        seed = partial(seed_of, round_=state.round, client=client)
        privacy, facts = self.options.privacy, state.clients[client]
        noise = None
        if privacy is not None:
            given = privacy.noise_seed
            own = None if given is None else seed(given, what="noise")
            noise = Noise(facts.noise_multiplier, privacy.clip_norm, facts.rate, own)
        return LocalPlan(
            training=self.plan.training,
            steps=self.options.local_steps,
            first_step=state.round * self.options.local_steps,
            total_steps=self._steps,
            seed=seed(self.plan.seed, what="rows"),
            rows_at_once=-(-self.plan.training.batch_size // self.plan.micro_batches),
            noise=noise,
        )

    def _losses(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        batch = {name: value.to(self.plan.device) for name, value in self.task.collate(rows).items()}
        given = self.task.step_inputs(batch, 0)
        labels = given.pop("labels")
        if "logits_to_keep" not in given:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return row_losses(model(**given).logits, labels)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,) the mean negative log likelihood of each row's counted tokens, nats.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length) what each position has to say, `IGNORED` where it does not count.
    """
    each = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all lora_A, their names and bytes in the order of the names."""
    found = sha256()
    for name, value in sorted(tensors.items()):
        if ".lora_A." in name:
            found.update(name.encode() + b"\0" + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_frozen(tensors: Mapping[str, Tensor]) -> None:
    """A lora_A without full rank could not be repaired: nothing trains it."""
    for name, value in tensors.items():
        if ".lora_A." in name and int(torch.linalg.matrix_rank(value)) < min(value.shape):
            raise RequestInvalid(
                f"{name} as drawn has not the rank {min(value.shape)}.", errors=[FieldError("/seed", "take another")]
            )


def advanced(state: RunState, tensors: Mapping[str, Tensor], **changes: Any) -> RunState:
    """After a round that gave these trained tensors."""
    return replace(state, tensors={**state.tensors, **tensors}, round=state.round + 1, **changes)
