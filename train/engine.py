"""A training from a base model and a dataset to an adapter that was loaded again, compared and measured."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import set_seed

from artifacts.errors import AttemptCancelled
from train import evaluation
from train.causal_lm import Example, collate, padding_of, row_limit
from train.checkpoints import CARRIED
from train.data import DataFile, Examples, read_examples
from train.estimate import check_fits, estimate
from train.evaluation import Scores
from train.loop import LoopInputs, LoopResult, Observer, run_loop, total_steps
from train.options.common import Circumstances, Target, TrainOptions
from train.protocol import MethodContext, TrainMethod
from train.reload import Reload, check_reload, probe
from train.report import MemoryMeter, TrainReport, free_memory
from train.settings import CausalLmTask, EvaluationSettings, TrainingSettings
from train.targets import check_method, resolve_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    task: CausalLmTask
    training: TrainingSettings
    evaluation: EvaluationSettings
    seed: int
    device: str
    micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is trained, on what, and where the training may write: `folder` is its own.

    Attributes:
        load_base: loads the base model anew, frozen and in evaluation mode, on the plan's device.
        resume: an unpacked checkpoint of the same training.
    """

    load_base: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    data: DataFile
    base_name: str
    folder: Path
    resume: Path | None = None


def train_adapter(
    plan: Plan, method: TrainMethod[Any], inputs: Inputs, output: Path, observer: TrainObserver
) -> TrainReport:
    """Train, write the adapter to `output`, load it again onto a fresh base, compare and measure it there.

    Raises:
        FileBroken, RequestInvalid: the data, the targets or the rank do not fit the base model.
        TrainingDiverged: see `train.loop.run_loop`.
        ReloadMismatch: the written adapter, loaded again, does not give the trained model's logits.
        Whatever the observer raises.
    """
    meter = MemoryMeter(plan.device)
    observer.progress(0.0, "loading the base model")
    model = inputs.load_base()
    model.name_or_path = inputs.base_name  # PEFT writes it into the adapter's configuration
    observer.progress(PREPARING / 2, "reading the dataset")
    examples = read_examples(
        inputs.data, inputs.tokenizer, plan.task, plan.evaluation, row_limit(plan.task, model.config)
    )
    linear = linear_layers(model)
    targets = resolve_targets(linear, plan.options.target_modules)
    known = Circumstances(targets, plan.training, total_steps(len(examples.train), plan.training))
    check_method(plan.options, known)
    needed = estimate(plan.options, targets, linear, plan.training, plan.task, _parameters(model))
    check_fits(needed, free_memory(plan.device) + needed.base_bytes, plan.device)  # the base is in it already

    bench = _Bench(plan, inputs, examples, observer)
    carried = _carried(inputs.resume)
    before = bench.scores(model, "before", (PREPARING, BEFORE)) if carried is None else _scores(carried)
    set_seed(plan.seed)
    trainable = _prepare(plan, method, model, targets, examples, bench.padding, inputs.resume)
    result = _run(plan, method, trainable, inputs, bench, before)
    if observer.stop_wanted():
        raise AttemptCancelled(f"the training was asked to stop after step {result.steps}")
    trainable.eval()
    observer.progress(LOOP, "writing the adapter")
    parameters = sum(p.numel() for p in trainable.parameters() if p.requires_grad)
    method.settle(trainable)
    expected = probe(trainable, bench.probe_rows, bench.padding)
    own = _own_report(method, trainable, bench)
    method.export(trainable, output)
    del model, trainable
    _free()

    observer.progress(LOOP, "loading the adapter onto a fresh base model")
    fresh, reload = check_reload(
        inputs.load_base, method.reload, output, bench.probe_rows, bench.padding, expected, plan
    )
    after = bench.scores(fresh, "after", (RELOADED, AFTER))
    return _report(
        plan, examples, result, reload, before, after, parameters, needed.to_dict(), meter.peak(), own, known
    )


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path → (d_out, d_in) of every linear layer, also of those that keep W as (d_in, d_out)."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[path] = (module.weight.shape[1], module.weight.shape[0])
    return found


def _prepare(
    plan: Plan,
    method: TrainMethod[Any],
    model: PreTrainedModel,
    targets: Sequence[Target],
    examples: Examples,
    padding: int,
    checkpoint: Path | None,
) -> nn.Module:
    size = plan.training.batch_size

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for start in range(0, len(examples.train), size):
            batch = collate(examples.train[start : start + size], padding)
            yield {name: value.to(plan.device) for name, value in batch.items()}

    if plan.training.gradient_checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False
    total = total_steps(len(examples.train), plan.training)
    context = MethodContext(
        targets=[target.path for target in targets],
        total_steps=total,
        batches=batches,
        settings=plan.training,
        seed=plan.seed,
        checkpoint=checkpoint,
    )
    return method.prepare(model, context)


def _run(
    plan: Plan,
    method: TrainMethod[Any],
    model: nn.Module,
    inputs: Inputs,
    bench: _Bench,
    before: Scores | None,
) -> LoopResult:
    carried = {} if before is None else {"before": before.to_lists()}
    loop = LoopInputs(
        examples=bench.examples.train,
        padding=bench.padding,
        settings=plan.training,
        seed=plan.seed,
        device=plan.device,
        folder=inputs.folder / "loop",
        micro_batches=plan.micro_batches,
        carried=carried,
        resume=inputs.resume,
    )
    return run_loop(model, method, loop, bench.observer)


class _Bench:
    """Measures a model on the validation rows, with a share of the progress bar."""

    def __init__(self, plan: Plan, inputs: Inputs, examples: Examples, observer: TrainObserver) -> None:
        self._plan, self._tokenizer = plan, inputs.tokenizer
        self.examples, self.observer = examples, observer
        self.padding = padding_of(inputs.tokenizer)

    @property
    def probe_rows(self) -> Sequence[Example]:
        """Rows on which the logits of the trained and of the reloaded model are compared."""
        return (self.examples.validation or self.examples.train)[:4]

    def scores(self, model: nn.Module, when: str, share: tuple[float, float]) -> Scores | None:
        """None when there are no validation rows."""
        rows = self.examples.validation
        if not rows:
            return None
        first, last = share

        def tick(done: int) -> None:
            self.observer.progress(first + (last - first) * done / len(rows), f"measuring {when} the training")

        return evaluation.score(
            model,
            self._tokenizer,
            rows,
            self._plan.evaluation,
            padding=self.padding,
            batch_size=self._plan.training.batch_size,
            tick=tick,
        )


def _own_report(method: TrainMethod[Any], model: nn.Module, bench: _Bench) -> dict[str, Any]:
    def measure(measured: nn.Module) -> dict[str, float]:
        scores = bench.scores(measured, "what the method adds to", (LOOP, LOOP))
        return {} if scores is None else scores.to_dict()

    found = method.report(model)
    evaluated = method.evaluate(model, measure) if bench.examples.validation else {}
    return found | ({"evaluation": evaluated} if evaluated else {})


def _carried(resume: Path | None) -> dict[str, Any] | None:
    return None if resume is None else dict(json.loads((resume / CARRIED).read_text(encoding="utf-8")))


def _scores(carried: Mapping[str, Any]) -> Scores | None:
    return Scores.from_lists(carried["before"]) if "before" in carried else None


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report(
    plan: Plan,
    examples: Examples,
    result: LoopResult,
    reload: Reload,
    before: Scores | None,
    after: Scores | None,
    parameters: int,
    needed: dict[str, int],
    peak_memory: Mapping[str, int | None],
    own: Mapping[str, Any],
    known: Circumstances,
) -> TrainReport:
    measured: dict[str, Any] = {}
    if before is not None and after is not None:
        measured = {
            "before": before.to_dict(),
            "after": after.to_dict(),
            "difference": evaluation.compare(before, after, plan.evaluation, plan.seed),
        }
    return TrainReport(
        method=plan.method,
        steps=result.steps,
        resumed_at=result.first_step,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        final_loss=result.losses[-1] if result.losses else None,
        trainable_parameters=parameters,
        target_modules=len(known.targets),
        peak_memory=peak_memory,
        estimate=needed,
        data=examples.report,
        evaluation=measured,
        reload=reload.to_dict(),
        own=own,
        warnings=plan.options.warnings(known),
    )
