"""IntTune (arXiv:2502.14482)."""

from __future__ import annotations

from train.methods.nlora import NystromMethod
from train.methods.three_factor import MIDDLE
from train.options.three_factor import InttuneOptions


class Inttune(NystromMethod[InttuneOptions]):
    """The factors begin as with NLoRA; only the middle one is trained."""

    trained = MIDDLE
