"""The table of tasks: name → implementation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from train.settings import TaskSettings
from train.tasks.protocol import Task, TaskContext

IMPLEMENTATIONS: Mapping[str, str] = {
    "causal-lm": "train.tasks.causal_lm:CausalLm",
    "sequence-classification": "train.tasks.sequence_classification:SequenceClassification",
    "text-to-image": "train.tasks.text_to_image:TextToImage",
    "token-classification": "train.tasks.token_classification:TokenClassification",
    "transcript-classification": "train.tasks.transcript_classification:TranscriptClassification",
}


def make_task(settings: TaskSettings, context: TaskContext) -> Task[Any]:
    """The task that the settings describe."""
    module, _, name = IMPLEMENTATIONS[settings.type].partition(":")
    made: Task[Any] = getattr(importlib.import_module(module), name)(settings, context)
    return made
