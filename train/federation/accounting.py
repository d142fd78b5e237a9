"""What of a client's privacy is spent: the Rényi accountant of opacus for the Poisson-subsampled Gaussian mechanism
(arXiv:1908.10530), one for all steps of a client in the whole run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

ACCOUNTANT = "rdp"


@lru_cache(maxsize=1024)
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest σ (to 0.01 in ε) with which `steps` steps of sampling rate `rate` stay within (ε, δ)."""
    from opacus.accountants.utils import get_noise_multiplier

    with _loose_orders_ignored():
        found: float = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=rate,
            steps=steps,
            accountant=ACCOUNTANT,
        )
    return found


@lru_cache(maxsize=4096)
def spent(noise_multiplier: float, delta: float, rate: float, steps: int) -> float:
    """ε after so many steps; 0 after none."""
    from opacus.accountants import RDPAccountant

    if steps == 0:
        return 0.0
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with _loose_orders_ignored():
        return float(accountant.get_epsilon(delta=delta))


@contextmanager
def _loose_orders_ignored() -> Iterator[None]:
    """With much noise the best order lies beyond those that opacus tries: its bound is then larger than it need be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha", UserWarning)
        yield
