"""LoRA-BERT on real windows of one length: all weights, an adapter and a head alone, against 3-mer counts.

``python -m benchmarks.transcripts [--seeds N]`` prints the table of docs/explanation/lora-bert.md. One thread, about a
minute a seed. Needs human lncRNA (`examples.lncrna.sequences`) and a network for the package with the mRNA.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.lncrna.sequences import SPECIES, coding, coding_and_untranslated, fasta, human_lncrna, of_one_length
from train.base_files import BaseFiles
from train.catalog import parse_parameters
from train.data import DataFile
from train.engine import Inputs, Plan, train_adapter
from train.follower import Silent
from train.kmer_bert import KmerBertShape, write_kmer_bert
from train.methods.lora_bert import LoraBertAdapter, make
from train.options.lora_bert import LoraBertOptions
from train.protocol import MethodContext, TrainMethod
from train.settings import EvaluationSettings, TrainingSettings, parse_task

TASK = {"type": "transcript-classification", "views": "full", "stride": 3, "max_length": 128}
SHAPE = KmerBertShape(layers=2, width=64, heads=4, inner=128, positions=128)


class HeadAlone(LoraBertAdapter):
    """The control: classifier and pooler are trained, the factors stay as they are, so that ΔW is 0."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        prepared = super().prepare(model, context)
        for name, parameter in prepared.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(False)
        return prepared


@dataclass
class Line:
    """A line of the table: AUROC, that of shuffled inputs (a network's alone), and accuracy of each seed."""

    name: str
    auroc: list[float]
    accuracy: list[float]
    seconds: float = 0.0
    parameters: int = 0
    shuffled: list[float] = field(default_factory=list)

    def add(self, figures: Mapping[str, float], shuffled: Mapping[str, float] | None = None) -> None:
        self.auroc.append(figures["auroc"])
        self.accuracy.append(figures["accuracy"])
        if shuffled is not None:
            self.shuffled.append(shuffled["auroc"])

    def shown(self) -> str:
        spread = f"{_mean(self.auroc):.3f} ({min(self.auroc):.3f}–{max(self.auroc):.3f})"
        chance = f"{_mean(self.shuffled):.3f}" if self.shuffled else ""
        count = f"{self.parameters:,}" if self.parameters else ""
        seconds = f"{self.seconds:.0f}" if self.seconds else ""
        return f"| {self.name} | {spread} | {chance} | {_mean(self.accuracy):.3f} | {count} | {seconds} |"


def run(method: TrainMethod[LoraBertOptions], base: Path, data: Path, folder: Path, seed: int, **training: Any) -> Any:
    """The report of a training into folder/out."""
    plan = Plan(
        method="lora-bert",
        options=method.options,
        task=parse_task(TASK),
        training=TrainingSettings(batch_size=32, warmup_steps=20, **training),
        evaluation=EvaluationSettings(validation_fraction=0.2, max_rows=2000),
        seed=seed,
        device="cpu",
    )
    inputs = Inputs(BaseFiles("kmers", str(base)), DataFile(data, "fasta"), folder)
    return train_adapter(plan, method, inputs, folder / "out", Silent())


def measure(seeds: Sequence[int], folder: Path) -> list[Line]:
    lncrna = human_lncrna()
    if lncrna is None:
        sys.exit("no human lncRNA: see examples/lncrna/sequences.py")
    first, second = folder / "first.fa", folder / "second.fa"
    first.write_bytes(fasta(coding_and_untranslated([name for name in SPECIES if name != "human"], 150, 6)))
    second.write_bytes(fasta(of_one_length(lncrna, coding("human"), 200, 1000)))
    whole = parse_parameters("lora-bert", {"mode": "full"})
    adapter = parse_parameters("lora-bert", {"rank": 8})
    assert isinstance(whole, LoraBertOptions)
    assert isinstance(adapter, LoraBertOptions)
    lines: dict[str, Line] = {}

    def add(name: str, method: TrainMethod[LoraBertOptions], base: Path, data: Path, seed: int, **more: Any) -> Path:
        place = folder / f"{seed}-{name}"
        place.mkdir()
        began = time.process_time()
        report = run(method, base, data, place, seed, **more)
        line = lines.setdefault(name, Line(name, [], []))
        line.add(report.evaluation["after"], report.evaluation["shuffled"])
        line.seconds += (time.process_time() - began) / len(seeds)
        line.parameters = report.trainable_parameters
        for control, figures in report.data["controls"].items():
            key = f"{name.partition(',')[0]}, logistic regression on {control.replace('_', ' ')}"
            if len(lines.setdefault(key, Line(key, [], [])).auroc) <= seed:
                lines[key].add(figures)
        return place / "out"

    for seed in seeds:
        base = folder / f"base-{seed}"
        write_kmer_bert(base, SHAPE, seed)
        made = add("CDS or UTR, all weights", make(whole), base, first, seed, steps=600, learning_rate=0.001)
        few = {"steps": 200}
        add("CDS or UTR, adapter on first values", make(adapter), base, first, seed, learning_rate=0.003, **few)
        add("CDS or UTR, head alone on first values", HeadAlone(adapter), base, first, seed, learning_rate=0.003, **few)
        add("lncRNA or mRNA, adapter", make(adapter), made, second, seed, learning_rate=0.003, **few)
        add("lncRNA or mRNA, head alone", HeadAlone(adapter), made, second, seed, learning_rate=0.003, **few)
        add("lncRNA or mRNA, all weights", make(whole), made, second, seed, learning_rate=0.001, **few)
        add("lncRNA or mRNA, adapter on first values", make(adapter), base, second, seed, learning_rate=0.003, **few)
    return sorted(lines.values(), key=lambda line: line.name)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rankwise-transcripts-") as folder:
        lines = measure(range(given.seeds), Path(folder))
    print("| | AUROC | of shuffled inputs | accuracy | trained parameters | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print(line.shown())
    if given.json is not None:
        given.json.write_text(json.dumps([vars(line) for line in lines], indent=2) + "\n", encoding="utf-8")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
