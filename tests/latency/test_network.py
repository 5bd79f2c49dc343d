"""What a network says of operations, and the file that it is stored in."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from cosearch import axes
from cosearch.core.workload import OperatingPoint
from cosearch.latency import network
from cosearch.latency.batch import Operations
from cosearch.latency.network import RateNetwork, Seconds
from cosearch.testing import small_problem


def test_factors_are_made_anew_where_there_are_more_of_them_only():
    space, rng = axes.load_space("llm_decode", target="cpu"), random.Random(0)
    operations = Operations(space, OperatingPoint("decode", 1, 256))
    rows = operations.encoding.rows([space.sample(rng) for _ in range(60)])
    learnt, target = RateNetwork.load("cpu"), small_problem().target
    seconds = Seconds(learnt, operations, target)
    first = seconds.log_seconds(operations(rows[:20]))
    more = operations(rows)
    again, fresh = (one.log_seconds(more) for one in (seconds, Seconds(learnt, operations, target)))
    np.testing.assert_array_equal(again, fresh)
    np.testing.assert_allclose(first, again[:, :20], rtol=1e-6)
    made = vars(seconds).copy()
    seconds.log_seconds(more)
    assert all(made[name] is one for name, one in vars(seconds).items())


def test_a_network_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "rates_cpu.safetensors"
    learnt = RateNetwork.load("cpu")
    learnt.save(path)
    found = network.read(path)
    assert found.tokens == learnt.tokens
    np.testing.assert_array_equal(found.members[0]["embed"], learnt.members[0]["embed"])
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        RateNetwork.untrained().save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
