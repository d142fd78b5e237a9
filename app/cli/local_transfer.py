"""A transfer of files on this machine with no service: the same pipeline that a job uses.

What is done is kept beside the output until the transfer has ended: an interrupted one goes on when started again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import FieldError, RequestInvalid

if TYPE_CHECKING:
    from transfer.weight_transfer import BaseWeights

REPORT_FILE = "transfer_report.json"


@dataclass(frozen=True, slots=True)
class LocalTransfer:
    """What is asked for. `body` is one of POST /transfer, but for the files, which are named here."""

    adapter: Path
    source: Path
    target: Path
    body: Mapping[str, Any]
    holdout: Path | None = None
    inputs: Path | None = None


class _Watcher:
    """Shows progress; the transfer is stopped by the keyboard."""

    def __init__(self, advance: Callable[[float, str], None]) -> None:
        self._advance = advance
        self._fraction = 0.0

    def unit(self, stage: str, message: str) -> None:
        from transfer.bench import STAGE_SHARES

        self._fraction = max(self._fraction, STAGE_SHARES[stage])
        self._advance(self._fraction, message)

    def stop_wanted(self) -> bool:
        return False

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        from transfer.bench import STAGE_SHARES

        begin, end = STAGE_SHARES["train"], STAGE_SHARES["evaluate"]
        self._advance(begin + (end - begin) * step / total, f"step {step} of {total}, loss {values['loss']:.4g}")

    def kept(self) -> None:
        return


def transfer_local(
    asked: LocalTransfer, output: Path, *, device: str, progress: Callable[[float, str], None]
) -> dict[str, Any]:
    """Move the adapter into the new folder `output` and return the report, which is also written beside the weights.

    The adapter is written whatever the gate says: nothing is published here.

    Raises:
        RankwiseError: whatever the job would end with.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestInvalid(f"{output} is there already and not empty.", hint="Choose another -o, or remove it.")
    progress(0.0, "load torch")
    from artifacts.intake import inspect
    from merge.engine_form import fit_engine
    from transfer.bench import TransferInputs
    from transfer.catalog import find_method, parse_parameters
    from transfer.engine_outlook import check_transferred
    from transfer.evaluation import Item
    from transfer.gate_settings import GateSettings
    from transfer.identity import TransferIdentity
    from transfer.owner_rows import INPUT_COLUMNS, ITEM_COLUMNS
    from transfer.pipeline import transfer
    from transfer.prompts import PromptFormat
    from transfer.seeds import parse_seeds, seeds_digest

    body = asked.body
    method = find_method(body["method"])
    options = parse_parameters(method.name, body.get("parameters") or {})
    engine = body.get("target_engine")
    if engine is not None:
        check_transferred(options, engine)
    form = PromptFormat.model_validate(body.get("format") or {})
    seeds = None if body.get("seeds") is None else parse_seeds(body["seeds"])
    source, target = _base(asked.source), _base(asked.target)
    kept = _rows(asked.inputs, INPUT_COLUMNS, "/inputs")
    seed = int(body.get("seed") or 0)
    identity = TransferIdentity(
        adapter=inspect(asked.adapter).identity_digest,
        source_base=source.digest,
        target_base=target.digest,
        seeds=None if seeds is None else seeds_digest(seeds),
        discriminator=None,
        task=body.get("task"),
        format=form.model_dump(mode="json"),
        method=method.name,
        parameters=options.decisive(),
        seed=seed,
        inputs=None if asked.inputs is None else seeds_digest([row[0] for row in kept]),
    )
    folder = output.parent / f".rankwise-transfer-{identity.key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = TransferInputs(
        adapter=asked.adapter,
        source=source,
        target=target,
        prompt_format=form,
        key=identity.key,
        seed=seed,
        folder=folder,
        cache=folder / "subspaces",
        seeds=seeds or (),
        inputs=tuple(row[0] for row in kept),
        holdout=tuple(Item(x, answer) for x, answer in _rows(asked.holdout, ITEM_COLUMNS, "/holdout")),
        device=device,
    )
    gate = GateSettings.model_validate(body.get("gate") or {})
    result = transfer(method, options, inputs, gate, _Watcher(progress), tuple(body.get("controls") or ()))
    verdict = "hold" if result.gate is None else result.gate.verdict
    report = {**result.report, "verdict": verdict, "seed": seed, "parameters": options.model_dump(mode="json")}
    made = result.adapter
    if engine is not None:
        made, report["target_engine"] = fit_engine(made, engine, folder / "for-engine")
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (made / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    if output.exists():
        output.rmdir()
    made.rename(output)
    shutil.rmtree(folder)
    return report


def _base(folder: Path) -> BaseWeights:
    """Raises RequestInvalid when nothing is known of its weights or its tokenizer."""
    from artifacts.base_model import inspect_base
    from train.base_files import BaseFiles
    from transfer.identity import base_identity
    from transfer.weight_transfer import BaseWeights

    ref = inspect_base(folder)
    if ref.weights_digest is None or ref.tokenizer_digest is None:
        problem = f"{folder} holds no weights or no tokenizer"
        raise RequestInvalid(f"{problem}.", errors=[FieldError(str(folder), problem)])
    return BaseWeights(BaseFiles(folder.name, str(folder)), base_identity(ref.weights_digest, ref.tokenizer_digest))


def _rows(path: Path | None, columns: tuple[str, ...], pointer: str) -> list[tuple[str, ...]]:
    from train.rows import find_format, inspect
    from transfer.owner_rows import read_texts

    if path is None:
        return []
    form = find_format(path, path.name)
    inspect(path, form)
    return read_texts(path, form, columns, pointer)
