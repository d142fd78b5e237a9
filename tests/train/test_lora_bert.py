"""LoRA-BERT and the task transcript-classification: what is read, split, trained, exported and refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors import safe_open
from transcript_rows import SHAPE, TASK, transcripts, write_fasta
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from artifacts.errors import FileBroken, RequestInvalid
from artifacts.intake import inspect
from train.base_files import BaseFiles
from train.catalog import METHODS, find_method, parse_parameters
from train.data import DataFile
from train.estimate import estimate
from train.kmer_bert import write_kmer_bert
from train.options.common import Circumstances, Target
from train.protocol import MethodContext
from train.quiet import peft_deprecations_ignored
from train.settings import EvaluationSettings, TrainingSettings, TranscriptClassificationTask
from train.splits import split_of
from train.targets import check_method
from train.tasks.classification import LABELS_KEY
from train.tasks.protocol import TaskContext
from train.tasks.transcript_classification import KMERS_KEY, TranscriptClassification
from train.transcripts.kmers import all_kmers
from train.transcripts.nucleotides import codes_of, text_of
from train.transcripts.shuffling import dinucleotide_shuffle

HALF = EvaluationSettings(validation_fraction=0.5)
MODES = {
    "lora": ({"rank": 4, "dropout": 0.1}, 0.03),
    "full": ({"mode": "full"}, 0.01),
}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def task_of(base: Path, folder: Path, **settings: Any) -> TranscriptClassification:
    wanted = TranscriptClassificationTask.model_validate(TASK | settings)
    context = TaskContext(BaseFiles("acme/kmers", str(base)), TrainingSettings(), "cpu", 0, folder)
    return TranscriptClassification(wanted, context)


def read(task: TranscriptClassification, folder: Path, records: Any, evaluation: EvaluationSettings = HALF) -> Any:
    return task.read(DataFile(write_fasta(folder / "records.fa", records), "fasta"), evaluation)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_learns_resumes_to_the_bit_and_says_what_simpler_models_reach(
    transcript_trainings: Any, mode: str
) -> None:
    parameters, rate = MODES[mode]
    settings = {"steps": 24, "learning_rate": rate, "checkpoint_steps": 13, "gradient_accumulation": 1}
    settings["evaluation"] = {"validation_fraction": 0.3}
    report, made, whole = transcript_trainings.run("lora-bert", parameters, task=TASK, **settings)
    after, before = report.evaluation["after"], report.evaluation["before"]
    assert after["loss"] < before["loss"] - 0.1
    assert after["auroc"] > 0.9
    assert {"full_auroc", "partial_mcc", "sensitivity"} <= after.keys()
    assert report.reload["largest_difference"] <= 1e-4 < report.reload["effect"]
    assert report.data["controls"].keys() == {"length", "orf_length", "kmer_counts"}
    assert report.data["controls"]["kmer_counts"]["auroc"] > 0.9
    # One class is of A and T: no order is needed to tell that.
    assert report.evaluation["shuffled"].keys() == after.keys()
    assert report.evaluation["shuffled"]["auroc"] > after["auroc"] - 0.02
    assert any("by composition and not by order" in warning for warning in report.warnings)
    assert after.keys() == report.data["controls"]["length"].keys()
    again, resumed, _ = transcript_trainings.run(
        "lora-bert", parameters, task=TASK, resume=whole.checkpoints[13], **settings
    )
    assert again.resumed_at == 13
    assert digests(resumed) == digests(made)
    assert again.evaluation == report.evaluation


def test_the_files_of_a_mode_are_read_by_stock_libraries(transcript_trainings: Any, tiny_kmer_bert: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "task": TASK}
    _, adapter, _ = transcript_trainings.run("lora-bert", {}, learning_rate=0.002, **settings)
    manifest = inspect(adapter)
    assert (manifest.method, manifest.mergeable) == ("lora", False)
    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        metadata = file.metadata()
    assert json.loads(metadata[LABELS_KEY]) == ["mRNA", "lncRNA"]
    read_as = json.loads(metadata[KMERS_KEY])
    assert (read_as["k"], read_as["stride"], read_as["max_length"]) == (3, 1, 128)
    assert len(read_as["vocabulary_sha256"]) == len(read_as["base_sha256"]) == 64
    base = AutoModelForSequenceClassification.from_pretrained(tiny_kmer_bert)
    with peft_deprecations_ignored():
        PeftModel.from_pretrained(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer("acg UUU").input_ids == AutoTokenizer.from_pretrained(tiny_kmer_bert)("ACG ttt").input_ids

    _, model, _ = transcript_trainings.run("lora-bert", {"mode": "full"}, learning_rate=0.0005, **settings)
    assert sorted(path.name for path in model.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded, info = AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.id2label == {0: "mRNA", 1: "lncRNA"}


def test_a_second_stage_begins_where_the_first_ended_and_a_new_head_only_where_there_is_none(
    transcript_trainings: Any, tiny_encoder: Path, tiny_kmer_bert: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "task": TASK,
        "learning_rate": 0.005,
        "steps": 8,
        "evaluation": {"validation_fraction": 0.3},
    }
    first, model, _ = transcript_trainings.run("lora-bert", {"mode": "full"}, **settings)
    transcript_trainings.base_files = BaseFiles("acme/stage-1", str(model))
    second, _, _ = transcript_trainings.run("lora-bert", {"rank": 2}, **settings)
    assert second.evaluation["before"] == pytest.approx(first.evaluation["after"], abs=1e-4)
    # Labels of another meaning: the head is new.
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (model / "config.json").write_text(json.dumps(config))
    other, _, _ = transcript_trainings.run("lora-bert", {"rank": 2}, **settings)
    assert other.evaluation["before"]["auroc"] != pytest.approx(first.evaluation["after"]["auroc"], abs=1e-4)
    with pytest.raises(RequestInvalid, match="tokenizer lacks 64 of the 64 3-mers"):
        task_of(tiny_encoder, tmp_path)


def test_a_low_rank_training_has_base_head_and_factors_and_nothing_else(tiny_kmer_bert: Path, tmp_path: Path) -> None:
    """At its first step the model is base and head; merged it is the same function."""
    task = task_of(tiny_kmer_bert, tmp_path)
    examples = read(task, tmp_path, transcripts())
    model = task.load()
    assert list(task.whole(model)) == ["classifier", "bert.pooler"]
    plain = task.predict(model, examples.validation[:4])
    layers = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    targets = [name for name in layers if "encoder" in name]
    assert len(targets) == 6 * SHAPE.layers
    options = parse_parameters("lora-bert", {"rank": 2})
    assert options.numerator == 4.0  # type: ignore[attr-defined]  # alpha 16 at rank 8
    method = METHODS["lora-bert"].load(options)
    context = MethodContext(
        targets, 1, lambda: iter(()), TrainingSettings(), task_type="SEQ_CLS", whole=task.whole(model)
    )
    torch.manual_seed(0)
    trained = method.prepare(model, context).eval()
    for one, other in zip(plain, task.predict(trained, examples.validation[:4]), strict=True):
        assert float((one - other).abs().max()) < 1e-6
    trainable = {name for name, value in trained.named_parameters() if value.requires_grad}
    assert len([name for name in trainable if ".lora_A." in name or ".lora_B." in name]) == 2 * len(targets)
    assert all(".lora_" in name or ".modules_to_save." in name for name in trainable)
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if ".lora_B." in name:
                value.normal_()
    moved = task.predict(trained, examples.validation[:4])
    merged = task.predict(trained.merge_and_unload(), examples.validation[:4])  # type: ignore[operator]
    for one, other, first in zip(moved, merged, plain, strict=True):
        assert float((one - other).abs().max()) < 1e-5
        assert float((one - first).abs().max()) > 1e-3


def test_padding_truncation_case_and_u(tiny_kmer_bert: Path, tmp_path: Path) -> None:
    task = task_of(tiny_kmer_bert, tmp_path, views="full")
    records = transcripts(12)
    long = "ATG" + "ACG" * 60
    changed = long[:140] + "T" + long[141:]
    records += [("L1 gene=L1 label=mRNA", long), ("L2 gene=L2 label=lncRNA", changed)]
    records += [("L3 gene=L3 label=mRNA", long[:100] + "A" + long[101:])]
    examples = read(task, tmp_path, records, EvaluationSettings(validation_fraction=0))
    assert examples.report["cut_views"] == 3
    assert examples.report["controls"] == {}
    views = {view.record: view for view in examples.train}
    model = task.load()
    alone = task.predict(model, list(views.values()))
    batch = task.collate(list(views.values()))
    del batch["labels"]
    assert int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    with torch.no_grad():
        together = model(**batch).logits
    assert float((together - torch.stack(alone)).abs().max()) < 1e-5
    one, other, inside = (views[len(records) - 2 + place].ids for place in (0, 1, 2))
    assert one.tolist() == other.tolist()  # 126 k-mers end at the 128th nucleotide
    assert one.tolist() != inside.tolist()
    spelled = [
        ("A1 gene=A label=mRNA", records[0][1].lower().replace("t", "u")),
        ("B1 gene=B label=lncRNA", records[1][1]),
    ]
    (first, _) = read(task, tmp_path, spelled, EvaluationSettings(validation_fraction=0)).train
    assert first.ids.tolist() == views[1].ids.tolist()


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_shuffled_inputs_have_as_many_tokens_of_what_the_model_reads(
    tiny_kmer_bert: Path, tmp_path: Path, stride: int
) -> None:
    task = task_of(tiny_kmer_bert, tmp_path, stride=stride, max_length=24)
    examples = read(task, tmp_path, transcripts(40))
    assert examples.report["cut_views"] > 0
    model = task.load()
    for view in examples.validation:
        assert task.kmers.encode(view.read, stride).tolist() == view.ids.tolist()
        shuffled = task._shuffled(view)
        assert len(shuffled.ids) == len(view.ids)
        assert sorted(shuffled.read.tolist()) == sorted(view.read.tolist())
        assert shuffled.ids.tolist() == task._shuffled(view).ids.tolist()
    assert any(task._shuffled(view).ids.tolist() != view.ids.tolist() for view in examples.validation)
    found = task.measure_more(model, examples.validation, HALF)["shuffled"]
    assert found != task.score(model, examples.validation, HALF, lambda _: None).to_dict()


class CountsOneWord(torch.nn.Module):
    """Says lncRNA by how often a token is in the input."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token, self.place = token, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        counts = ((input_ids == self.token) * attention_mask).sum(1).float()
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(counts), counts], 1))


def test_what_only_order_tells_is_gone_from_shuffled_inputs(tiny_kmer_bert: Path, tmp_path: Path) -> None:
    """One class is the other one with its nucleotides shuffled: as often as there is each dinucleotide in both."""
    drawn = np.random.default_rng(0)
    ordered = ["ACG" * drawn.integers(0, 3) + "GCATTC" * drawn.integers(12, 18) for _ in range(40)]
    shuffled = [text_of(dinucleotide_shuffle(codes_of(text), drawn)) for text in ordered]
    records = [(f"A{number} label=lncRNA", text) for number, text in enumerate(ordered)]
    records += [(f"B{number} label=mRNA", text) for number, text in enumerate(shuffled)]
    task = task_of(tiny_kmer_bert, tmp_path, views="full")
    examples = read(task, tmp_path, records)
    model = CountsOneWord(int(task.kmers.ids[all_kmers(3).index("GCA")]))
    assert task.score(model, examples.validation, HALF, lambda _: None).to_dict()["auroc"] == 1.0
    found = task.measure_more(model, examples.validation, HALF)["shuffled"]["auroc"]
    assert 0.3 < found < 0.7
    after = task.score(model, examples.validation, HALF, lambda _: None)
    assert not any("by composition" in remark for remark in task.remarks(after))


def test_what_belongs_together_is_held_out_together(tiny_kmer_bert: Path, tmp_path: Path) -> None:
    """Isoforms of a gene, both views of a transcript, and the same sequence under other names."""
    records = transcripts(40)
    copies = [
        (f"copy{number} gene=C{number} {header.split()[-1]}", text) for number, (header, text) in enumerate(records)
    ]
    task = task_of(tiny_kmer_bert, tmp_path)
    examples = read(task, tmp_path, records + copies)
    sides = {}
    for side, views in (("train", examples.train), ("validation", examples.validation)):
        for view in views:
            header, text = (records + copies)[view.record - 1]
            for key in (f"gene {header.split()[1]}", f"record {view.record}", text, view.ids.tobytes()):
                assert sides.setdefault(key, side) == side
    assert len(examples.validation) + len(examples.train) == 2 * 80 - examples.report["left_out"].get(
        "no_reading_frame", 0
    )
    assert {view.non_coding for view in examples.validation} == {0, 1}
    # Rows that are added elsewhere move nobody.
    more = read(task, tmp_path, [*transcripts(60, seed=9)[40:], *records, *copies])
    before = {view.ids.tobytes() for view in examples.validation}
    assert before <= {view.ids.tobytes() for view in more.validation}
    assert split_of({"group": examples.train[0].group}, 0.5) == "train"


def test_what_is_left_out_is_counted(tiny_kmer_bert: Path, tmp_path: Path) -> None:
    records = transcripts(40)
    records += [
        ("S label=lncRNA", "ACGT" * 7),
        ("N label=lncRNA", "ACGTN" * 20),
        ("F label=lncRNA", "AACC" * 20),
        ("R label=retained_intron", "ACGT" * 30),
        ("R2 label=retained_intron", "ACGA" * 30),
    ]
    task = task_of(tiny_kmer_bert, tmp_path)
    report = read(task, tmp_path, records).report
    assert report["left_out"] == {"short": 1, "other_letters": 1, "no_reading_frame": 1}
    assert report["other_labels"] == {"retained_intron": 2}
    assert report["views"] == {"full": 41, "partial": 40}
    only = task_of(tiny_kmer_bert, tmp_path, overlong="drop", max_length=100, views="full")
    assert read(only, tmp_path, records).report["left_out"]["long"] > 0
    with pytest.raises(RequestInvalid, match="tokens, 70 are allowed") as caught:
        read(task_of(tiny_kmer_bert, tmp_path, overlong="error", max_length=70), tmp_path, records)
    assert caught.value.errors[0].pointer == "/task/overlong"


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (transcripts(1), "The training rows have no lncRNA"),
        (transcripts(40)[1::2], "have no mRNA"),
        ([(header.replace("gene=", "gene=one x="), text) for header, text in transcripts(9)], " row is left"),
        ([("T1 gene=a", "ACGT" * 20)], "row 1: `label` is no biotype"),
    ],
)  # fmt: skip
def test_rows_that_teach_nothing_are_refused(tiny_kmer_bert: Path, tmp_path: Path, records: Any, words: str) -> None:
    with pytest.raises((RequestInvalid, FileBroken), match=words):
        read(task_of(tiny_kmer_bert, tmp_path), tmp_path, records)


@pytest.mark.parametrize(
    ("parameters", "training", "pointer"),
    [
        ({"mode": "full", "rank": 4}, {}, "/parameters/rank"),
        ({"mode": "full", "target_modules": ["query"]}, {}, "/parameters/target_modules"),
        ({"mode": "full"}, {"precision": "bfloat16"}, "/training/precision"),
        ({"rank": 9}, {}, "/parameters/rank"),
    ],
)
def test_what_does_not_go_together_is_refused(parameters: Any, training: Any, pointer: str) -> None:
    options = parse_parameters("lora-bert", parameters)
    known = Circumstances([Target("bert.encoder.layer.0.attention.self.query", 8, 8)], TrainingSettings(**training))
    with pytest.raises(RequestInvalid) as caught:
        check_method(options, known)
    assert [finding.pointer for finding in caught.value.errors] == [pointer]


def test_options_of_mode_and_task() -> None:
    with pytest.raises(RequestInvalid, match="the task causal-lm") as caught:
        find_method("lora-bert").check_task("causal-lm")
    assert caught.value.errors[0].pointer == "/task/type"
    wrongs: list[dict[str, Any]] = [{"k": 7}, {"stride": 0}, {"max_length": 8}, {"positive_labels": ["mRNA"]}]
    for wrong in wrongs:
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            TranscriptClassificationTask.model_validate(wrong)
    known = Circumstances([], TrainingSettings(learning_rate=0.002))
    assert parse_parameters("lora-bert", {}).warnings(known) == []
    assert "5e-5" in parse_parameters("lora-bert", {"mode": "full"}).warnings(known)[0]


def test_an_estimate_of_all_weights_counts_each_of_them_once() -> None:
    linear = {"a": (30, 20), "b": (20, 30)}
    targets = [Target(path, *sides) for path, sides in linear.items()]
    options = parse_parameters("lora-bert", {"mode": "full"})
    found = estimate(options, targets, linear, TrainingSettings(), TranscriptClassificationTask(), 1500)
    assert (found.trainable_parameters, found.base_bytes) == (1200, 4 * 300)
    assert found.floor_bytes == 4 * 300 + 16 * 1200


def test_a_base_model_is_the_same_for_the_same_seed_and_no_other(tmp_path: Path) -> None:
    shape = replace(SHAPE, k=2)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        write_kmer_bert(folder, shape, seed)
    first, second, third = map(digests, folders)
    assert first == second
    assert first["model.safetensors"] != third["model.safetensors"]
    with pytest.raises(RequestInvalid, match="not empty"):
        write_kmer_bert(folders[0], shape)
    with pytest.raises(RequestInvalid, match="no multiple of 5 heads"):
        write_kmer_bert(tmp_path / "d", replace(shape, heads=5))
