import numpy as np
import pytest

from cosearch.quality import recall

TEXT = np.frombuffer(b"def main(): return 0\n" * 200, np.uint8)


def make(count: int = 20, length: int = 256, seed: int = 0) -> recall.Rows:
    return recall.rows(np.random.default_rng(seed), count, length, TEXT)


def bindings(row: np.ndarray) -> dict[int, set[int]]:
    """Key to the values that follow it before the text."""
    bound: dict[int, set[int]] = {}
    for key, value in row[: 2 * 16 * 3].reshape(-1, 2).tolist():
        bound.setdefault(key, set()).add(value)
    return bound


@pytest.mark.parametrize("length", [256, 512])
def test_every_question_is_answered_in_its_row_and_nowhere_else(length: int):
    rows = make(length=length)
    assert rows.inputs.shape == rows.labels.shape == rows.weights.shape == (20, length)
    for inputs, labels, far in zip(rows.inputs, rows.labels, recall.is_far(rows), strict=True):
        bound = bindings(inputs)
        assert len(bound) == recall.KEYS
        assert all(len(values) == 1 for values in bound.values())
        assert far.sum() == 96
        for key, label in zip(inputs[far].tolist(), labels[far].tolist(), strict=True):
            assert bound[key] == {label}


@pytest.mark.parametrize("length", [256, 300])
def test_questions_are_far_from_what_answers_them(length: int):
    rows = make(length=length)
    bound = (rows.inputs >= 128).nonzero()[1].max()
    first = recall.is_far(rows).argmax(axis=1).min()
    assert first - bound >= 64


def test_only_what_was_bound_before_is_asked_near_by():
    rows = make()
    near = rows.weights == 1
    for inputs, labels, weights in zip(rows.inputs, rows.labels, near, strict=True):
        for position in weights.nonzero()[0]:
            before = inputs[:position].tolist()
            assert inputs[position + 1] == labels[position]
            assert before[before.index(inputs[position]) + 1] == labels[position]


def test_chance_is_one_in_four():
    rows = make(200)
    far = recall.is_far(rows)
    offsets = (rows.labels[far] - 128) % recall.VALUES
    shares = np.bincount(offsets, minlength=recall.VALUES) / len(offsets)
    np.testing.assert_allclose(shares, recall.CHANCE, atol=0.03)
    keys = rows.inputs[far] - 14
    np.testing.assert_array_equal((rows.labels[far] - 128) // recall.VALUES, keys)


def test_keys_stand_for_other_values_in_other_rows():
    rows = make(200)
    values = [sorted((key, *found) for key, found in bindings(row).items()) for row in rows.inputs]
    assert len(set(map(tuple, values))) == 200


def test_between_bindings_and_questions_is_text():
    rows = make()
    for row in rows.inputs:
        assert row[96:160].astype(np.uint8).tobytes() in TEXT.tobytes()


def test_a_seed_gives_the_same_rows():
    np.testing.assert_array_equal(make(seed=3).inputs, make(seed=3).inputs)
    assert (make(seed=3).inputs != make(seed=4).inputs).any()
