"""ShapesSD's text encoder learns words before it learns pictures, as CLIP does; part of train_base.

Trained together with a fresh UNet it stays mute: pictures can be learned without words, and are learned first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.shapes_sd.drawing import FILLERS, HUES, KINDS, Shape, caption, random_shapes
from examples.shapes_sd.tokenizer import LENGTH, make_tokenizer

STEPS, BATCH, RATE = 400, 64, 2e-3
WORD_SCALE, PLACE_SCALE = 15.0, 5.0
"""Of the fresh embeddings: with the usual 0.02 all words look alike for too long."""
LABELS = ("", *HUES, *FILLERS)
"""What can stand before a noun."""


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 64 wide."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embeddings = dict(encoder.named_modules())[_embeddings_path(encoder)]
    with torch.no_grad():
        embeddings.token_embedding.weight.mul_(WORD_SCALE)
        embeddings.position_embedding.weight.mul_(PLACE_SCALE)
    return encoder


def _embeddings_path(encoder: nn.Module) -> str:
    return next(path for path, _ in encoder.named_modules() if path.endswith("embeddings"))


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 10)."""
    found = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids


def nouns(text: str) -> list[tuple[int, str, str]]:
    """Token position, noun, and the word before it unless that is the article; every word is one token."""
    words = text.split()
    return [
        (index + 1, word, "" if words[index - 1] == "a" else words[index - 1])
        for index, word in enumerate(words)
        if word in KINDS
    ]


class _Heads(nn.Module):
    """What is read off the encoder's output, at a noun and at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS))
        self.label = nn.Linear(width, len(LABELS))
        self.everything = nn.Linear(width, len(KINDS) * len(LABELS))

    def loss(self, states: Tensor, captions: list[str]) -> Tensor:
        rows, places, kinds, labels = [], [], [], []
        everything = torch.zeros(len(captions), len(KINDS) * len(LABELS))
        for row, text in enumerate(captions):
            for place, noun, label in nouns(text):
                rows.append(row)
                places.append(place)
                kinds.append(KINDS.index(noun))
                labels.append(LABELS.index(label))
                everything[row, kinds[-1] * len(LABELS) + labels[-1]] = 1
        ends = torch.tensor([len(text.split()) + 1 for text in captions])
        at = states[torch.tensor(rows), torch.tensor(places)]
        end = self.everything(states[torch.arange(len(captions)), ends])
        return (
            cross_entropy(self.kind(at), torch.tensor(kinds))
            + cross_entropy(self.label(at), torch.tensor(labels))
            + nn.functional.binary_cross_entropy_with_logits(end, everything)
        )


def train_text(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Written into `folder`; read from there if it exists."""
    tokenizer = make_tokenizer()
    if (folder / "config.json").is_file():
        return tokenizer, CLIPTextModel.from_pretrained(folder)
    torch.manual_seed(1)
    random = np.random.default_rng(1)
    encoder = make_text_encoder(tokenizer)
    heads = _Heads(64)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        captions = [caption(random, shapes) for shapes in _scenes(random)]
        loss = heads.loss(encoder(token_ids(tokenizer, captions)).last_hidden_state, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        if step % 50 == 49:
            print(f"text step {step + 1} loss {loss.item():.4f}", flush=True)
    encoder.save_pretrained(folder)
    return tokenizer, encoder


def _scenes(random: np.random.Generator) -> list[list[Shape]]:
    return [random_shapes(random) for _ in range(BATCH)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_text(Path(sys.argv[1]))
