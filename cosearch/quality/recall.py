"""Associative recall: which value was bound to a key, far back in the row?

Bits per byte of a short training hardly tells attention variants apart; this does. A row binds each of 16 keys to
one of its own 4 values, three times over in fresh order, then comes text, then keys alone are asked for. Between
the last binding and the first question lie at least 64 bytes, and a window that does not reach over them cannot answer
better than by chance, 1 in 4. (The multi-query recall of Arora et al. 2023, arXiv:2312.04927, with the values
disjoint by key: arbitrary pairs take many more steps to learn than a short training has.)
"""

from dataclasses import dataclass

import numpy as np

KEYS = 16
VALUES = 4
CHANCE = 1 / VALUES
_FIRST_KEY, _FIRST_VALUE = 14, 128
_ROUNDS = 3
_BOUND = 2 * KEYS * _ROUNDS
_QUESTIONS = 96


@dataclass(frozen=True)
class Rows:
    """Inputs, the byte that should follow each, and how much each counts: [rows, length]."""

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def rows(rng: np.random.Generator, count: int, length: int, text: np.ndarray) -> Rows:
    """`count` rows; `weights` is 1 where a bound key is shown again and 2 at the far questions."""
    inputs = np.zeros((count, length), np.int32)
    labels, weights = np.zeros_like(inputs), np.zeros((count, length), np.float32)
    for row in range(count):
        values = _FIRST_VALUE + np.arange(KEYS) * VALUES + rng.integers(0, VALUES, KEYS)
        bound = np.concatenate([rng.permutation(KEYS) for _ in range(_ROUNDS)])
        inputs[row, 0:_BOUND:2], inputs[row, 1:_BOUND:2] = _FIRST_KEY + bound, values[bound]
        labels[row, 0:_BOUND:2] = values[bound]
        weights[row, 2 * KEYS : _BOUND : 2] = 1
        asked_from = length - _QUESTIONS
        start = rng.integers(len(text) - length)
        inputs[row, _BOUND:asked_from] = text[start : start + asked_from - _BOUND]
        asked = np.concatenate([rng.permutation(KEYS) for _ in range(_QUESTIONS // KEYS)])
        inputs[row, asked_from:], labels[row, asked_from:] = _FIRST_KEY + asked, values[asked]
        weights[row, asked_from:] = 2
    return Rows(inputs, labels, weights)


def is_far(rows: Rows) -> np.ndarray:
    """Where the far questions are: [rows, length]."""
    return rows.weights == 2
