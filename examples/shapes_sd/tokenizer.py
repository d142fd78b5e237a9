"""A CLIP tokenizer with a token for each word of the captions; other words fall into bytes."""

from __future__ import annotations

from itertools import pairwise

from transformers import CLIPTokenizer

from examples.shapes_sd.drawing import FILLERS, HUES, KINDS

LENGTH = 10
WORDS = ("a", "and", *KINDS, *HUES, *FILLERS)
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges make each word whole."""
    letters = byte_letters()
    vocabulary = {piece: index for index, piece in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        # what the merges so far make of the word is joined from the left: a merge of its own letters alone would come
        # too late where another word has already joined two of them
        pieces = split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.setdefault(pieces[0] + pieces[1], len(vocabulary))
            pieces = split(word, merges)
    vocabulary |= {_START: len(vocabulary), _END: len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces of a word under byte-pair encoding: the earliest merge that fits goes first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in ranks]
        if not pairs:
            return pieces
        pieces = _joined(pieces, min(pairs, key=ranks.__getitem__))


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def byte_letters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in byte-level vocabularies."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    free = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(free)) for byte in range(256)]
