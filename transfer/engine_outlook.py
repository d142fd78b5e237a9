"""Whether an engine will load what a transfer makes, from the request alone. Imports no torch."""

from __future__ import annotations

from artifacts.compatibility import Engine
from artifacts.pointers import pointers_below
from train.catalog import find_method, parse_parameters
from train.engine_outlook import check_trained
from train.settings import CausalLmTask
from transfer.options import DistilOptions, LorasuiteOptions, TransferOptions


def check_transferred(options: TransferOptions, engine: Engine) -> None:
    """Refuse a transfer whose adapter the engine will not load. Raises RequestInvalid."""
    kind, chosen = find_method("lora"), parse_parameters("lora", {"rank": 1})  # what moving weights writes
    if isinstance(options, DistilOptions) and not isinstance(options, LorasuiteOptions):
        kind, chosen = find_method(options.target_method), options.train_options(())
    with (
        pointers_below("/target_engine", "/task"),
        pointers_below("/parameters/target_method", "/method"),
        pointers_below("/parameters/target_parameters", "/parameters"),
    ):
        check_trained(kind, chosen, CausalLmTask().type, (), engine)
