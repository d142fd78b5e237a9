"""Validation in a process of its own: a file that crashes its reader, or takes too much memory, takes only that along.

The reader of Parquet is native code, and a damaged file can make it abort. Large files go here too, so that the other
threads of the server go on while theirs are read.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from artifacts.errors import ArchiveRefused, FieldError, FileBroken, RankwiseError, TooLarge
from train.records import Column, DatasetInfo, Kind, Limits, Suitability
from train.rows import Format, inspect

MEMORY_BYTES = 6 * 1024**3  # of address space: what a row group may take, several times over
CPU_SECONDS = 2 * 3600
_ROOT = Path(__file__).resolve().parent.parent
_ERRORS: dict[str, type[RankwiseError]] = {error.code: error for error in (FileBroken, TooLarge, ArchiveRefused)}
_LOG_BYTES = 4000


def inspect_apart(path: Path, format: Format, limits: Limits = Limits()) -> DatasetInfo:  # noqa: A002
    """As `train.rows.inspect`, in another process that ends with this one. Blocks.

    Raises:
        FileBroken, TooLarge: as `inspect` does; and FileBroken if the reader crashed.
        RuntimeError: the other process failed for another reason; says what it wrote.
    """
    request = json.dumps({"path": str(path), "format": format, "limits": asdict(limits)})
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-P", "-m", "train.inspection", request]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(  # noqa: S603 (our own module)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        ) as reader:
            assert reader.stdout is not None
            try:
                answer = reader.stdout.read()
            except BaseException:
                reader.kill()
                raise
        if reader.returncode < 0:
            name = signal.Signals(-reader.returncode).name
            raise FileBroken(
                f"Reading the file ended with {name}: it is damaged, or takes too much memory or time.",
                hint="Write it again; a Parquet file with smaller row groups.",
            )
        if reader.returncode > 0:
            log.seek(max(0, log.tell() - _LOG_BYTES))
            raise RuntimeError(f"the validation of a dataset failed: {log.read().decode(errors='replace')}")
    return _result(json.loads(answer))


def _result(answer: dict[str, Any]) -> DatasetInfo:
    if "error" in answer:
        error = answer["error"]
        findings = [FieldError(pointer, message) for pointer, message in error["errors"]]
        raise _ERRORS[error["code"]](error["detail"], hint=error["hint"], errors=findings)
    columns = tuple(
        Column(**{**column, "kinds": tuple(Kind(**kind) for kind in column["kinds"])}) for column in answer["columns"]
    )
    tasks = tuple(Suitability(**{**task, "columns": tuple(task["columns"])}) for task in answer["tasks"])
    return DatasetInfo(answer["rows"], columns, tuple(answer["problems"]), tasks)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        info = inspect(Path(request["path"]), cast("Format", request["format"]), Limits(**request["limits"]))
    except MemoryError:
        error: RankwiseError = FileBroken("Reading the file takes too much memory.")
    except (FileBroken, TooLarge, ArchiveRefused) as refusal:
        error = refusal
    else:
        return asdict(info)
    findings = [(finding.pointer, finding.message) for finding in error.errors]
    return {"error": {"code": error.code, "detail": error.detail, "hint": error.hint, "errors": findings}}


def _end_with_parent() -> None:
    """The parent holds the other end of standard input until it has the answer, or is gone."""
    sys.stdin.buffer.read()
    os._exit(1)


def main(request: str) -> None:
    """What the other process does: one file in, one JSON document out."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
    ):
        hard = resource.getrlimit(limit)[1]
        if hard == resource.RLIM_INFINITY or value < hard:
            resource.setrlimit(limit, (value, hard))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.write(json.dumps(_answer(json.loads(request))))
    sys.stdout.flush()
    os._exit(0)  # the thread that watches the parent blocks, and nothing is left to tidy up


if __name__ == "__main__":
    main(sys.argv[1])
