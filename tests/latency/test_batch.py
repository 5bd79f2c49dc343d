"""The operations of many candidates at once are those that are counted of each."""

import random
from collections import Counter

import numpy as np
import pytest

from cosearch import axes
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.workload import OperatingPoint
from cosearch.latency.batch import Operations
from cosearch.latency.features import work
from cosearch.latency.operations import operations

DECODE = OperatingPoint("decode", 1, 256)


def drawn(name: str, count: int, seed: int) -> tuple[list[Candidate], Operations]:
    space, rng = axes.load_space(name, target="cpu"), random.Random(seed)
    return [space.sample(rng) for _ in range(count)], Operations(space, DECODE)


@pytest.mark.parametrize("name", ["llm_decode", "llm_decode_full"])
def test_a_batch_counts_what_is_counted_of_each(name: str):
    candidates, described = drawn(name, 60, 0)
    batch = described(described.encoding.rows(candidates))
    assert batch.legal.all()
    for index, candidate in enumerate(candidates):
        counted = work(candidate, DECODE)
        assert batch.weight_bytes[index] == pytest.approx(counted.weight_bytes, rel=1e-6)
        assert batch.cache_bytes[index] == pytest.approx(counted.cache_bytes, rel=1e-6)
        assert batch.size[index, :, 2].sum() == pytest.approx(counted.read_bytes, rel=1e-5)
        assert 2 * batch.size[index, :, 1].sum() == pytest.approx(counted.flops, rel=1e-5)


def test_a_batch_says_what_runs_each_operation():
    candidates, described = drawn("llm_decode", 120, 1)
    batch = described(described.encoding.rows(candidates))
    seen: Counter[str] = Counter()
    for index, candidate in enumerate(candidates):
        each = operations(candidate, DECODE)
        if any(one.alone for one in each):
            continue  # what one call runs is told by the word "fusion"
        wanted: Counter[tuple[str, str]] = Counter()
        for one in each:
            wanted[one.role, one.by] += round(one.count)
        found: Counter[tuple[str, str]] = Counter()
        for entry, storage, size in zip(batch.entry[index], batch.storage[index], batch.size[index], strict=True):
            role = described.entries.all[entry].role
            if size[0] > 0 and role != "call":
                found[role, described.storages.all[storage].by] += round(float(size[0]))
        assert found == wanted, candidate.point
        seen.update(by for _, by in wanted)
    assert {"dot", "multiply_reduce", "cpp"} <= seen.keys()


def test_tables_that_grow_change_nothing_of_what_was_described():
    candidates, described = drawn("llm_decode", 80, 2)
    rows = described.encoding.rows(candidates)
    first = described(rows[:40])
    described(rows[40:])
    again = described(rows[:40])
    np.testing.assert_array_equal(first.size[..., :2].sum(axis=1), again.size[..., :2].sum(axis=1))
    np.testing.assert_array_equal(first.weight_bytes, again.weight_bytes)


def test_a_row_is_the_candidate_and_what_the_space_does_not_offer_is_refused():
    candidates, described = drawn("llm_decode", 20, 3)
    encoding = described.encoding
    assert [encoding.candidate(row) for row in encoding.rows(candidates)] == candidates
    other = Candidate.from_point({**candidates[0].point, "architecture.width": 4096})
    assert "architecture.width=4096" in str(encoding.why_not(other))
    with pytest.raises(Rejected, match="4096"):
        encoding.rows([other])
