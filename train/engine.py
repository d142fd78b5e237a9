"""A training from a base model and a dataset to an adapter that was loaded again, compared and measured."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import set_seed

from artifacts.errors import AttemptCancelled, FieldError, RequestInvalid
from artifacts.free_memory import free_memory
from train.base_files import BaseFiles
from train.catalog import find_method
from train.checkpoints import CARRIED
from train.continuation import Start
from train.data import DataFile, Examples
from train.estimate import Estimate, check_fits, estimate
from train.evaluation import Scores, by_group, compare
from train.feasibility import check_feasible
from train.loop import LoopInputs, LoopResult, Observer, run_loop
from train.options.common import Circumstances, TrainOptions
from train.protocol import MethodContext, TrainMethod, loss_of_model
from train.quantised.packed_linear import PackedLinear
from train.reload import Reload, check_reload
from train.report import MemoryMeter, TrainReport
from train.settings import EvaluationSettings, TaskSettings, TrainingSettings, is_packed
from train.targets import check_method, wanted_targets
from train.tasks.catalog import make_task
from train.tasks.protocol import Task, TaskContext
from train.tasks.rows import IGNORED
from train.world import World

PREPARING, BEFORE, LOOP, RELOADED, AFTER = 0.02, 0.08, 0.85, 0.9, 1.0
"""Where the parts of a training end on the progress bar."""


class TrainObserver(Observer, Protocol):
    """Who follows a training: the loop's observer, and progress outside of the loop."""

    def progress(self, fraction: float, message: str) -> None:
        """How far the training is (0 to 1). Raises to stop it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the result.

    Attributes:
        micro_batches: see `train.loop.LoopInputs`.
    """

    method: str
    options: TrainOptions
    task: TaskSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    seed: int
    device: str
    micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is trained, on what, and where the training may write: `folder` is its own.

    Attributes:
        resume: an unpacked checkpoint of the same training.
        start: the adapter that the training goes on from; the plan's options follow it
            (`train.continuation.continued_options`).
    """

    base: BaseFiles
    data: DataFile
    folder: Path
    resume: Path | None = None
    start: Start | None = None


def train_adapter(
    plan: Plan,
    method: TrainMethod[Any],
    inputs: Inputs,
    output: Path,
    observer: TrainObserver,
    make: Callable[[Any, TaskContext], Task[Any]] = make_task,
) -> TrainReport:
    """Train, write the adapter to `output`, load it again onto a fresh base, compare and measure it there.

    With `torch.distributed` every rank calls it, each with a folder and an observer of its own. All of them train; the
    first one evaluates, writes and reports while the others wait for its report.

    Args:
        make: gives the task of the plan's settings: for a room whose rows need another loss than users' rows do.

    Raises:
        FileBroken, RequestInvalid: the data, the targets or the rank do not fit the base model.
        TrainingDiverged: see `train.loop.run_loop`.
        ReloadMismatch: the written adapter, loaded again, does not predict what the trained model does.
        Whatever the observer raises.
    """
    if plan.options.federated:
        raise RequestInvalid(
            "A training with clients is done by the pool of a service.",
            hint="Send it to POST /train; here leave parameters.clients out.",
            errors=[FieldError("/parameters/clients", "needs a service")],
        )
    world = World()
    check_feasible(plan.task, plan.training, plan.evaluation, world.size)
    find_method(plan.method).check_task(plan.task.type)
    meter = MemoryMeter(plan.device)
    observer.progress(0.0, "reading the dataset")
    task = make(plan.task, TaskContext(inputs.base, plan.training, plan.device, plan.seed, inputs.folder))
    examples = task.read(inputs.data, plan.evaluation)
    observer.progress(PREPARING / 2, "loading the base model")
    model = task.load()
    known, needed = check_plan(plan, model, examples, task.whole(model), world.size)
    task.check(model, examples)

    bench = _Bench(plan, task, examples, observer)
    carried = _carried(inputs.resume)
    course = _Course(plan, known, needed, examples)
    if inputs.start is not None:
        task.check_start(inputs.start.directory)
        course.start = inputs.start.placed(known.targets, task.whole(model))
    if carried is not None:
        course.before = _scores(task, carried)
    elif course.start is None and not method.begins_prepared and world.first:
        course.before = bench.scores(model, "before", (PREPARING, BEFORE))
    world.wait()
    set_seed(plan.seed)
    trainable = _prepare(course, method, model, task, inputs.resume)
    if carried is None and (course.start is not None or method.begins_prepared):
        if world.first:
            course.before = bench.scores(trainable.eval(), "before", (PREPARING, BEFORE))
        world.wait()
    course.result = _run(course, method, trainable, bench, inputs, world)
    if course.result.stopped:
        raise AttemptCancelled(f"the training was asked to stop after step {course.result.steps}")
    if not world.first:
        none_here: Any = None
        told: TrainReport = world.from_first(none_here)
        return told
    trainable.eval()
    observer.progress(LOOP, "writing the adapter")
    course.parameters = method.trained_parameters(trainable)
    method.settle(trainable)
    expected = task.predict(trainable, bench.probe_rows)
    course.own = _own_report(method, trainable, bench)
    method.export(trainable, output)
    task.finish(output)
    beside = method.export_beside(trainable, inputs.folder / "beside")
    for found in beside:
        task.finish(found.directory)
    del model, trainable
    _free()

    observer.progress(LOOP, "loading the adapter onto a fresh base model")
    fresh, course.reload = check_reload(task, partial(task.reload, method.reload), output, bench.probe_rows, expected)
    course.after = bench.scores(fresh, "after", (RELOADED, AFTER))
    if course.after is not None:
        course.more = task.measure_more(fresh, examples.validation, plan.evaluation)
    course.remarks = task.remarks(course.after)
    return world.from_first(replace(course.report(meter.peak()), beside=tuple(beside)))


@dataclass(slots=True)
class _Course:
    """What is settled before a training, and what comes to be known on its way: all that its report is made of."""

    plan: Plan
    known: Circumstances
    needed: Estimate
    examples: Examples
    before: Scores | None = None
    after: Scores | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    result: LoopResult = field(default_factory=LoopResult)
    reload: Reload | None = None
    parameters: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    remarks: Sequence[str] = ()

    def report(self, peak_memory: Mapping[str, int | None]) -> TrainReport:
        plan, result = self.plan, self.result
        measured: dict[str, Any] = {}
        if self.before is not None and self.after is not None:
            measured = {
                "before": self.before.to_dict(),
                "after": self.after.to_dict(),
                "difference": compare(self.before, self.after, plan.evaluation, plan.seed),
                **self.more,
            }
            if self.examples.groups.validation:
                measured["groups"] = by_group(self.before, self.after, self.examples.groups.validation)
        return TrainReport(
            method=plan.method,
            steps=result.steps,
            resumed_at=result.first_step,
            seconds=result.seconds,
            tokens_per_second=result.tokens_per_second,
            final_loss=result.final_loss,
            trainable_parameters=self.parameters,
            target_modules=len(self.known.targets),
            peak_memory=peak_memory,
            estimate=self.needed.to_dict(),
            data=self.examples.report,
            evaluation=measured,
            reload={} if self.reload is None else self.reload.to_dict(),
            own=self.own,
            early_stopping=result.early_stopping,
            devices=result.devices,
            continued_from=None if self.start is None else self.start.to_dict(),
            warnings=[
                *plan.options.warnings(self.known),
                *(() if self.start is None else self.start.warnings),
                *self.remarks,
            ],
        )


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path → (d_out, d_in) of every linear layer, also of those that keep W as (d_in, d_out)."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | PackedLinear):
            found[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[path] = (module.weight.shape[1], module.weight.shape[0])
    return found


def packed_sizes(model: nn.Module) -> dict[str, int]:
    """Path → bytes of the layers whose weights are packed."""
    return {
        path: sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }


def check_plan(
    plan: Plan, model: nn.Module, examples: Examples, whole: Sequence[str], devices: int
) -> tuple[Circumstances, Estimate]:
    """Raises RequestInvalid when the method, its layers or the memory do not allow the training."""
    linear = {path: sides for path, sides in linear_layers(model).items() if not _is_whole(path, whole)}
    packed = packed_sizes(model)
    adaptable = {path: linear[path] for path in packed} if packed else linear
    targets = wanted_targets(adaptable, plan.options, plan.task)
    rows = len(examples.train)
    known = Circumstances(
        targets,
        plan.training,
        plan.training.steps_for(rows),
        rows,
        is_packed(plan.task),
        plan.evaluation.grouped,
        devices,
    )
    check_method(plan.options, known)
    heads = sum(_parameters(model.get_submodule(path)) for path in whole)
    sizes = (_parameters(model), devices, heads, packed)
    needed = estimate(plan.options, targets, linear, plan.training, plan.task, *sizes)
    check_fits(needed, free_memory(plan.device) + needed.base_bytes, plan.device)  # the base is in it already
    return known, needed


def _prepare(
    course: _Course, method: TrainMethod[Any], model: nn.Module, task: Task[Any], checkpoint: Path | None
) -> nn.Module:
    plan, rows = course.plan, course.examples.train
    size = plan.training.batch_size

    def batch_of(numbers: Sequence[int]) -> Mapping[str, Tensor]:
        batch = task.collate([rows[number] for number in numbers])
        return {name: value.to(plan.device) for name, value in batch.items()}

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for start in range(0, len(rows), size):
            yield batch_of(range(start, min(start + size, len(rows))))

    task.before_training(model)
    total = course.known.steps
    assert total is not None
    context = MethodContext(
        targets=[target.path for target in course.known.targets],
        total_steps=total,
        batches=batches,
        settings=plan.training,
        seed=plan.seed,
        checkpoint=checkpoint,
        start=course.start,
        task_type=task.peft_type,
        whole=task.whole(model),
        loss=_batch_loss(task),
        rows=len(rows),
        batch_of=batch_of,
        words=task.words,
        base_location=task.base.location,
        groups=course.examples.groups.train,
    )
    return method.prepare(model, context)


def _batch_loss(task: Task[Any]) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The task's mean loss of one batch, as the loop has it in the first epoch."""
    own = task.loss()
    if own is None:
        return loss_of_model

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        items = (batch["labels"] != IGNORED).sum().clamp(min=1)
        given = task.step_inputs(dict(batch), epoch=0)
        labels = given.pop("labels")
        return own(model(**given), labels, items)

    return loss


def _run(
    course: _Course,
    method: TrainMethod[Any],
    model: nn.Module,
    bench: _Bench,
    inputs: Inputs,
    world: World,
) -> LoopResult:
    plan = course.plan
    loop = LoopInputs(
        task=bench.task,
        examples=course.examples.train,
        settings=plan.training,
        seed=plan.seed,
        device=plan.device,
        folder=inputs.folder / "loop",
        micro_batches=plan.micro_batches,
        carried={} if course.before is None else {"before": course.before.to_lists()},
        resume=inputs.resume,
        measure=bench.figure,
    )
    return run_loop(model, method, loop, bench.observer, world)


class _Bench:
    """Measures a model on the validation rows, with a share of the progress bar."""

    def __init__(self, plan: Plan, task: Task[Any], examples: Examples, observer: TrainObserver) -> None:
        self._plan, self.task, self.examples, self.observer = plan, task, examples, observer

    @property
    def probe_rows(self) -> Sequence[Any]:
        """Rows on which the predictions of the trained and of the reloaded model are compared."""
        return (self.examples.validation or self.examples.train)[:4]

    def scores(
        self, model: nn.Module, when: str, share: tuple[float, float], group: str | None = None
    ) -> Scores | None:
        """None when there are no validation rows, or none of the group."""
        rows: Sequence[Any] = self.examples.validation
        if group is not None:
            rows = [row for row, own in zip(rows, self.examples.groups.validation, strict=True) if own == group]
        if not rows:
            return None
        first, last = share

        def tick(done: int) -> None:
            self.observer.progress(first + (last - first) * done / len(rows), f"measuring {when} the training")

        return self.task.score(model, rows, self._plan.evaluation, tick)

    def figure(self, model: nn.Module) -> float:
        """What early stopping goes by, on the validation rows; draws no random number."""
        stopping = self._plan.training.early_stopping
        assert stopping is not None
        measured = self._plan.evaluation.model_copy(update={"exact_match": stopping.metric == "exact_match"})
        with torch.random.fork_rng():
            scores = self.task.score(model, self.examples.validation, measured, lambda _: None)
        return scores.to_dict()[stopping.metric]


def _own_report(method: TrainMethod[Any], model: nn.Module, bench: _Bench) -> dict[str, Any]:
    def measure(model: nn.Module, group: str | None = None) -> dict[str, float]:
        scores = bench.scores(model, "what the method adds to", (LOOP, LOOP), group)
        return {} if scores is None else scores.to_dict()

    found = method.report(model)
    evaluated = method.evaluate(model, measure) if bench.examples.validation else {}
    return found | ({"evaluation": evaluated} if evaluated else {})


def _is_whole(path: str, whole: Sequence[str]) -> bool:
    """Whether the layer is, or lies in, a module that is trained whole: that gets no adapter."""
    return any(path == module or path.startswith(f"{module}.") for module in whole)


def _carried(resume: Path | None) -> dict[str, Any] | None:
    return None if resume is None else dict(json.loads((resume / CARRIED).read_text(encoding="utf-8")))


def _scores(task: Task[Any], carried: Mapping[str, Any]) -> Scores | None:
    return task.scores_of(carried["before"]) if "before" in carried else None


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
