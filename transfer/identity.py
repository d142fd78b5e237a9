"""What makes two transfers the same: contents and parameters, never names of models. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PIPELINE_VERSION = 2
"""Raised whenever the same inputs would give another adapter than before."""


@dataclass(frozen=True, slots=True)
class TransferIdentity:
    """Everything that decides what comes out of a transfer.

    Attributes:
        adapter: digest of the source adapter (`artifacts.content.identity_digest`).
        source_base, target_base: digests of weights and tokenizer together (`base_identity`).
        discriminator: digest of the discriminator, if the method uses one.
        seeds: `transfer.seeds.seeds_digest`.
        inputs: digest of the inputs that were kept, if the method uses any.
        task: name of the task, as the discriminator's question has it.
        format: of the prompts, as JSON.
        parameters: of the method with every default filled in, as JSON.
    """

    adapter: str
    source_base: str
    target_base: str
    seeds: str | None
    discriminator: str | None
    task: str | None
    format: Mapping[str, Any]
    method: str
    parameters: Mapping[str, Any]
    seed: int
    inputs: str | None = None

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON: the job's key, from which all its random numbers come."""
        return canonical_digest({**asdict(self), "pipeline": PIPELINE_VERSION})


def base_identity(weights_digest: str, tokenizer_digest: str) -> str:
    """One digest of a base model: a dequantised copy is another base model than its original."""
    return canonical_digest([weights_digest, tokenizer_digest])


def canonical_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
