"""The runs: a source adapter, its discriminator (stage 0), and transfers from SmolLM2 to Gemma 3.

Everything is made in one folder and by one thread or several alike; what is made twice is read the second time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from examples.cross_family.orders import CODES, FORM, Message, make_messages, seeds
from train.base_files import BaseFiles
from train.catalog import parse_parameters as training_parameters
from train.follower import Silent
from train.settings import TrainingSettings
from transfer.bench import StoredDiscriminator, TransferInputs
from transfer.candidates import screen
from transfer.catalog import find_method, parse_parameters
from transfer.decoding import Limits, answers
from transfer.discriminator_training import DiscriminatorReport, LabelledInputs, train_discriminator
from transfer.distillation import Distillation, distil
from transfer.evaluation import Item
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.gate_settings import GateSettings
from transfer.generation import GenerationSettings, InputGenerator
from transfer.identity import canonical_digest
from transfer.pipeline import TransferResult, transfer
from transfer.sampling import Sampling
from transfer.source_model import load_adapted, load_base
from transfer.synthetic import SyntheticRow, SyntheticSet
from transfer.weight_transfer import BaseWeights

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
RECIPE = DiscriminatorRecipe(task="orders")
KINDS = ("q_proj", "v_proj", "o_proj")
ANSWER_TOKENS = 24
BATCH = 32


@dataclass(frozen=True)
class Size:
    """How much is done: steps, rows and candidates.

    Attributes:
        control_steps: of the new adapters from another teacher and from random text.
        layers: of the source and of the target; the upper half gets adapters, which halves the backward pass.
    """

    train_rows: int = 96
    held_out: int = 20
    source_steps: int = 24
    discriminator_steps: int = 40
    invented: int = 96
    target_steps: int = 36
    control_steps: int = 20
    rows: int = 48
    candidates: int = 192
    layers: tuple[int, int] = (30, 18)


class Clock(Silent):
    """Follows a training and a transfer, says nothing, and counts the CPU seconds of the stages of transfers."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self._stage, self._began = "", time.process_time()

    def unit(self, stage: str, message: str) -> None:
        del message
        self.lap(stage)

    def lap(self, stage: str = "") -> None:
        """Another stage begins."""
        now = time.process_time()
        if self._stage:
            self.cpu[self._stage] = self.cpu.get(self._stage, 0.0) + now - self._began
        self._stage, self._began = stage, now

    def kept(self) -> None:
        """A checkpoint lies in the folder."""


def upper_half(layers: int) -> list[str]:
    """The layers of queries, values and outputs in the upper half of a model."""
    return [f"layers.{layer}.self_attn.{kind}" for layer in range(layers // 2, layers) for kind in KINDS]


def unrelated(count: int) -> tuple[str, ...]:
    """Text that has nothing to do with the task: lines of the licence."""
    lines = (line.strip() for line in LICENSE.read_text(encoding="utf-8").splitlines())
    return tuple(dict.fromkeys(line for line in lines if len(line) > 40))[:count]


@dataclass
class Pair:
    """The two base models with what is trained on them, in a folder of its own.

    Attributes:
        code: rule of the answers (`examples.cross_family.orders.CODES`) of the source adapter.
    """

    folder: Path
    source: Path
    target: Path
    code: str = "city_first"
    size: Size = field(default_factory=Size)
    observer: Clock = field(default_factory=Clock)

    @property
    def source_base(self) -> BaseFiles:
        return BaseFiles("HuggingFaceTB/SmolLM2-135M-Instruct", str(self.source))

    @property
    def target_base(self) -> BaseFiles:
        return BaseFiles("google/gemma-3-270m", str(self.target))

    @cached_property
    def data(self) -> list[Message]:
        """What the source adapter and the discriminator are trained on, and no transfer sees."""
        return make_messages("train", self.size.train_rows)

    @cached_property
    def held_out(self) -> list[Message]:
        return make_messages("held_out", self.size.held_out)

    def items(self, code: str) -> tuple[Item, ...]:
        """The held-out messages with the answers that are right in a code."""
        return tuple(Item(message.text, CODES[code](message.order)) for message in self.held_out)

    def training(self, steps: int, learning_rate: float = 2.5e-3, **options: Any) -> Distillation:
        """How adapters of the source base are trained."""
        settings = TrainingSettings(steps=steps, learning_rate=learning_rate, batch_size=8, **options)
        parameters = {"rank": 8, "alpha": 16.0, "target_modules": upper_half(self.size.layers[0])}
        return Distillation("lora", training_parameters("lora", parameters), settings, 128, seed=0)

    def teacher(self, code: str) -> Path:
        """An adapter of the source base that answers in a code."""
        output = self.folder / f"teacher-{code}"
        if not output.exists():
            rows = tuple(
                SyntheticRow(number, message.text, CODES[code](message.order))
                for number, message in enumerate(self.data)
            )
            work = self._work(f"train-{code}")
            path = work / "rows.jsonl"
            path.write_bytes(SyntheticSet(rows).training_rows(FORM))
            distil(self.training(self.size.source_steps), self.source_base, path, work, output, self.observer)
            shutil.rmtree(work)
        return output

    @cached_property
    def inputs(self) -> LabelledInputs:
        """Real inputs, and what the source base invents after the seeds."""
        path = self.folder / "invented.json"
        if not path.exists():
            path.write_text(json.dumps(self._invented()), encoding="utf-8")
        return LabelledInputs.of([message.text for message in self.data], json.loads(path.read_text(encoding="utf-8")))

    def _invented(self) -> list[str]:
        base = self.source_base
        settings = GenerationSettings(Sampling(), max_new_tokens=ANSWER_TOKENS, batch_size=BATCH)
        generator = InputGenerator(load_base(base), base.tokenizer(), seeds(), settings)
        batches = range(-(-self.size.invented // BATCH))
        found = screen([item for number in batches for item in generator.batch("stage 0", number)], seeds())
        return [item.text for item in found if item.verdict in ("passed", "truncated")]

    @cached_property
    def discriminator(self) -> tuple[StoredDiscriminator, DiscriminatorReport]:
        folder, report = self.discriminate(self.inputs, "discriminator")
        return StoredDiscriminator(folder, _digest(folder), RECIPE, report.auc), report

    def discriminate(self, inputs: LabelledInputs, name: str) -> tuple[Path, DiscriminatorReport]:
        """Train a discriminator on the inputs, and measure it."""
        output, told = self.folder / name, self.folder / f"{name}.json"
        if not told.exists():
            work = self._work(f"train-{name}")
            how = self.training(self.size.discriminator_steps, 2e-3)
            report = train_discriminator(inputs, RECIPE, how, self.source_base, work, output, self.observer)
            shutil.rmtree(work)
            told.write_text(json.dumps(report.to_dict()), encoding="utf-8")
        return output, DiscriminatorReport(**json.loads(told.read_text(encoding="utf-8")))

    def run(
        self,
        name: str,
        method: str = "trans-lora",
        *,
        code: str | None = None,
        controls: Sequence[str] = (),
        measured: bool = True,
        inputs: Sequence[str] = (),
        shown: int = 5,
        prompts_of: str | None = None,
        **parameters: Any,
    ) -> TransferResult:
        """A transfer to the target base in a folder of its own.

        Args:
            code: of the teacher, if another than the pair's.
            measured: on the held-out messages.
            inputs: for refresh.
            shown: number of seeds.
            prompts_of: another run, whose generated inputs and verdicts are taken over.
        """
        row, folder = find_method(method), self.folder / name
        folder.mkdir(exist_ok=True)
        if prompts_of is not None:
            shutil.copytree(self.folder / prompts_of / "stages", folder / "stages", dirs_exist_ok=True)
            for unit in (folder / "stages" / "units").iterdir():
                if not unit.name.startswith(("generate-", "filter-")):
                    unit.unlink()
        known = {key: value for key, value in self.parameters().items() if key in row.options.model_fields}
        given = TransferInputs(
            adapter=self.teacher(code or self.code),
            source=BaseWeights(self.source_base, self.source.name),
            target=BaseWeights(self.target_base, self.target.name),
            prompt_format=FORM,
            key=canonical_digest(["cross-family", self.size.rows]),
            seed=0,
            folder=folder,
            cache=self.folder / "cache",
            seeds=seeds(shown),
            inputs=tuple(inputs),
            discriminator=self.discriminator[0],
            holdout=self.items(code or self.code) if measured else (),
        )
        options = parse_parameters(method, known | parameters)
        result = transfer(row, options, given, GateSettings(), self.observer, controls)
        self.observer.lap()
        return result

    def parameters(self) -> dict[str, Any]:
        """Of trans-lora; the other methods take those that they have."""
        return {
            "rows": self.size.rows,
            "max_candidates": self.size.candidates,
            "on_starved": "top_n",
            "input_tokens": ANSWER_TOKENS,
            "generation_batch": BATCH,
            "filter_batch": BATCH,
            "answer_tokens": ANSWER_TOKENS,
            "answer_stop": "\n",
            "answer_batch": BATCH,
            "target_parameters": {"rank": 8, "alpha": 16.0, "target_modules": upper_half(self.size.layers[1])},
            "training": self.settings(self.size.target_steps),
        }

    def settings(self, steps: int) -> dict[str, Any]:
        """Of the training of an adapter of the target base."""
        return {"steps": steps, "learning_rate": 2.5e-3, "batch_size": 8}

    def written(self, adapter: Path) -> list[str]:
        """What the target base with an adapter answers to the held-out messages."""
        base = self.target_base
        model, tokenizer = load_adapted(base, {"moved": adapter}), base.tokenizer()
        prompts = [FORM.encode(message.text, tokenizer) for message in self.held_out]
        limits = Limits.of(model, tokenizer, ANSWER_TOKENS, "\n")
        return [found.text.strip() for found in answers(model, tokenizer, prompts, limits, BATCH)]

    def share(self, answered: Sequence[str], code: str) -> float:
        """Exact match of answers with a code."""
        wanted = [item.answer.strip() for item in self.items(code)]
        return sum(found == right for found, right in zip(answered, wanted, strict=True)) / len(wanted)

    def synthetic(self, name: str, method: str = "trans-lora") -> list[tuple[str, str]]:
        """The inputs of a run and the teacher's answers to them."""
        stages = self.folder / name / "stages"
        record = json.loads((stages / "units" / f"label-{method}.json").read_text(encoding="utf-8"))
        rows = json.loads((stages / "objects" / record["output"]).read_bytes())
        return [(text, answer) for _, text, answer, _ in rows]

    def _work(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def shuffled(inputs: LabelledInputs) -> LabelledInputs:
    """The same training inputs with labels that say nothing: half of either kind has the other's. What is held out is
    as it was."""
    real, invented = inputs.real, inputs.invented
    return LabelledInputs(
        real=(*real[::2], *invented[1::2]),
        invented=(*invented[::2], *real[1::2]),
        held_out_real=inputs.held_out_real,
        held_out_invented=inputs.held_out_invented,
    )


def _digest(folder: Path) -> str:
    return canonical_digest([path.read_bytes().hex() for path in sorted(folder.iterdir())])
