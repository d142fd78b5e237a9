"""k-mers of a sequence as the tokens of a base model."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from artifacts.errors import FieldError, RequestInvalid
from train.transcripts.nucleotides import LETTERS, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHOWN = 5


def all_kmers(k: int) -> list[str]:
    """The 4^k k-mers, in the order of their numbers (`train.transcripts.nucleotides.words_of`)."""
    return ["".join(letters) for letters in product(LETTERS, repeat=k)]


class KmerTokens:
    """Which token of a tokenizer each k-mer is; a k-mer with another letter than A C G T is its unknown token.

    Raises:
        RequestInvalid: the tokenizer lacks k-mers, or a token for the begin or the end of a text.
    """

    def __init__(self, tokenizer: Any, k: int) -> None:
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.k = k
        kmers = all_kmers(k)
        ids = [_id_of(kmer, vocabulary) for kmer in kmers]
        missing = [kmer for kmer, found in zip(kmers, ids, strict=True) if found is None]
        self._first, self._last = tokenizer.cls_token_id, tokenizer.sep_token_id
        unknown = tokenizer.unk_token_id
        problem = None
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (" …" if len(missing) > _SHOWN else "")
            problem = f"the base model's tokenizer lacks {len(missing)} of the {len(kmers)} {k}-mers: {shown}"
        elif None in (self._first, self._last, unknown):
            problem = "the base model's tokenizer lacks one of the tokens [CLS], [SEP] and [UNK]"
        if problem is not None:
            raise RequestInvalid(
                f"T{problem[1:]}.",
                hint="Take a base model of this task.k; `rankwise models kmers` makes one.",
                errors=[FieldError("/base_model", problem)],
            )
        self.ids: NDArray[np.int32] = np.array([*ids, unknown], np.int32)
        """(4^k + 1,) the token of each k-mer, and last the unknown one."""

    def encode(self, codes: NDArray[np.uint8], stride: int) -> NDArray[np.int32]:
        """[CLS], a token for each k-mer that begins at a multiple of `stride`, [SEP]; whatever their number is."""
        words = words_of(codes, self.k, stride)
        return np.concatenate([[self._first], self.ids[words], [self._last]]).astype(np.int32)

    def cut(self, ids: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
        """At most `limit` tokens: the 3' end goes, [SEP] stays."""
        return ids if len(ids) <= limit else np.append(ids[: limit - 1], ids[-1])


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the tokenizer as transformers reads it; the same one gives the same bytes, wherever it was read from."""
    core: str = tokenizer.backend_tokenizer.to_str(pretty=True)
    (directory / "tokenizer.json").write_text(core, encoding="utf-8")
    special = {
        name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items()) if isinstance(value, str)
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _id_of(kmer: str, vocabulary: dict[str, int]) -> int | None:
    """Vocabularies write k-mers in upper or lower case, and T or U."""
    forms = (kmer, kmer.lower(), kmer.replace("T", "U"), kmer.replace("T", "U").lower())
    return next((vocabulary[form] for form in forms if form in vocabulary), None)
