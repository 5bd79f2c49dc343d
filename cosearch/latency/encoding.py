"""Candidates of a space as rows of indices, and tables of what is known of those that agree in some choices.

What is to be known of thousands of candidates is made once for each distinct choice of the knobs on which it depends,
and gathered by number (`Table`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cosearch.core.candidate import AXES, Candidate, Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Space

INACTIVE = -1


class Encoding:
    """Candidates of a space as rows of indices into its knobs' values; `INACTIVE` where a knob is."""

    def __init__(self, space: Space) -> None:
        self.values: dict[str, tuple[Value, ...]] = {}
        for name, values in space.knobs.items():
            own = space.reference.point.get(name)
            self.values[name] = values if own is None or own in values else (*values, own)
        self.names = list(self.values)
        self._index = {name: {value: at for at, value in enumerate(values)} for name, values in self.values.items()}
        self._columns = {axis: [i for i, name in enumerate(self.names) if name.startswith(f"{axis}.")] for axis in AXES}
        self._axis_rows: dict[tuple[str, Any], list[int]] = {}
        self._features = [_features_of(values) for values in self.values.values()]
        self._words = [_words_of(name, values) for name, values in self.values.items()]

    def columns(self, names: Sequence[str]) -> list[int]:
        """Where the knobs of these names are."""
        return [self.names.index(name) for name in names if name in self.values]

    def why_not(self, candidate: Candidate) -> str | None:
        """Which choice the space does not offer; None where it offers all."""
        for name, value in candidate.point.items():
            if value not in self._index.get(name, ()):
                allowed = ", ".join(map(repr, self.values.get(name, ())))
                return f"{name}={value!r} is not among the values it knows: {allowed}"
        return None

    def rows(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[n, knobs].

        Raises:
            Rejected: `why_not` speaks of one.
        """
        rows = np.full((len(candidates), len(self.names)), INACTIVE, np.int16)
        for axis, columns in self._columns.items():
            rows[:, columns] = [self._axis_row(axis, candidate) for candidate in candidates]
        return rows

    def features(self, rows: np.ndarray, axes: Sequence[str] = AXES) -> np.ndarray:
        """[n, features]: what is chosen along some axes, in numbers; nothing of knobs that leave no choice."""
        columns = sorted(column for axis in axes for column in self._columns[axis])
        each = [self._features[column][rows[:, column]] for column in columns if self._is_free(column)]
        return np.concatenate([np.zeros((len(rows), 0)), *each], axis=1)

    @property
    def words(self) -> list[str]:
        """What each of `features` tells: "knob" of numbers, "knob=value" of names."""
        return [word for column, words in enumerate(self._words) if self._is_free(column) for word in words]

    @property
    def always(self) -> dict[str, float]:
        """What they would tell of the knobs that leave no choice."""
        fixed = [column for column in range(len(self.names)) if not self._is_free(column)]
        return {
            word: float(told)
            for column in fixed
            for word, told in zip(self._words[column], self._features[column][0], strict=True)
        }

    def _is_free(self, column: int) -> bool:
        return len(self.values[self.names[column]]) > 1

    def candidate(self, row: np.ndarray) -> Candidate:
        """The candidate of a row."""
        return Candidate.from_point(
            {name: self.values[name][at] for name, at in zip(self.names, row, strict=True) if at != INACTIVE}
        )

    def _axis_row(self, axis: str, candidate: Candidate) -> list[int]:
        choices = getattr(candidate, axis)
        row = self._axis_rows.get((axis, choices))
        if row is None:
            if why := self.why_not(candidate):
                raise Rejected(why)
            skipped = len(axis) + 1
            names = [self.names[column] for column in self._columns[axis]]
            row = [
                self._index[name][choices[name[skipped:]]] if name[skipped:] in choices else INACTIVE for name in names
            ]
            self._axis_rows[axis, choices] = row
        return row


def _features_of(values: Sequence[Value]) -> np.ndarray:
    """[values + 1, features] of a knob, the last for where it is not active: numbers, which may be 0, as the logarithm
    of 1 more; names as one feature each."""
    if _are_numbers(values):
        return np.append(np.log1p(np.array(values, float)), 0.0)[:, None]
    return np.vstack([np.eye(len(values)), np.zeros(len(values))])


def _words_of(name: str, values: Sequence[Value]) -> list[str]:
    return [name] if _are_numbers(values) else [f"{name}={value}" for value in values]


def _are_numbers(values: Sequence[Value]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


class Table:
    """A row for each distinct choice in some columns, made from the first candidate that has it and of which `make`
    makes more than None: what else a candidate chooses may forbid that."""

    def __init__(self, encoding: Encoding, names: Sequence[str], make: Callable[[Candidate], Any]) -> None:
        self._encoding, self._columns, self._make = encoding, encoding.columns(names), make
        self._known: dict[bytes | None, int] = {}
        self.made: list[Any] = []

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The number of each candidate's row."""
        own = np.ascontiguousarray(rows[:, self._columns])
        code, size = np.zeros(len(own), np.int64), 1
        for place, column in enumerate(self._columns):
            radix = len(self._encoding.values[self._encoding.names[column]]) + 1
            if size * radix >= 2**62:
                code = np.unique(code, return_inverse=True)[1]
                size = len(own)
            code, size = code * radix + own[:, place] + 1, size * radix
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        numbers = np.empty(len(first), np.int64)
        for index, at in enumerate(first.tolist()):
            key = own[at].tobytes()
            number = self._known.get(key)
            if number is None:
                made = self._make(self._encoding.candidate(rows[at]))
                if made is None:
                    others = map(self._encoding.candidate, rows[inverse == index])
                    made = next((one for other in others if (one := self._make(other)) is not None), None)
                number = self._known.setdefault(None if made is None else key, len(self.made))
                if number == len(self.made):
                    self.made.append(made)
            numbers[index] = number
        return numbers[inverse]


class Interned:
    """Distinct things, in the order in which they came."""

    def __init__(self) -> None:
        self._number: dict[Any, int] = {}
        self.all: list[Any] = []

    def __call__(self, thing: Any) -> int:
        number = self._number.setdefault(thing, len(self.all))
        if number == len(self.all):
            self.all.append(thing)
        return number
