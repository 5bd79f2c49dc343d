"""The operations of many candidates at once are those that are counted of each."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture.attention.softmax import SoftmaxShape
from cosearch.architecture.decoder import cached_as, scheduled_as
from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.workload import OperatingPoint
from cosearch.latency.batch import Operations
from cosearch.latency.features import work
from cosearch.latency.operations import attention_by, operations, product_by, read_fraction, role_of
from cosearch.precision import Precision
from cosearch.schedule import Schedule

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
        schedule, precision = Schedule.of(candidate.schedule), Precision.of(candidate.precision)
        if schedule.fusion != "none":
            continue  # what one call runs is told by the word "fusion"
        shape, wanted = axes.served_shape(candidate), Counter[tuple[str, str]]()
        for path, (*stack, rows, columns) in shape.linears().items():
            storage, role = scheduled_as(shape, precision, schedule, path), role_of(path, (*stack, rows, columns))
            product = storage.product(DECODE.tokens, (rows, columns), precision.activations)
            used = math.prod(stack) * read_fraction(shape, path, 1)
            wanted[role, product_by(role, schedule, product)] += round(used)
        for layer, one in enumerate(shape.layers):
            wanted["block", "dot"] += len(list(one.blocks()))
            if isinstance(one.attention, SoftmaxShape):
                slots = one.attention.reads(DECODE.batch, DECODE.context)["key"][1]
                over = one.attention.over(cached_as(precision, schedule, layer), DECODE.batch, slots)
                wanted["attention", attention_by(one.attention, over, schedule, "decode")] += 1
            elif one.attention is not None:
                role = "attention" if one.attention.reads(1, 1) else "state"
                wanted[role, attention_by(one.attention, None, schedule, "decode")] += 1
        found: Counter[tuple[str, str]] = Counter()
        for entry, storage, size in zip(batch.entry[index], batch.storage[index], batch.size[index], strict=True):
            role = described.entries.all[entry].role
            if size[0] > 0 and role != "call":
                found[role, described.storages.all[storage].by] += round(float(size[0]))
        assert found == wanted, candidate.point
        seen.update(by for _, by in wanted)
    assert {"dot", "multiply_reduce", "cpp"} <= seen.keys()


@pytest.mark.parametrize("name", ["llm_decode", "llm_decode_full"])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_described_before_changes_nothing(name: str, seed: int):
    candidates, described = drawn(name, 80, seed)
    rows = described.encoding.rows(candidates)
    whole = Operations(axes.load_space(name, target="cpu"), DECODE)(rows)
    for _ in range(2):  # once while its tables grow, and once when they know all
        for index in random.Random(seed).sample(range(len(rows)), len(rows)):
            one = described(rows[index : index + 1])
            counted = work(candidates[index], DECODE)
            sums = one.size[0].sum(axis=0)
            assert one.weight_bytes[0] == pytest.approx(counted.weight_bytes, rel=1e-9), candidates[index].point
            assert one.cache_bytes[0] == pytest.approx(counted.cache_bytes, rel=1e-9), candidates[index].point
            assert 2 * sums[1] == pytest.approx(counted.flops, rel=1e-5)
            assert sums[2] == pytest.approx(counted.read_bytes, rel=1e-5), candidates[index].point
            np.testing.assert_allclose(sums, whole.size[index].sum(axis=0), rtol=1e-5)


def test_a_matrix_that_comes_later_is_stored_as_the_rules_say():
    space = axes.load_space("llm_decode_full", target="cpu")
    point = {**space.reference.point, "architecture.depth": 8, "precision.weights": "int8"}
    first, then = (
        Candidate.from_point(space.canonical({**point, "architecture.attention": attention}))
        for attention in ("mha", "mla")
    )
    described = Operations(space, DECODE)
    described(described.encoding.rows([first]))
    batch = described(described.encoding.rows([then]))
    assert batch.weight_bytes[0] == work(then, DECODE).weight_bytes


def test_a_borrowed_cache_is_read_in_the_format_of_its_owner():
    space = axes.load_space("llm_decode_full", target="cpu")
    point = {**space.reference.point, "precision.kv_cache": ("int8", "int4"), "architecture.depth": 4}
    candidate = Candidate.from_point(space.canonical({**point, "architecture.attention": ("gqa", "cross_layer")}))
    own, borrowed, *_ = [one for one in operations(candidate, DECODE) if one.attention is not None]
    assert own.attention is not None and borrowed.attention is not None
    assert own.attention.format == borrowed.attention.format == "int8"
    assert own.read_bytes == borrowed.read_bytes == own.stored_bytes
    assert borrowed.stored_bytes == 0
    described = Operations(space, DECODE)
    batch = described(described.encoding.rows([candidate]))
    assert batch.size[0, :, 2].sum() == pytest.approx(work(candidate, DECODE).read_bytes, rel=1e-6)


def test_a_legal_candidate_is_described_whatever_cannot_be_built_beside_it():
    """What both share is made of the one that can be built."""
    candidates, described = drawn("llm_decode_full", 60, 4)
    encoding = described.encoding
    rows = encoding.rows(candidates)
    reference = encoding.rows([axes.load_space("llm_decode_full", target="cpu").reference])[0]
    built = [index for index, name in enumerate(encoding.names) if name.startswith("architecture.")]
    few = [column for column in built if encoding.names[column] not in ("architecture.width", "architecture.depth")]
    mixed = np.tile(reference, (600, 1))
    mixed[:, few] = np.random.default_rng(0).permuted(np.tile(rows, (10, 1)), axis=0)[:, few]
    can_be_built = []
    for row in mixed:
        try:
            axes.served_shape(encoding.candidate(row))
            can_be_built.append(True)
        except Rejected:
            can_be_built.append(False)
    assert not all(can_be_built)
    legal = described(mixed).legal
    assert legal[can_be_built].all()
    again = np.concatenate([described(mixed[index : index + 1]).legal for index in range(len(mixed))])
    assert again[can_be_built].all()
    assert not legal.all()


def test_a_row_is_the_candidate_and_what_the_space_does_not_offer_is_refused():
    candidates, described = drawn("llm_decode", 20, 3)
    encoding = described.encoding
    assert [encoding.candidate(row) for row in encoding.rows(candidates)] == candidates
    other = Candidate.from_point({**candidates[0].point, "architecture.width": 4096})
    assert "architecture.width=4096" in str(encoding.why_not(other))
    with pytest.raises(Rejected, match="4096"):
        encoding.rows([other])
