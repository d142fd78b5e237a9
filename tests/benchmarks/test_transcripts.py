"""LoRA-BERT on real windows of one length: what an adapter gains on a classifier alone, and what it goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transcripts import SHAPE, HeadAlone, run
from examples.lncrna.sequences import SPECIES, coding_and_untranslated, fasta
from train.catalog import parse_parameters
from train.kmer_bert import write_kmer_bert
from train.methods.lora_bert import make
from train.options.lora_bert import LoraBertOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_an_adapter_beats_a_head_alone_at_equal_steps_and_goes_by_composition(tmp_path: Path) -> None:
    """Windows in and out of reading frames, on a base with first values; after a first stage the head does as well."""
    data = tmp_path / "windows.fa"
    data.write_bytes(fasta(coding_and_untranslated([name for name in SPECIES if name != "human"], 150, 6)))
    write_kmer_bert(tmp_path / "base", SHAPE, 0)
    options = parse_parameters("lora-bert", {"rank": 8})
    assert isinstance(options, LoraBertOptions)
    found = {}
    for name, method in (("adapter", make(options)), ("head", HeadAlone(options))):
        (tmp_path / name).mkdir()
        report = run(method, tmp_path / "base", data, tmp_path / name, 0, steps=200, learning_rate=0.003)
        found[name] = report.evaluation
        controls = report.data["controls"]
    adapter, head = (found[name]["after"]["auroc"] for name in ("adapter", "head"))
    shuffled = found["adapter"]["shuffled"]["auroc"]
    print(f"adapter {adapter:.3f}, head {head:.3f}, adapter on shuffled windows {shuffled:.3f}, {controls}")
    assert controls["length"]["auroc"] == pytest.approx(0.5)
    assert adapter >= head
    # The order of the nucleotides is no part of what 200 steps teach it: on shuffled windows it is as good.
    assert abs(shuffled - adapter) < 0.05
