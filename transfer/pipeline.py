"""A transfer from its inputs to the new adapter and its report: generate, filter, label, train, evaluate.

Every unit of work is kept (`transfer.stage_files`), and all random numbers come from the job's key: a transfer that was
interrupted anywhere gives the same bytes as one that was not. The training data of the source adapter is never read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.errors import NotMergeable, TransferRefused
from artifacts.intake import inspect
from train.catalog import find_method as find_training
from train.continuation import Start, continued_options
from train.methods.peft_adapter import WEIGHTS
from train.options.common import TrainOptions
from transfer.bench import Bench, Resident, TransferInputs, TransferObserver
from transfer.candidates import Screened
from transfer.catalog import TransferMethod, find_method
from transfer.distillation import Distillation, distil, layers_of
from transfer.evaluation import Exam, Item, mean_states
from transfer.gate import BASE, SOURCE, TRANSFERRED, ArmScore, GateReport, GateSettings, judge
from transfer.identity import canonical_digest
from transfer.labelling import Label, Labeller, LabelReport, synthetic_set
from transfer.leaks import count_leaks
from transfer.options import DistilOptions, TransferOptions, TransLoraOptions, WeightOptions
from transfer.selected_tokens import SPANS
from transfer.sources import Drawn, PromptSource
from transfer.stage_files import StageFiles
from transfer.statistics import squared_mmd
from transfer.synthetic import SyntheticSet, held_out
from transfer.target_layers import query_and_value
from transfer.training_follower import TrainingFollower
from transfer.weight_transfer import move_weights

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The new adapter's folder, and the report: JSON without any text of inputs, seeds or answers, and no score of the
    discriminator.

    Attributes:
        gate: None if nothing was there to measure with.
    """

    adapter: Path
    gate: GateReport | None
    report: Mapping[str, Any]


def transfer(
    method: TransferMethod,
    options: TransferOptions,
    inputs: TransferInputs,
    gate: GateSettings,
    observer: TransferObserver,
    controls: Sequence[str] = (),
) -> TransferResult:
    """Move the adapter and measure what came out.

    Args:
        controls: names of methods without needs of their own (and seeds-only) that are measured beside it.

    Raises:
        TransferRefused, TransferStarved, NotMergeable: see the methods.
        RequestInvalid: a base model, or the new adapter's parameters, do not fit; or there is no such control.
        Whatever the observer raises.
    """
    work = _Work(method, options, inputs, observer)
    output = inputs.folder / ADAPTER
    parts = work.make(method, options, output)
    items, fidelity = work.items(parts)
    found = _Measured(None, {})
    if items:
        found = work.measure(output, items, gate, controls)
    return TransferResult(
        output,
        found.gate,
        {
            "method": method.name,
            "key": inputs.key,
            **parts.report,
            "evaluation": found.report,
            "fidelity_only": fidelity,
            "gate": None if found.gate is None else found.gate.to_dict(),
            "discriminator_auc": None if inputs.discriminator is None else inputs.discriminator.auc,
        },
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """What came of a method: its report, and rows that were not trained on."""

    report: dict[str, Any]
    unseen: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class _Measured:
    gate: GateReport | None
    report: dict[str, Any]


class _Work:
    def __init__(
        self, method: TransferMethod, options: TransferOptions, inputs: TransferInputs, observer: TransferObserver
    ) -> None:
        self._inputs, self._observer = inputs, observer
        self._files = StageFiles(inputs.folder / "stages")
        self._resident = Resident(inputs)
        # A method without training is measured with the answers' usual limits.
        self._asking = options if isinstance(options, DistilOptions) else DistilOptions()
        self._name = method.name

    def make(self, method: TransferMethod, options: TransferOptions, output: Path) -> _Made:
        """The adapter of one method, written to `output`."""
        if isinstance(options, WeightOptions):
            self._resident.free()
            self._observer.unit("move", f"moving weights by {method.name}")
            inputs = self._inputs
            shutil.rmtree(output, ignore_errors=True)
            report = move_weights(
                method.load(), options, inputs.adapter, inputs.source, inputs.target, inputs.cache, output
            )
            return _Made({"weights": report.to_dict()})
        assert isinstance(options, DistilOptions)
        return self._distil(method, options, output)

    def _distil(self, method: TransferMethod, options: DistilOptions, output: Path) -> _Made:
        bench = Bench(self._inputs, options, self._files, self._resident, self._observer)
        source: PromptSource = method.load()()
        drawn = source.draw(bench)
        labels = self._label(bench, drawn, method.name)
        data, label_report = synthetic_set(labels, self._resident.target_tokenizer())
        count = options.held_out if isinstance(options, TransLoraOptions) else 0
        rows, unseen = held_out(data.rows, min(count, len(data.rows) - 1))
        report = {
            "inputs": dict(drawn.report),
            "degraded": drawn.degraded,
            "labels": _label_figures(label_report),
            "leaks": count_leaks(data.rows, self._inputs.seeds).to_dict(),
            "data": {"rows": len(rows), "digest": data.digest},
            "likeness": self._likeness(drawn, options),
            "training": self._train(method.name, options, SyntheticSet(rows), drawn, output),
        }
        return _Made(report, tuple(Item(row.x, row.answer) for row in unseen))

    def _label(self, bench: Bench, drawn: Drawn, name: str) -> list[Label]:
        if drawn.labels is not None:
            return list(drawn.labels)
        given = [bench.answer_settings, [[item.index, item.text] for item in drawn.kept]]
        if self._files.is_done(f"label-{name}", given):
            return _labels(self._files.json_unit(f"label-{name}", given, list))
        labeller = bench.labeller()
        found: list[Label] = []
        for number, batch in enumerate(labeller.batches(drawn.kept)):
            own = [bench.answer_settings, [[item.index, item.text] for item in batch]]
            rows = self._files.json_unit(f"label-{name}-{number:05d}", own, partial(self._answered, labeller, batch))
            found += _labels(rows)
        found.sort(key=lambda label: label.index)
        return _labels(self._files.json_unit(f"label-{name}", given, lambda: [_listed(label) for label in found]))

    def _answered(self, labeller: Labeller, batch: Sequence[Screened]) -> list[list[Any]]:
        self._observer.unit("label", f"answering inputs, the first is number {batch[0].index}")
        return [_listed(label) for label in labeller.label(batch)]

    def _train(
        self, name: str, options: DistilOptions, data: SyntheticSet, drawn: Drawn, output: Path
    ) -> dict[str, Any]:
        """The adapter's files are a unit's output: bytes in, bytes out."""
        inputs = self._inputs
        rows = data.training_rows(inputs.prompt_format)
        share = None
        if drawn.spans and isinstance(options, TransLoraOptions):
            rows = _with_spans(rows, data, drawn)
            share = options.token_share
        start = None if drawn.start is None else Start("start", inspect(drawn.start), drawn.start)
        how = Distillation(
            options.target_method,
            _target_options(options, inputs, start),
            options.training,
            options.max_length,
            inputs.seed,
            inputs.device,
            share,
            inputs.micro_batches,
        )
        given = [
            self._files.put(rows),
            inputs.target.digest,
            how.method,
            how.options.model_dump(mode="json"),
            how.training.model_dump(mode="json", exclude={"checkpoint_seconds", "checkpoint_steps"}),
            [how.max_length, how.seed, how.token_share],
            None if drawn.start is None else self._files.put((drawn.start / WEIGHTS).read_bytes()),
        ]
        unit = f"train-{name}"
        # Checkpoints of a training with other inputs are no use to this one.
        folder = inputs.folder / f"training-{canonical_digest(given)[:16]}"
        follower = TrainingFollower(folder / "checkpoints", self._observer, told=name == self._name)
        make = partial(self._trained, folder, how, rows, start, follower)
        found = self._files.json_unit(unit, given, make)
        if any(self._files.get(digest) is None for digest in found["files"].values()):
            self._files.forget(unit)
            found = self._files.json_unit(unit, given, make)
        self._write(found["files"], output)
        training: dict[str, Any] = found["training"]
        return training

    def _write(self, files: Mapping[str, str], output: Path) -> None:
        """Put kept files into a new folder."""
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        for name, digest in files.items():
            data = self._files.get(digest)
            assert data is not None
            (output / name).write_bytes(data)

    def _trained(
        self, folder: Path, how: Distillation, rows: bytes, start: Start | None, follower: TrainingFollower
    ) -> dict[str, Any]:
        self._resident.free()
        self._observer.unit("train", "training the new adapter")
        resume = follower.newest()
        work, output = folder / "work", folder / "adapter"
        for stale in (work, output):
            shutil.rmtree(stale, ignore_errors=True)
        work.mkdir(parents=True)
        path = work / "rows.jsonl"
        path.write_bytes(rows)
        report = distil(how, self._inputs.target.files, path, work, output, follower, resume, start)
        files = {file.name: self._files.put(file.read_bytes()) for file in sorted(output.iterdir()) if file.is_file()}
        shutil.rmtree(folder)
        kept = ("method", "steps", "final_loss", "trainable_parameters", "target_modules", "reload")
        told = asdict(report)
        return {"files": files, "training": {name: told[name] for name in kept}}

    def _likeness(self, drawn: Drawn, options: DistilOptions) -> dict[str, float] | None:
        """MMD² of the kept and of the unfiltered inputs to the holdout's, which only the owner has."""
        real = [item.x for item in self._inputs.holdout]
        if len(real) < 2 or len(drawn.kept) < 2 or not drawn.unfiltered:
            return None
        kept = [item.text for item in drawn.kept]
        given = [self._inputs.source.digest, options.answer_batch, real, kept, list(drawn.unfiltered)]

        def make() -> dict[str, float]:
            self._observer.unit("filter", "comparing the inputs with the holdout's")
            tokenizer = self._resident.source_tokenizer()
            with self._resident.plain_source() as model:
                states = [
                    mean_states(model, tokenizer, texts, options.answer_batch)
                    for texts in (real, kept, list(drawn.unfiltered))
                ]
            return {
                "mmd2_kept": squared_mmd(states[1], states[0]),
                "mmd2_unfiltered": squared_mmd(states[2], states[0]),
            }

        found: dict[str, float] = self._files.json_unit("likeness", given, make)
        return found

    def items(self, made: _Made) -> tuple[tuple[Item, ...], bool]:
        """What is measured with, and whether that is only agreement with the source adapter."""
        if self._inputs.holdout:
            return self._inputs.holdout, False
        return made.unseen, bool(made.unseen)

    def measure(
        self, adapter: Path, items: tuple[Item, ...], settings: GateSettings, controls: Sequence[str]
    ) -> _Measured:
        """Every arm on the same items; an arm is the unit that is kept."""
        options = self._asking
        exam = Exam(items, self._inputs.prompt_format, options.answer_tokens, options.answer_stop, options.answer_batch)
        arms = {
            SOURCE: self._arm(SOURCE, exam, None),
            BASE: self._arm(BASE, exam, None),
            TRANSFERRED: self._arm(TRANSFERRED, exam, adapter),
        }
        verdict = judge(arms, settings, self._inputs.seed)
        told: dict[str, Any] = {name: arm.to_dict() for name, arm in arms.items()}
        for name in controls:
            if name != self._name:
                told[name] = self._control(name, exam)
        return _Measured(verdict, {"arms": told})

    def _control(self, name: str, exam: Exam) -> dict[str, Any]:
        """A control that can not be made is told as such: between unlike bases that is its result."""
        row, folder = find_method(name), self._inputs.folder / f"control-{name}"
        options: TransferOptions = row.options()
        if isinstance(options, DistilOptions):
            options = row.options.model_validate(
                {field: getattr(self._asking, field) for field in DistilOptions.model_fields}
            )
        try:
            self.make(row, options, folder)
        except (TransferRefused, NotMergeable) as problem:
            return {"applicable": False, "reason": problem.detail}
        return self._arm(name, exam, folder).to_dict()

    def _arm(self, name: str, exam: Exam, adapter: Path | None) -> ArmScore:
        digests = [] if adapter is None else [self._files.put((adapter / WEIGHTS).read_bytes())]
        questions = [exam.prompt_format.model_dump(), exam.max_new_tokens, exam.stop, exam.batch_size]
        given = [self._inputs.key, digests, questions, [[item.x, item.answer] for item in exam.items]]

        def make() -> list[Any]:
            self._observer.unit("evaluate", f"measuring {name}")
            resident = self._resident
            if name == SOURCE:
                score = exam.take(resident.source(), resident.source_tokenizer())
            else:
                score = exam.take(resident.target(adapter), resident.target_tokenizer())
            return [score.outcomes, score.ended, score.distinct]

        outcomes, ended, distinct = self._files.json_unit(f"arm-{name}", given, make)
        return ArmScore(tuple(outcomes), ended, distinct)


def _target_options(options: DistilOptions, inputs: TransferInputs, start: Start | None) -> TrainOptions:
    """Options of the new adapter: a start decides its layers, else those of queries and values are meant."""
    if start is not None:
        return continued_options(find_training(options.target_method), options.train_options(()), start.manifest)
    named = "target_modules" in options.target_parameters
    return options.train_options(() if named else tuple(query_and_value(layers_of(inputs.target.files))))


def _listed(label: Label) -> list[Any]:
    return [label.index, label.x, label.answer, label.finish]


def _labels(rows: Sequence[Sequence[Any]]) -> list[Label]:
    return [Label(*row) for row in rows]


def _label_figures(report: LabelReport) -> dict[str, Any]:
    return {**asdict(report), "end_rate": report.end_rate}


def _with_spans(rows: bytes, data: SyntheticSet, drawn: Drawn) -> bytes:
    """The training rows with the scores of their answers' tokens."""
    made = []
    for line, row in zip(rows.decode().splitlines(), data.rows, strict=True):
        made.append({**json.loads(line), SPANS: [list(span) for span in drawn.spans[row.index]]})
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in made).encode()
