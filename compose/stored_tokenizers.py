"""The tokenizers in a pipeline's folder, by which prompts are measured before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer

from artifacts.layout import read_json
from compose.prompts import prompt_ids

_FOLDERS = ("tokenizer", "tokenizer_2")
_ENCODERS = ("text_encoder", "text_encoder_2")
_FILE = "tokenizer.json"
_MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredTokenizer:
    """One of them, as `compose.prompts` calls it.

    Attributes:
        model_max_length: tokens, with start and end.
    """

    tokenizer: Tokenizer
    model_max_length: int

    def __call__(self, text: str, **given: Any) -> SimpleNamespace:
        """`input_ids`, nothing cut off."""
        special = bool(given.get("add_special_tokens", True))
        return SimpleNamespace(input_ids=self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The words of tokens."""
        return str(self.tokenizer.decode(list(ids)))


def stored_tokenizers(folder: Path) -> list[StoredTokenizer]:
    """Those that are stored in one file, `tokenizer.json`; others are met when the pipeline is loaded."""
    found = []
    for name in _FOLDERS:
        file, config = folder / name / _FILE, folder / name / "tokenizer_config.json"
        if not (file.is_file() and config.is_file()) or file.stat().st_size > _MOST_BYTES:
            continue
        most = read_json(config).get("model_max_length")
        if isinstance(most, int):
            found.append(StoredTokenizer(_read(file, file.stat().st_mtime_ns), most))
    return found


@lru_cache(maxsize=4)
def _read(file: Path, changed: int) -> Tokenizer:
    del changed  # is part of the key
    found = Tokenizer.from_file(str(file))
    found.no_truncation()
    found.no_padding()
    return found


def check_lengths(folder: Path, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse prompts of which the end would be lost, as far as the files tell.

    Args:
        texts: each with its place in the request.

    Raises:
        ComposeRefused: see `compose.prompts.prompt_ids`.
    """
    configs = [folder / name / "config.json" for name in _ENCODERS]
    sizes = [read_json(config).get("max_position_embeddings") for config in configs if config.is_file()]
    limit = min((size for size in sizes if isinstance(size, int)), default=None)
    for tokenizer in stored_tokenizers(folder):
        for text, pointer in texts:
            prompt_ids(tokenizer, text, pointer, limit)
