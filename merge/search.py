"""A search of merges: what to try next, and what was found. Imports no torch.

What comes next depends on the trials before, their order and the seed, and on nothing else: no state is kept beside
them, so that a search which was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from merge.search_space import METHOD, Dimension, Proposal, SearchSpace

if TYPE_CHECKING:
    import optuna

_TURNS = 10
"""Proposals until one is no repetition; the later ones by chance, which a small space needs."""
State = Literal["measured", "repeated", "failed"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A merge that was tried.

    Attributes:
        point: where in the space it is.
        parameters: of the method, as far as they were given or chosen.
        state: measured, repeated (an earlier trial was the same merge, whose figures these are), or failed.
        value: what is made small; None if it failed.
        rank, relative_error: of the merge, against the exact sum under the trial's own weights.
        figures: what the evaluation found.
        problem: why it failed.
    """

    number: int
    point: Mapping[str, float]
    label: str
    method: str
    parameters: Mapping[str, Any]
    weights: Sequence[float]
    state: State
    value: float | None = None
    rank: int | None = None
    relative_error: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None

    @classmethod
    def at(cls, number: int, point: Mapping[str, float], proposal: Proposal, **found: Any) -> Self:
        """What was found of a proposal."""
        return cls(
            number,
            dict(point),
            proposal.label,
            proposal.method,
            dict(proposal.parameters),
            list(proposal.weights),
            **found,
        )

    @property
    def merge(self) -> str:
        """The same for the same merge."""
        return json.dumps([self.method, self.parameters, list(self.weights)], sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `Trial(**…)` makes it again."""
        return asdict(self)


def propose(
    space: SearchSpace, trials: Sequence[Trial], *, sampler: Literal["tpe", "random"], startup: int, seed: int
) -> dict[str, float]:
    """The point of the next trial: first every method as it was asked for, then what the sampler says.

    Args:
        trials: all before, in their order.
        startup: trials before the estimator has a say.
    """
    number = len(trials)
    if number < len(space.methods):
        return space.plain(number)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    study.add_trials([_frozen(space, trial) for trial in trials])
    known = {trial.merge for trial in trials}
    point: dict[str, float] = {}
    for turn in range(_TURNS):
        # A seed of its own for every trial: the state of a generator could not be taken up again.
        own_seed = int(np.random.SeedSequence([seed, number, turn]).generate_state(1)[0])
        learns = sampler == "tpe" and turn < _TURNS // 2
        study.sampler = (
            optuna.samplers.TPESampler(seed=own_seed, n_startup_trials=startup)
            if learns
            else optuna.samplers.RandomSampler(seed=own_seed)
        )
        asked = study.ask()
        method = _chosen(asked, _method_dimension(space))
        point = {METHOD: method, **{item.name: _chosen(asked, item) for item in space.active(int(method))}}
        if Trial.at(number, point, space.proposal(point), state="failed").merge not in known:
            break
    return point


def best_of(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were measured, the best one first; of equals the one of the smaller rank, then the earlier one."""
    found = [trial for trial in trials if trial.state == "measured" and trial.value is not None]
    return sorted(found, key=lambda trial: (trial.value, trial.rank, trial.number))


def same_merge(trials: Sequence[Trial], wanted: Trial) -> Trial | None:
    """The earliest trial of the same merge."""
    return next((trial for trial in trials if trial.merge == wanted.merge), None)


def is_exhausted(space: SearchSpace, trials: Sequence[Trial]) -> bool:
    """Whether there is nothing left to try."""
    return math.isfinite(space.size) and len({trial.merge for trial in trials}) >= space.size


def _chosen(asked: optuna.Trial, dimension: Dimension) -> float:
    """Where in a dimension the trial shall be; choices by their position, for Optuna takes 1 and True for one."""
    if dimension.choices:
        return int(asked.suggest_categorical(dimension.name, range(len(dimension.choices))))
    if dimension.whole:
        return asked.suggest_int(dimension.name, int(dimension.low), int(dimension.high), log=dimension.log)
    return asked.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


def _frozen(space: SearchSpace, trial: Trial) -> optuna.trial.FrozenTrial:
    import optuna

    dimensions = {item.name: item for item in (_method_dimension(space), *space.active(int(trial.point[METHOD])))}
    failed = trial.value is None
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
        params=dict(trial.point),
        distributions={name: _distribution(item) for name, item in dimensions.items()},
        value=trial.value,
    )


def _method_dimension(space: SearchSpace) -> Dimension:
    return Dimension(METHOD, choices=tuple(space.labels))


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """What `_chosen` draws from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices:
        return CategoricalDistribution(tuple(range(len(dimension.choices))))
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
