"""What simpler models reach on the same rows: by length alone, and by how often each 3-mer occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from train.transcripts.logistic_regression import fit
from train.transcripts.nucleotides import words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTROLS = ("length", "orf_length", "kmer_counts")
"""Logistic regressions on the length of the view, on that of the longest reading frame in it, on its 3-mer counts."""
MAX_ROWS = 20_000
"""Views that a control is fitted on, evenly taken from the training rows if there are more."""
_K = 3


class Measured(Protocol):
    """A view: its class, its nucleotides, those of the longest reading frame in it, and its 3-mer counts."""

    @property
    def non_coding(self) -> int: ...

    @property
    def nucleotides(self) -> int: ...

    @property
    def frame(self) -> int: ...

    @property
    def counts(self) -> NDArray[np.int32]: ...


def counts_of(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(64,) how often each 3-mer occurs, at every nucleotide."""
    found: NDArray[np.int32] = np.bincount(words_of(codes, _K), minlength=4**_K + 1)[: 4**_K].astype(np.int32)
    return found


def control_logits(train: Sequence[Measured], held_out: Sequence[Measured]) -> Mapping[str, NDArray[np.float64]]:
    """Of every control: the log-odds of non-coding, (held out,), as fitted to the views that are trained on."""
    taken = train[:: -(-len(train) // MAX_ROWS)]
    truth = np.array([view.non_coding for view in taken], np.int64)
    found = {}
    for name in CONTROLS:
        model = fit(_features(name, taken), truth)
        found[name] = model.logits(_features(name, held_out))
    return found


def _features(name: str, views: Sequence[Measured]) -> NDArray[np.float64]:
    if name == "kmer_counts":
        return np.stack([view.counts for view in views]).astype(np.float64)
    lengths = [view.nucleotides if name == "length" else view.frame for view in views]
    return np.log1p(np.array(lengths, np.float64))[:, None]
