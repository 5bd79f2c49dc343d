"""A small run and its trials, with hostile names in all that comes from outside."""

from pathlib import Path

from cosearch.core.candidate import Candidate
from cosearch.core.metric import measured, predicted
from cosearch.core.problem import Constraint, Objective, Problem
from cosearch.core.space import Space
from cosearch.core.target import Target
from cosearch.core.trial import Failure, Trial
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.report import Budget, Run

HOSTILE = "<script>alert(1)</script>[bold red]x[/]\x1b]0;owned\x07\nnext $page :smile:"
REFERENCE = {
    "architecture.attention": "mha",
    "precision.weights": "float32",
    "sparsity.pattern": "dense",
    "schedule.attention": "dot",
}


def make_run(folder: Path, bound: str = "1.1 * reference", experiment: str = "tiny") -> Run:
    """A run of two objectives and one constraint."""
    problem = Problem(
        Target("chip", "cpu", "measured", {"float32": 1e11}, 1e10, 1 << 30, 2, 1e-6),
        Workload("chat", (OperatingPoint("decode", 1, 128),)),
        (Objective.parse("minimize latency_s"), Objective.parse("minimize bits_per_byte")),
        (Constraint.parse(f"bits_per_byte <= {bound}"),),
    )
    knobs = {
        "architecture.attention": ("mha", "gqa", ("gqa", "mha"), HOSTILE),
        "precision.weights": ("float32", "int8"),
        "sparsity.pattern": ("dense",),
        "schedule.attention": ("dot", "multiply_reduce"),
    }
    space = Space("tiny", knobs, reference=Candidate.from_point(REFERENCE))
    return Run(folder, experiment, problem, space, Budget(trials=12, seconds=600))


def make_trial(
    latency_s: float = 1e-3,
    bits: float = 3.0,
    failure: Failure | None = None,
    predicted_s: float | None = None,
    reused: tuple[str, ...] = (),
    **choices: object,
) -> Trial:
    """A trial that differs from the reference in `choices`, given as `axis__name=value`."""
    point = REFERENCE | {knob.replace("__", "."): value for knob, value in choices.items()}
    candidate = Candidate.from_point(point)  # pyright: ignore[reportArgumentType]
    metrics = {
        "latency_s": measured(
            "latency_s", latency_s, interval=(0.9 * latency_s, 1.1 * latency_s), samples=(latency_s, latency_s)
        ),
        "bits_per_byte": measured("bits_per_byte", bits),
    }
    return Trial(
        candidate,
        latency_key=candidate.uid,
        quality_key=candidate.quality_axes_key,
        metrics={} if failure else metrics,
        predictions={}
        if predicted_s is None
        else {"latency_s": predicted("latency_s", predicted_s, (0.9 * predicted_s, 1.1 * predicted_s))},
        failure=failure,
        seconds={"measure": 2.0},
        reused=reused,
        fingerprint={"jax": "0.10.2", "cores": 2, "processor": HOSTILE},
    )


TRIALS = (
    make_trial(1e-3, 3.0),
    make_trial(312e-6, 3.1, predicted_s=300e-6, architecture__attention=HOSTILE, precision__weights="int8"),
    make_trial(6e-4, 2.91, predicted_s=9e-4, architecture__attention=("gqa", "mha")),
    make_trial(5e-4, 3.6, architecture__attention="gqa"),
    make_trial(2e-3, 3.05, schedule__attention="multiply_reduce"),
    make_trial(4e-4, 2.95, predicted_s=4.2e-4, architecture__attention="gqa", precision__weights="int8"),
    make_trial(failure=Failure("verify", f"{HOSTILE} is wrong"), precision__weights="int8"),
)
FAST, SMALL, KNEE = TRIALS[1], TRIALS[2], TRIALS[5]
