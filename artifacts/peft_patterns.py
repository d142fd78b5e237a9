"""PEFT's matching of module paths against names and regular expressions, safe against hostile expressions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import regex  # type: ignore[import-untyped]

from artifacts.errors import ConfigRefused

MAX_PATTERN_LENGTH = 1000
MATCH_SECONDS = 1.0
"""All matching of one expression table together: real tables need milliseconds."""

_LITERAL = regex.compile(r"\^?[\w.\-]*")

Value = TypeVar("Value")


class Matcher:
    """Compiled expressions with one common time budget.

    Python's `re` can not be interrupted, so one crafted expression would stop the process; `regex` has the same syntax
    and a time-out.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._spent = 0.0
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, text: str, *, full: bool = False) -> Any:
        """`re.match` (or `re.fullmatch`) of `pattern` on `text`.

        Raises:
            ConfigRefused: the expression is invalid, too long, or the time budget is spent.
        """
        started = time.perf_counter()
        try:
            if self._spent > MATCH_SECONDS:
                raise TimeoutError
            compiled = self._compiled.get(pattern) or self._compile(pattern)
            function = compiled.fullmatch if full else compiled.match
            return function(text, timeout=max(MATCH_SECONDS - self._spent, 0.001))
        except TimeoutError as error:
            raise ConfigRefused(
                f"adapter_config.json: {self._field}: matching its expressions takes too long, at {pattern[:80]!r}.",
                hint="Write plain module names, or an expression without nested repetition.",
            ) from error
        finally:
            self._spent += time.perf_counter() - started

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ConfigRefused(
                f"adapter_config.json: {self._field}: an expression of {len(pattern)} characters; "
                f"at most {MAX_PATTERN_LENGTH} are accepted."
            )
        try:
            compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ConfigRefused(
                f"adapter_config.json: {self._field}: {pattern[:80]!r} is no valid regular expression: {error}."
            ) from error
        self._compiled[pattern] = compiled
        return compiled


class LiteralNames:
    """Keys whose only special characters are a leading "^" and dots, matched as expressions in time that does not
    grow with their number: EVA and AdaLoRA write one per module.

    A dot matches any character. Keys of one length with their dots in the same places are therefore looked up at once:
    the end of the path, with dots put into these places, is the key that matches.
    """

    def __init__(self) -> None:
        # length → places of the dots → key without "^" → positions in the table
        self._groups: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._anchored: set[int] = set()

    @staticmethod
    def accepts(key: str) -> bool:
        return _LITERAL.fullmatch(key) is not None

    def add(self, key: str, position: int) -> None:
        core = key.removeprefix("^")
        if core != key:
            self._anchored.add(position)
        dots = tuple(at for at, character in enumerate(core) if character == ".")
        self._groups.setdefault(len(core), {}).setdefault(dots, {}).setdefault(core, []).append(position)

    def matches(self, path: str) -> list[int]:
        """Positions of all keys that match the path, or the end of it after a dot."""
        found: list[int] = []
        starts = [0, *(at + 1 for at, character in enumerate(path) if character == ".")]
        for start in starts:
            tail = path[start:]
            for dots, keys in self._groups.get(len(tail), {}).items():
                characters = list(tail)
                for at in dots:
                    characters[at] = "."
                positions = keys.get("".join(characters), ())
                found += [at for at in positions if start == 0 or at not in self._anchored]
        return found


class PatternTable(Generic[Value]):
    """`rank_pattern` or `alpha_pattern`: the first key that matches a path, or the end of it after a dot, wins."""

    def __init__(self, field: str, patterns: Mapping[str, Value]) -> None:
        self._keys = tuple(patterns)
        self._values = tuple(patterns.values())
        self._matcher = Matcher(field)
        self._literals = LiteralNames()
        self._expressions: list[int] = []
        for position, key in enumerate(self._keys):
            if LiteralNames.accepts(key):
                self._literals.add(key, position)
            else:
                self._expressions.append(position)

    def lookup(self, path: str, default: Value) -> Value:
        """The value for the module at `path`; `default` when no key matches."""
        if not self._keys:
            return default
        best = min(self._literals.matches(path), default=len(self._keys))
        for position in self._expressions:
            if position > best:
                break
            if self._expression_matches(position, path):
                best = position
                break
        return self._values[best] if best < len(self._keys) else default

    def unmatched(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The keys that match none of `paths`: misspelt ones, most of the time."""
        remaining = set(range(len(self._keys)))
        for path in paths if remaining else ():
            remaining.difference_update(self._literals.matches(path))
            remaining -= {at for at in self._expressions if at in remaining and self._expression_matches(at, path)}
        return tuple(self._keys[position] for position in sorted(remaining))

    def _expression_matches(self, position: int, path: str) -> bool:
        key = self._keys[position]
        # PEFT also takes a key that is the path itself, whatever it means as an expression.
        return key == path or self._matcher.match(rf"(.*\.)?({key})$", path) is not None


MAX_COMPONENTS = 100_000
"""Of all names that are looked for inside paths together: real configurations have a handful."""


class InnerNames:
    """Names that are looked for in paths as whole components, anywhere: in one pass over a path, however many there
    are (Aho and Corasick, https://doi.org/10.1145/360825.360855).

    Raises:
        ConfigRefused: more than `MAX_COMPONENTS` components.
    """

    def __init__(self, field: str, names: Iterable[str]) -> None:
        self._following: list[dict[str, int]] = [{}]
        self._is_end = [False]
        for name in names:
            node = 0
            for part in name.split("."):
                node = self._following[node].setdefault(part, len(self._following))
                if node == len(self._following):
                    self._following.append({})
                    self._is_end.append(False)
            self._is_end[node] = True
            if len(self._following) > MAX_COMPONENTS:
                raise ConfigRefused(
                    f"adapter_config.json: {field}: its names have more than {MAX_COMPONENTS} components together."
                )
        self._back = [0] * len(self._following)
        nodes = list(self._following[0].values())
        for node in nodes:
            for part, following in self._following[node].items():
                self._back[following] = self._step(self._back[node], part)
                self._is_end[following] |= self._is_end[self._back[following]]
                nodes.append(following)

    def inside(self, path: str) -> bool:
        """Whether one of the names is the path or some components of it that stand together."""
        node = 0
        for part in path.split("."):
            node = self._step(node, part)
            if self._is_end[node]:
                return True
        return False

    def _step(self, node: int, part: str) -> int:
        while node and part not in self._following[node]:
            node = self._back[node]
        return self._following[node].get(part, 0)


class ModuleSelection:
    """`target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern` and `modules_to_save` together:
    is a module adapted?"""

    def __init__(
        self,
        targets: tuple[str, ...] | str | None,
        excludes: tuple[str, ...] | str,
        layers: tuple[int, ...],
        layers_patterns: tuple[str, ...],
        saved: InnerNames,
    ) -> None:
        self._targets = targets if targets is None or isinstance(targets, str) else frozenset(targets)
        self._excludes = excludes if isinstance(excludes, str) else frozenset(excludes)
        self._layers = frozenset(layers)
        self._layers_patterns = layers_patterns
        self._saved = saved
        self._matcher = Matcher("target_modules")

    def selects(self, path: str) -> bool:
        """Whether PEFT would put an adapter on the module at `path`; always true when PEFT itself chose the targets."""
        if self._named(self._excludes, path) or self._saved.inside(path):
            return False
        if self._targets is None or self._targets == "all-linear":
            return True
        if not self._named(self._targets, path):
            return False
        if isinstance(self._targets, str) or path in self._targets or not self._layers:
            return True
        index = self._layer_index(path)
        return index is not None and index in self._layers

    def _named(self, names: frozenset[str] | str, path: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self._matcher.match(names, path, full=True) is not None
        return path in names or any(path[at + 1 :] in names for at, letter in enumerate(path) if letter == ".")

    def _layer_index(self, path: str) -> int | None:
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>[0-9]+)\." for pattern in self._layers_patterns]
        for expression in expressions or [r".*?\.[^.]*\.(?P<idx>[0-9]+)\."]:
            found = self._matcher.match(expression, path)
            if found is not None:
                return int(found.group("idx"))
        return None
