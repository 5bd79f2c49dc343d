"""What programs are timed and verified on."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.candidate import Candidate
from cosearch.core.errors import Rejected
from cosearch.core.problem import Objective, Problem
from cosearch.core.target import Target
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.measure.bench import Bench, Compiled, memory_bytes, steps
from cosearch.measure.process import Worker
from cosearch.measure.tasks import Workbench, compile_candidate
from cosearch.measure.verify import digest
from cosearch.stages import Measure, cold_bytes

CONTEXT = 32
WORKLOAD = Workload("both", (OperatingPoint("decode", 2, CONTEXT), OperatingPoint("prefill", 2, CONTEXT)))
CANDIDATE = Candidate.from_point(
    {
        "architecture.width": 32,
        "architecture.depth": 1,
        "architecture.head_dim": 16,
        "architecture.ffn_ratio": 2,
        "precision.kv_cache": "int8",
    }
)


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.compile(CANDIDATE, WORKLOAD, seed=1)
    return bench


class Recorded:
    """An executable that notes where its weights and cache lie."""

    def __init__(self, compiled: Compiled) -> None:
        self.count, self.run = len(compiled.params) + len(compiled.program.cache), compiled.executable
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, *arrays: Any) -> Any:
        self.seen.append(tuple(array.unsafe_buffer_pointer() for array in arrays[: self.count]))
        return self.run(*arrays)


def recorded(compiled: Compiled) -> tuple[Compiled, Recorded]:
    found: Any = Recorded(compiled)
    return replace(compiled, executable=found), found


def test_runs_go_round_copies_that_exceed_the_caches_and_share_no_memory(bench: Bench):
    size = sum(array.nbytes for array in [*bench.programs[0].params, *bench.programs[0].empty_cache()])
    one, seen = recorded(bench.programs[0])
    other, also = recorded(bench.programs[0])
    first, second = steps([one, other], 4 * size)
    for _ in range(10):
        first()
        second()
    assert seen.seen[:5] == seen.seen[5:10], "five copies, the next odd number of four"
    places = [place for turn in seen.seen[:5] + also.seen[:5] for place in turn]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(("cold", "copies"), [(0, 1), (1, 1), (10**12, 257)])
def test_there_is_one_copy_at_least_and_no_end_of_them(bench: Bench, cold: int, copies: int):
    one, seen = recorded(bench.programs[1])
    (step,) = steps([one], cold)
    for _ in range(copies + 1):
        step()
    assert len(set(seen.seen)) == copies


def test_caches_are_handed_on_used(bench: Bench):
    decode, _ = bench.programs
    for one, other in zip(decode.used_cache(1), decode.used_cache(2), strict=True):
        assert np.isfinite(np.asarray(one, np.float64)).all()
        assert not np.array_equal(one, other)


POINTER_BYTES = 8
STORED = (
    {},
    {"schedule.layers": "unroll", "architecture.depth": 2},
    {"schedule.steps": 4, "precision.weights": "int8"},
    {"precision.weights": "bfloat16", "precision.kv_cache": "int4"},
    pytest.param({"schedule.matmul": "cpp", "schedule.layers": "unroll"}, marks=pytest.mark.compiler),
    pytest.param(
        {"schedule.matmul": "cpp", "schedule.fusion": "step", "schedule.steps": 4}, marks=pytest.mark.compiler
    ),
)


@pytest.mark.parametrize("choices", STORED, ids=str)
def test_the_memory_is_that_of_all_buffers(choices: dict[str, Any]):
    """What goes in, what comes out beside the cache, which is written in place, with its table, and temporaries."""
    candidate, held = Candidate.from_point({**CANDIDATE.point, **choices}), []
    bench = Bench()
    for compiled in bench.compile(candidate, WORKLOAD, seed=1):
        given = [
            *compiled.params,
            *compiled.empty_cache(),
            *(np.zeros(x.shape, x.dtype) for x in compiled.program.inputs),
        ]
        size = sum(array.nbytes for array in given)
        found = compiled.executable(*given)
        beside = found[: len(found) - len(compiled.program.cache)]
        results = sum(array.nbytes for array in beside) + POINTER_BYTES * len(found)
        account = compiled.executable.memory_analysis()
        assert account is not None
        held.append(size + results + account.temp_size_in_bytes)
        assert memory_bytes(compiled.executable) == held[-1]
    told = compile_candidate(Workbench(), lambda what, done: None, candidate.point, WORKLOAD.to_json(), seed=1)
    assert told["memory_bytes"] == max(held) > told["weight_bytes"] + told["cache_bytes"]


class Silent:
    """An executable whose compiler gives no account."""

    def memory_analysis(self) -> None:
        return None


def test_no_memory_is_made_up():
    silent: Any = Silent()
    with pytest.raises(Rejected, match="does not say what its program takes"):
        memory_bytes(silent)


class Text:
    """An executable of this HLO."""

    def __init__(self, hlo: str | None) -> None:
        self.hlo = hlo

    def as_text(self) -> str | None:
        return self.hlo


def test_only_copies_of_whole_caches_count(bench: Bench):
    values = next(spec for spec in bench.programs[0].program.cache if spec.dtype == np.int8)
    shape = ",".join(map(str, values.shape))
    other = shape + ",1"
    for hlo, count in (
        (None, 0),
        (f"  %a = s8[{shape}]{{3,2,1,0}} copy(%b)", values.size),
        (f"  %a = s8[{shape}] copy(%b)\n  %c = s8[{shape}] copy(%a)", 2 * values.size),
        (f"  %a = f32[{shape}] copy(%b)\n  %c = s8[{other}] copy(%a)", 0),
    ):
        executable: Any = Text(hlo and f"ENTRY %main (b: s8[{shape}]) -> s8[{shape}] {{\n{hlo}\n}}")
        assert replace(bench.programs[0], executable=executable).copied_bytes == count


def test_weights_are_those_of_the_seed(bench: Bench):
    before = digest(bench.programs[0].params)
    assert digest(Bench().compile(CANDIDATE, WORKLOAD, seed=1)[0].params) == before
    assert digest(Bench().compile(CANDIDATE, WORKLOAD, seed=2)[0].params) != before
    assert digest(bench.programs[0].params) == before


class Lying:
    """An executable whose logits, or whose weights, are changed by what `lie` does after some runs."""

    def __init__(self, compiled: Compiled, lie: Callable[[int, list[Any], Any], Any]) -> None:
        self._run, self._lie, self._params, self._calls = compiled.executable, lie, compiled.params, 0

    def __call__(self, *arrays: Any) -> Any:
        self._calls += 1
        logits, *cache = self._run(*arrays)
        return self._lie(self._calls, self._params, logits), *cache


def unsteady(call: int, params: list[Any], logits: jax.Array) -> jax.Array:
    """Within what is allowed, and other bits each time."""
    return logits * jnp.float32(1 + call * 2**-23)


def overwriting(call: int, params: list[Any], logits: jax.Array) -> jax.Array:
    if call == CONTEXT:
        params[0] = params[0] + 1e-6
    return logits


LIES: Mapping[Callable[[int, list[Any], Any], Any], str] = {
    unsteady: "the same inputs give other logits when they are computed again",
    overwriting: "it overwrites the weights that it is given",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_what_is_right_and_not_to_be_relied_on_is_rejected(bench: Bench, lie: Callable[[int, list[Any], Any], Any]):
    lying: Any = Lying(bench.programs[0], lie)
    bench.programs = [replace(bench.programs[0], executable=lying)]
    with pytest.raises(Rejected, match=LIES[lie]):
        bench.verify(CANDIDATE)


class Answering(Worker):
    """A worker that has measured already."""

    def __init__(self, *samples: list[float]) -> None:
        self._samples = samples
        self.asked: dict[str, Any] = {}

    def call(self, task: str, arguments: Mapping[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        self.asked = dict(arguments)
        return {"samples_s": list(self._samples), "contended": [0.0, 0.25]}


PROBLEM = Problem(
    Target("chip", "cpu", "made up", {"float32": 1e9}, 1e9, 10**9, 2, 1e-6, cache_bytes=10**8),
    WORKLOAD,
    (Objective.parse("minimize latency_s"),),
)


def test_what_stays_contended_is_marked_and_data_are_cold():
    worker = Answering([1e-3] * 20, [1e-2] * 20)
    latency = Measure(worker, 1.0, 0.3)(CANDIDATE, PROBLEM)["latency_s"]
    assert latency.contended == 0.25 and len(latency.samples) == 40
    assert worker.asked["cold_bytes"] == cold_bytes(PROBLEM) == 2 * 10**8


@pytest.mark.parametrize(
    ("samples", "phase"), [(([1e-6] * 20, [1e-2] * 20), "decode"), (([1e-3] * 20, [1e-6] * 20), "prefill")]
)
def test_a_point_below_the_roofline_is_impossible(samples: tuple[list[float], list[float]], phase: str):
    with pytest.raises(Rejected, match=rf"^impossible: 1e-06 s for {phase} at context 32, where "):
        Measure(Answering(*samples), 1.0, 0.3)(CANDIDATE, PROBLEM)
