"""A BERT with first values that reads k-mers: what the task transcript-classification begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from artifacts.errors import FieldError, RequestInvalid
from train.transcripts.classes import NAMES
from train.transcripts.kmers import all_kmers, write_tokenizer
from train.whole_model import write_model

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, slots=True)
class KmerBertShape:
    """The sizes of arXiv:2411.08073's published code, but for the vocabulary: 4^k k-mers and five special tokens.

    Attributes:
        positions: longest input, tokens.
        dropout: of hidden states and of attention.
    """

    k: int = 3
    layers: int = 12
    width: int = 768
    heads: int = 12
    inner: int = 3072
    positions: int = 1536
    dropout: float = 0.1


def write_kmer_bert(directory: Path, shape: KmerBertShape, seed: int = 0) -> int:
    """Write configuration, weights and tokenizer into the new folder; the same shape and seed give the same bytes.

    Returns:
        The number of parameters.

    Raises:
        RequestInvalid: the folder is there and not empty, or the width is no multiple of the heads.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RequestInvalid(
            f"{directory} is there already and not empty.", hint="Choose another folder, or remove it."
        )
    if shape.width % shape.heads:
        problem = f"the width {shape.width} is no multiple of {shape.heads} heads"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/heads", problem)])
    vocabulary = kmer_vocabulary(shape.k)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        pad_token_id=vocabulary["[PAD]"],
        id2label=dict(enumerate(NAMES)),
        label2id={name: place for place, name in enumerate(NAMES)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    write_model(model, directory)
    write_tokenizer(kmer_tokenizer(shape.k), directory)
    return sum(parameter.numel() for parameter in model.parameters())


def kmer_vocabulary(k: int) -> dict[str, int]:
    """Token → id: the special ones, then all k-mers in lower case."""
    return {token: place for place, token in enumerate([*SPECIAL, *(kmer.lower() for kmer in all_kmers(k))])}


def kmer_tokenizer(k: int) -> PreTrainedTokenizerFast:
    """Takes k-mers with spaces between them; case makes no difference, and U is T."""
    core = Tokenizer(models.WordLevel(kmer_vocabulary(k), unk_token="[UNK]"))  # noqa: S106 (no password)
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("u", "t")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
