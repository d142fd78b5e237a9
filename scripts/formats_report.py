"""What Rankwise makes of every layout of its corpus, by headers alone: the first table of `make formats-report`.

The corpus is names, shapes, dtypes and metadata of files that people have, with what a reference engine does with them
(diffusers, PEFT); no weights. Each layout is read from its header alone, as an upload is, and lands in one class:

* accepted: every ΔW is understood and the adapter merges;
* kept: stored and described, refused by name by whatever needs a low-rank ΔW;
* partial: stored, and the answer names what was left out;
* refused: not stored, with a reason;
* silent: a key without a verdict, or another result than the layout's expectation. There must be none.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import FileBroken, PickleRefused, RankwiseError
from artifacts.gguf_file import ENCODINGS, GgufHeader, GgufTensor
from artifacts.gguf_intake import understand_gguf
from artifacts.layout import CONFIG_NAME, AdapterLayout, understand
from artifacts.safetensors_header import DTYPE_BYTES, SafetensorsHeader, TensorInfo

CORPUS = Path(__file__).parent.parent / "tests" / "artifacts" / "corpus" / "layouts.json.xz"
CLASSES = ("accepted", "kept", "partial", "refused", "silent")


EXPECTED: Mapping[Any, tuple[str, ...]] = {
    True: ("accepted",),
    False: ("kept", "partial", "refused"),
    "partial": ("accepted", "kept", "partial"),
    "after conversion": ("kept",),
    "after collapse": ("accepted",),
    "needs base": ("kept",),
    "ambiguous": ("accepted",),  # each of the two adapters by itself; the upload of both is refused
}
"""What `mergeable_as_lora` of a layout's expectation allows."""

SEEN_OTHERWISE = {
    "peft-other/miss-llama-small": "MiSS in its tile form is exactly a LoRA",
    "malformed/var-wrong-base-shapes": "it fits itself; what it does not fit is its base, which an upload names",
    "kohya/qwen-kohya-invoke": "its modules are LoKr's, whatever its expectation says",
    "gguf/gguf-mixtral-experts-embd": "llama.cpp's stacks of experts are not read",
    "legacy/litgpt-lora": "LitGPT's own files are pickles",
    "legacy/torchtune-native-adapter": "torchtune's own files are pickles",
    "legacy/mistral-finetune-native": "the scaling stands in params.json, which is not there",
}
"""Layouts whose expectation is another than Rankwise's, with the reason."""


@dataclass(frozen=True)
class Row:
    """One layout: what it became, and why if it is not accepted."""

    name: str
    outcome: str
    reason: str
    layout: AdapterLayout | None = None
    error: RankwiseError | None = None

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]


class CorpusValues:
    """The few numbers that a layout of the corpus prescribes."""

    def __init__(self, layout: Mapping[str, Any]) -> None:
        self._values: Mapping[str, float] = layout.get("values", {})
        self._fill: Mapping[str, str] = layout.get("fill", {})

    def scalar(self, info: TensorInfo) -> float:
        if info.elements != 1:
            raise FileBroken(f"{info.name!r} has shape {info.shape}; one number is expected.")
        if info.name in self._values:
            return float(self._values[info.name])
        for pattern, value in self._values.items():
            if pattern.startswith("re:") and re.search(pattern[3:], info.name):
                return float(value)
        return float(self._values.get("*.alpha", 1.0))

    def zero_outside(self, info: TensorInfo, blocks: tuple[tuple[int, int, int, int], ...], probe: bool) -> bool:
        return any(re.search(pattern[3:], info.name) for pattern in self._fill)


def layouts() -> dict[str, Any]:
    """Name → layout: `tensors` {key: [dtype, shape]}, `metadata`, `files`, `container` and `expected`."""
    found: dict[str, Any] = json.loads(lzma.decompress(CORPUS.read_bytes()))
    return {name: {"name": name, **layout} for name, layout in found.items()}


def header_of(layout: Mapping[str, Any]) -> SafetensorsHeader:
    """The header that a file of this layout has."""
    position, tensors = 0, {}
    for key, (dtype, shape) in layout["tensors"].items():
        info = TensorInfo(key, dtype, tuple(shape), position, position)
        position += info.elements * DTYPE_BYTES[dtype]
        tensors[key] = TensorInfo(key, dtype, tuple(shape), info.begin, position)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _metadata(layout).items()}
    return SafetensorsHeader(tensors, texts, 0, position)


def _metadata(layout: Mapping[str, Any]) -> Mapping[str, Any]:
    return layout.get("metadata") or {}


def read(layout: Mapping[str, Any]) -> AdapterLayout:
    """Understand a layout as an upload of it is understood.

    Raises:
        RankwiseError: it is refused.
    """
    if layout.get("container") == "torch-zip":
        raise PickleRefused("The weights are a pickle.")
    if layout.get("container") == "gguf":
        understand_gguf(_gguf_header(layout), None)
    document = document_of(layout)
    return understand(header_of(layout), CorpusValues(layout), document, Path("weights"), Path(CONFIG_NAME))


def _gguf_header(layout: Mapping[str, Any]) -> GgufHeader:
    encodings = {encoding.name: encoding for encoding in ENCODINGS.values()}
    tensors = {
        key: GgufTensor(key, encodings[dtype], tuple(shape), 0, 0) for key, (dtype, shape) in layout["tensors"].items()
    }
    return GgufHeader(_metadata(layout), frozenset(), tensors)


def document_of(layout: Mapping[str, Any]) -> Any:
    """The adapter_config.json of a layout; None if it has none."""
    document = layout.get("files", {}).get(CONFIG_NAME)
    return json.loads(document) if isinstance(document, str) else document


def classify(name: str, layout: Mapping[str, Any]) -> Row:
    """What becomes of one layout."""
    try:
        found = read(layout)
    except RankwiseError as error:
        return _as_expected(layout, Row(name, "refused", f"{error.code}: {error.detail}", error=error))
    fault = _fault(layout, found)
    if fault is not None:
        return Row(name, "silent", fault, found)
    reasons = "; ".join(found.refusals)
    if found.reading is not None and found.reading.partial:
        return _as_expected(layout, Row(name, "partial", reasons, found))
    return _as_expected(layout, Row(name, "kept" if reasons else "accepted", reasons, found))


def _as_expected(layout: Mapping[str, Any], row: Row) -> Row:
    """The row; as "silent" if the layout's expectation is another and no reason is given for it."""
    wanted = layout["expected"]["mergeable_as_lora"]
    if row.outcome in EXPECTED[wanted] or row.name in SEEN_OTHERWISE:
        return row
    return Row(row.name, "silent", f"{row.outcome}, and {wanted!r} was expected of mergeable", row.layout)


def _fault(layout: Mapping[str, Any], found: AdapterLayout) -> str | None:
    """What contradicts the layout's expectation, or was passed over."""
    expected = layout["expected"]
    verdicts = found.verdicts
    if len(verdicts) != len(layout["tensors"]) or {item.key for item in verdicts} != layout["tensors"].keys():
        return "a key has no verdict"
    if any(item.use == "ignored" and not item.note for item in verdicts):
        return "a key is ignored without a reason"
    count = _modules(found)
    if count not in (None, expected["n_modules"]):
        return f"{count} modules instead of {expected['n_modules']}"
    if found.modules and "ranks_in_file" in expected and not (found.reading is not None and found.reading.partial):
        whole = {item.a_key or item.block_key: item for item in found.modules}.values()
        ranks = Counter(str(item.rank) for item in whole)
        if not any(item.rank_span for item in found.modules) and any(
            ranks[rank] != count for rank, count in expected["ranks_in_file"].items()
        ):
            return f"ranks {dict(ranks)} instead of {expected['ranks_in_file']}"
    return _wrong_scaling(layout, found)


def _modules(found: AdapterLayout) -> int | None:
    """As the corpus counts them, layers that are stored in full with those that have factors; None of a type that is
    only named, of which no module is read."""
    if found.reading is not None:
        return found.reading.stems
    if found.config.opaque and not found.modules:
        return None
    return len(found.modules) + len({entry.key.rpartition(".")[0] for entry in found.match.ignored})


def _wrong_scaling(layout: Mapping[str, Any], found: AdapterLayout) -> str | None:
    alpha, several = layout["expected"]["alpha"], "directory" in layout or found.document.get("alpha_pattern")
    if not found.modules or several:
        return None
    if isinstance(alpha, int | float):
        other = {item.alpha for item in found.modules if item.rank_span is None} - {float(alpha)}
        return f"alpha {sorted(other)} instead of {alpha}" if other else None
    if alpha == "rank" and not found.document.get("lora_alpha") and found.reading is not None:
        other = {item.scaling for item in found.modules} - {1.0}
        return f"a scaling of {sorted(other)} where no alpha is stored" if other else None
    return None


def table(rows: list[Row]) -> str:
    """Family × class, as Markdown."""
    columns = ["family", "layouts", "as expected", *CLASSES]
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for family, members in [*families.items(), ("**all**", rows)]:
        counts = Counter(row.outcome for row in members)
        expected = sum(row.outcome != "silent" and row.name not in SEEN_OTHERWISE for row in members)
        numbers = [len(members), expected, *(counts[name] for name in CLASSES)]
        lines.append(f"| {family} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def report() -> tuple[str, list[Row]]:
    """The table, and the rows that it counts."""
    rows = [classify(name, layout) for name, layout in layouts().items()]
    return table(rows), rows
