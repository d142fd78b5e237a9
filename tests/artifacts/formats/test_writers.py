"""What every writer makes of every layout of the corpus: a refusal by name, or a file with the same modules.

Names and shapes only; the numbers are compared over HTTP, in `tests/app/test_written_downloads.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import RankwiseError, RequestInvalid
from artifacts.formats.writers import WRITERS
from artifacts.formats.writing import POINTER, Plan, subject_of
from artifacts.layout import METADATA_KEY, AdapterLayout, understand
from artifacts.manifest import AdapterManifest, IntakeReport
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo
from scripts.formats_report import CorpusValues, layouts, read

pytestmark = pytest.mark.slow

NAMES = WRITERS.keys() - {"gguf"}
"""The corpus has no configuration of a base model, without which no GGUF file is written."""


def manifest_of(layout: AdapterLayout) -> AdapterManifest:
    refusals, modules = layout.refusals, layout.modules
    return AdapterManifest(
        format=layout.format,
        method=layout.config.method,
        base_model=None,
        base_model_revision=None,
        rank=max((module.rank for module in modules), default=0),
        alpha=layout.config.alpha,
        target_modules=(),
        parameter_count=0,
        dtype="F32",
        files=(),
        modules=modules,
        mergeable=not refusals,
        refusal="; ".join(refusals) or None,
        weights_digest="",
        identity_digest="",
        config=layout.document,
        report=IntakeReport(used_keys=0, ignored=layout.match.ignored, facts=layout.facts),
    )


def read_back(plan: Plan, name: str) -> AdapterLayout:
    """The layout of the file that the plan makes."""
    tensors: dict[str, TensorInfo] = {}
    alphas: dict[str, float] = {}
    for pair in plan.pairs:
        for key, shape in zip((pair.a_name, pair.b_name), pair.shapes(), strict=True):
            assert key not in tensors
            tensors[key] = TensorInfo(key, "F32", shape, 0, 0)
        if pair.alpha_name:
            tensors[pair.alpha_name] = TensorInfo(pair.alpha_name, "F32", (), 0, 0)
            alphas[pair.alpha_name] = pair.alpha
    metadata = dict(plan.metadata) | ({METADATA_KEY: json.dumps(plan.config)} if plan.config else {})
    header = SafetensorsHeader(tensors, metadata, 0, 0)
    config: Any = plan.config if name == "peft" else None
    return understand(header, CorpusValues({"values": alphas}), config, Path("x"), Path("y"))


def test_what_is_written_reads_back() -> None:
    written: Counter[str] = Counter()
    for title, layout in layouts().items():
        try:
            manifest = manifest_of(read(layout))
        except RankwiseError:
            continue
        for name in NAMES:
            written[name] += _reads_back(manifest, name, title)
    assert written.keys() == NAMES
    assert min(written.values()) >= 60


def _reads_back(manifest: AdapterManifest, name: str, title: str) -> bool:
    """False where the format refuses the adapter."""
    try:
        subject = subject_of(manifest, name, None)
        plan = WRITERS[name].plan(subject)
    except RequestInvalid as error:
        assert [finding.pointer for finding in error.errors] == [POINTER]
        return False
    again = read_back(plan, name)
    modules = {module.path: module for module in again.modules}
    for item in subject.placed:
        path = item.path if name == "peft" else f"{item.component}.{item.path}"
        found = modules[path]
        assert (found.d_out, found.d_in) == (item.module.d_out, item.module.d_in), (title, path)
    if name == "peft" and subject.architecture is not None and len(modules) > 64:
        assert again.facts.architecture is not None, title
    return True
