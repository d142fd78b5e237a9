"""What lies in the folder of a model beside its weights. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files that a model is loaded with: configuration and tokenizer; no code and no other weights."""
MAX_CARRIED_BYTES = 64 * 2**20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def carried_files(folder: Path) -> list[Path]:
    """The files that a changed copy of the model takes over, sorted; indices of weights are among them."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix in CARRIED and _PLAIN_NAME.fullmatch(path.name)]
    return [path for path in found if path.is_file() and path.stat().st_size <= MAX_CARRIED_BYTES]


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """As the files of a model are written: the same document gives the same bytes."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
