"""What a network says of operations, and the file that it is stored in."""

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cosearch import axes
from cosearch.core.workload import OperatingPoint
from cosearch.latency import network
from cosearch.latency.batch import Operations
from cosearch.latency.network import RateNetwork, Seconds
from cosearch.latency.pretrain import Examples, train
from cosearch.testing import small_problem


def test_factors_are_made_anew_where_there_are_more_of_them_only():
    space, rng = axes.load_space("llm_decode", target="cpu"), random.Random(0)
    operations = Operations(space, OperatingPoint("decode", 1, 256))
    rows = operations.encoding.rows([space.sample(rng) for _ in range(60)])
    learnt, target = RateNetwork.load("cpu"), small_problem().target
    seconds, features = Seconds(learnt, operations, target), operations.encoding.features(rows)
    first = seconds.log_seconds(operations(rows[:20]), features[:20])
    more = operations(rows)
    again, fresh = (one.log_seconds(more, features) for one in (seconds, Seconds(learnt, operations, target)))
    np.testing.assert_array_equal(again, fresh)
    np.testing.assert_allclose(first, again[:, :20], rtol=1e-6)
    made = vars(seconds).copy()
    seconds.log_seconds(more, features)
    assert all(made[name] is one for name, one in vars(seconds).items())


def test_it_learns_what_processors_differ_in():
    space, rng = axes.load_space("llm_decode", target="cpu"), random.Random(0)
    operations, target = Operations(space, OperatingPoint("decode", 1, 256)), small_problem().target
    rows = np.unique(operations.encoding.rows([space.sample(rng) for _ in range(300)]), axis=0)
    width = rows[:, operations.encoding.names.index("architecture.width")]
    fast = Seconds(RateNetwork.untrained(), operations, target)
    truth = np.exp(fast.log_seconds(operations(rows), operations.encoding.features(rows))[0]) * (1 + width)
    seen, unseen = rows[:-60], rows[-60:]
    examples = [Examples(seen, factor * truth[:-60], target, name) for name, factor in (("one", 1.0), ("other", 3.0))]
    learnt = train(operations, examples, hidden=16, hidden_knobs=8, members=1, decay=0.1, steps=800)
    assert learnt.processors == ["one", "other"]
    described = operations(unseen), operations.encoding.features(unseen)
    for name, factor in (("one", 1.0), ("other", 3.0)):
        found = np.exp(Seconds(learnt, operations, target, name).log_seconds(*described)[0])
        assert np.median(np.abs(found / (factor * truth[-60:]) - 1)) < 0.15


def test_a_knob_counts_the_same_where_the_space_leaves_no_choice():
    learnt, target, point = RateNetwork.load("cpu"), small_problem().target, OperatingPoint("decode", 1, 256)
    wide = axes.load_space("llm_decode", target="cpu")
    narrow = replace(wide, knobs={**wide.knobs, "architecture.width": (128,)})
    candidate = wide.reference
    assert candidate.architecture["width"] == 128
    told = []
    for space in (wide, narrow):
        operations = Operations(space, point)
        rows = operations.encoding.rows([candidate])
        seconds = Seconds(learnt, operations, target, learnt.processors[0])
        told.append(seconds.log_seconds(operations(rows), operations.encoding.features(rows)))
    np.testing.assert_allclose(*told, rtol=1e-5)


def test_a_network_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "rates_cpu.safetensors"
    learnt = RateNetwork.load("cpu")
    learnt.save(path)
    found = network.read(path)
    assert (found.tokens, found.knobs) == (learnt.tokens, learnt.knobs)
    np.testing.assert_array_equal(found.members[0]["embed"], learnt.members[0]["embed"])
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        RateNetwork.untrained().save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
