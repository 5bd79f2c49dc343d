import pytest

from cosearch.report import pace


def test_slow_work_is_done_less_often(monkeypatch):
    now = [0.0]
    done = []

    def work() -> None:
        done.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    allowed = pace.Pace(10.0)
    for _ in range(100):
        allowed.run(work)
        now[0] += 1.0
    assert done == pytest.approx([0.0, 42.0, 84.0])
