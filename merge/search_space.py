"""What a search of merges may try: dimensions, and the merge at a point of them. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from artifacts.errors import FieldError, RankwiseError, RequestInvalid
from artifacts.labels import labels_of
from artifacts.pointers import pointers_below
from merge.catalog import aliases, find_method, parse_parameters, pointers_as_sent
from merge.options import MergeOptions
from merge.search_options import Range, SearchedMethod, SearchOptions

METHOD = "method"
MAX_CHOICES = 64
_MARKS = frozenset({"low", "high", "choices"})

Point = Mapping[str, float]
"""By dimension a number, or the position of a choice."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """A number from `low` to `high`, a whole one if `whole`; or, if there are any, one of `choices`."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    def value(self, at: float) -> Any:
        """What a point says here."""
        return self.choices[int(at)] if self.choices else int(at) if self.whole else float(at)

    def nearest(self, wanted: float | None) -> float:
        """The first choice; the number itself if it is in the range, else the nearest there; without one the middle."""
        if self.choices:
            return 0
        if wanted is None:
            middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
            wanted = round(middle) if self.whole else middle
        return min(max(wanted, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A merge that may be tried."""

    label: str
    method: str
    parameters: Mapping[str, Any]
    weights: tuple[float, ...]

    @property
    def options(self) -> MergeOptions:
        """Raises RequestInvalid: the parameters do not go together."""
        return parse_parameters(self.method, self.parameters)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All that a search may try.

    Attributes:
        methods: with their parameters under their own names; `asked` has them as they were given.
        labels: of the methods.
        dimensions: of each method its own, by the name of the parameter.
        weights: the weight of each adapter, or what it may be.
    """

    methods: tuple[SearchedMethod, ...]
    labels: tuple[str, ...]
    dimensions: tuple[Mapping[str, Dimension], ...]
    weights: tuple[float | Dimension, ...]
    requested: tuple[float, ...]
    asked: tuple[SearchedMethod, ...]

    @classmethod
    def of(cls, options: SearchOptions, weights: Sequence[float]) -> SearchSpace:
        """Args:
            weights: of the request, one for each adapter.

        Raises:
            RequestInvalid: a method that does not exist, a parameter that it does not take, a range of something that
                is no number, values that it refuses; pointers lie below `/parameters`.
        """
        labels = labels_of([{"method": item.method, "label": item.label} for item in options.methods])
        methods, found = [], []
        for position, (asked, label) in enumerate(zip(options.methods, labels, strict=True)):
            place = f"/parameters/methods/{position}"
            with pointers_below(f"{place}/method", "/method"):
                find_method(asked.method)
            with pointers_below(f"{place}/parameters", "/parameters"):
                item = _by_field(asked)
                with pointers_as_sent(asked.method, asked.parameters):
                    own = _own_dimensions(item, label)
            if options.ranks is not None and _takes_rank(item):
                own["rank"] = _ranks(item, label, options.ranks)
            with (
                pointers_below(f"{place}/parameters", "/parameters"),
                pointers_as_sent(asked.method, asked.parameters),
            ):
                _check_values(item, own)
            methods.append(item)
            found.append(own)
        return cls(
            tuple(methods),
            tuple(labels),
            tuple(found),
            _weights(options, weights),
            tuple(map(float, weights)),
            tuple(options.methods),
        )

    def active(self, method: int) -> list[Dimension]:
        """The dimensions of a trial of that method, which is one itself when there are several."""
        return [*self.dimensions[method].values(), *(item for item in self.weights if isinstance(item, Dimension))]

    @property
    def size(self) -> float:
        """How many merges there are in it; infinite if a number may be anything in a range."""
        if any(isinstance(item, Dimension) for item in self.weights):
            return math.inf
        return sum(
            math.prod(
                len(item.choices) or (item.high - item.low + 1 if item.whole else math.inf) for item in own.values()
            )
            for own in self.dimensions
        )

    def plain(self, method: int) -> dict[str, float]:
        """The point of a method that is tried first: the request's weights, its own defaults, the first choices."""
        defaults = find_method(self.methods[method].method).options.model_fields
        point: dict[str, float] = {METHOD: method}
        for name, item in self.dimensions[method].items():
            default = defaults[name].default
            point[item.name] = item.nearest(default if isinstance(default, int | float) else None)
        for weight, wanted in zip(self.weights, self.requested, strict=True):
            if isinstance(weight, Dimension):
                point[weight.name] = weight.nearest(wanted)
        return point

    def extreme(self, method: int) -> dict[str, float]:
        """The point of a method that can not be merged, if any of its points can not: least weights, largest rank."""
        point = self.plain(method)
        for name, item in self.dimensions[method].items():
            if name == "rank":
                numbers = [choice if isinstance(choice, int) else 0 for choice in item.choices]
                point[item.name] = numbers.index(max(numbers)) if numbers else item.high
        for weight in self.weights:
            if isinstance(weight, Dimension):
                point[weight.name] = weight.low if weight.low < 0 else weight.high
        return point

    @contextmanager
    def located(self, method: int) -> Iterator[None]:
        """Errors from inside, about a merge by that method, point to what the search was asked for."""
        own, asked = self.dimensions[method].get("rank"), self.asked[method]
        shared = own is not None and "rank" not in self.methods[method].parameters
        try:
            with pointers_as_sent(asked.method, asked.parameters):
                yield
        except RankwiseError as error:
            error.errors = tuple(
                FieldError(self._place(method, item.pointer, shared_ranks=shared), item.message)
                for item in error.errors
            )
            raise

    def _place(self, method: int, pointer: str, *, shared_ranks: bool) -> str:
        if shared_ranks and pointer == "/parameters/rank":
            return "/parameters/ranks"
        if pointer == "/parameters" or pointer.startswith("/parameters/"):
            return f"/parameters/methods/{method}{pointer}"
        weight = re.fullmatch(r"/adapters/(\d+)/weight", pointer)
        ranged = weight is not None and isinstance(self.weights[int(weight[1])], Dimension)
        return "/parameters/weights" if ranged else pointer

    def proposal(self, point: Point) -> Proposal:
        """The merge at a point."""
        method = int(point[METHOD])
        own = {name: item.value(point[item.name]) for name, item in self.dimensions[method].items()}
        fixed = {name: value for name, value in self.methods[method].parameters.items() if name not in own}
        weights = tuple(item.value(point[item.name]) if isinstance(item, Dimension) else item for item in self.weights)
        return Proposal(self.labels[method], self.methods[method].method, {**fixed, **own}, weights)


def _by_field(item: SearchedMethod) -> SearchedMethod:
    """The method with its parameters under their own names, not under an alias. Raises RequestInvalid."""
    names = aliases(item.method)
    found: dict[str, Any] = {}
    for name, value in item.parameters.items():
        own = names.get(name, name)
        if own in found:
            raise _refused(f"/parameters/{name}", f"{own} is given twice")
        found[own] = value
    return item.model_copy(update={"parameters": found})


def _own_dimensions(item: SearchedMethod, label: str) -> dict[str, Dimension]:
    """Those parameters that are no fixed values. Raises RequestInvalid."""
    options = find_method(item.method).options
    found = {}
    for name, given in item.parameters.items():
        if not (isinstance(given, dict) and _MARKS & given.keys()):
            continue
        pointer = f"/parameters/{name}"
        if name not in options.model_fields:
            raise _refused(pointer, f"method {item.method!r} has no parameter {name[:80]!r}")
        if "choices" in given:
            found[name] = _choices(f"{label}.{name}", given, pointer)
        else:
            found[name] = _range(f"{label}.{name}", given, pointer, _number_kind(options, name))
    return found


def _choices(name: str, given: Mapping[str, Any], pointer: str) -> Dimension:
    choices = given["choices"]
    if set(given) != {"choices"} or not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise _refused(pointer, f"choices is a list of 1 to {MAX_CHOICES} values, and stands alone")
    return Dimension(name, choices=tuple(choices))


def _range(name: str, given: Mapping[str, Any], pointer: str, kind: str | None) -> Dimension:
    if kind is None:
        raise _refused(pointer, "is no number: name the choices, as {choices: […]}")
    try:
        found = Range.model_validate(dict(given))
    except ValueError as error:
        raise _refused(pointer, _first(error)) from error
    whole = kind == "integer"
    if whole and not (found.low.is_integer() and found.high.is_integer()):
        raise _refused(pointer, "is a whole number: low and high must be too")
    return Dimension(name, found.low, found.high, found.log, whole)


def _ranks(item: SearchedMethod, label: str, ranks: Sequence[int | str]) -> Dimension:
    for position, rank in enumerate(ranks):
        with pointers_below(f"/parameters/ranks/{position}", "/parameters/rank"):
            parse_parameters(item.method, {"rank": rank})
    return Dimension(f"{label}.rank", choices=tuple(ranks))


def _takes_rank(item: SearchedMethod) -> bool:
    return "rank" in find_method(item.method).options.model_fields and "rank" not in item.parameters


def _check_values(item: SearchedMethod, own: Mapping[str, Dimension]) -> None:
    """Every choice and both ends of every range, each beside what is fixed. Raises RequestInvalid."""
    fixed = {name: value for name, value in item.parameters.items() if name not in own}
    _check(item.method, fixed, alone=not own)
    for name, dimension in own.items():
        if name in item.parameters:  # else it is of `ranks`, which are checked
            for value in dimension.choices or (dimension.value(dimension.low), dimension.value(dimension.high)):
                _check(item.method, {**fixed, name: value}, alone=False)


def _check(method: str, parameters: Mapping[str, Any], *, alone: bool) -> None:
    """Raises RequestInvalid; with others to come, not for parameters that do not go together: the others may help."""
    try:
        parse_parameters(method, parameters)
    except RequestInvalid as error:
        if alone or any(finding.pointer != "/parameters" for finding in error.errors):
            raise


def _weights(options: SearchOptions, weights: Sequence[float]) -> tuple[float | Dimension, ...]:
    ranges = options.weights
    if ranges is None:
        return tuple(map(float, weights))
    if len(ranges) not in (1, len(weights)):
        raise _refused(
            "/parameters/weights",
            f"one range for all adapters, or one for each of the {len(weights)}; not {len(ranges)}",
        )
    found: list[float | Dimension] = []
    for position, weight in enumerate(weights):
        own = ranges[position if len(ranges) > 1 else 0]
        found.append(float(weight) if own is None else Dimension(f"weight {position}", own.low, own.high, own.log))
    return tuple(found)


def _number_kind(options: type[MergeOptions], field: str) -> str | None:
    """Whether a parameter is a "number" or an "integer"; None for anything else."""
    schema = options.model_json_schema(by_alias=False)["properties"][field]
    kinds = {part.get("type") for part in (schema, *schema.get("anyOf", ()))}
    return "number" if "number" in kinds else "integer" if "integer" in kinds else None


def _refused(pointer: str, problem: str) -> RequestInvalid:
    name = pointer.rpartition("/")[2]
    return RequestInvalid(f"{name}: {problem}.", errors=[FieldError(pointer, problem)])


def _first(error: ValueError) -> str:
    """What pydantic found first, with the name of its field."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    item = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, item["loc"]))
    return f"{place}: {item['msg']}".removeprefix(": ").removeprefix("Value error, ")
