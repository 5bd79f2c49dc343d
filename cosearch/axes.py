"""The four axes together: which knobs there are, which points are legal, and the decoder a candidate stands for."""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosearch import precision, schedule, sparsity
from cosearch.architecture import decoder as decoder_of
from cosearch.architecture import shape as architecture
from cosearch.architecture.decoder import Decoder, scannable, why_no_kernel, why_not
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Candidate, Choices, Point, Value
from cosearch.core.errors import Rejected, UserError
from cosearch.core.registry import did_you_mean
from cosearch.core.space import Knob, Rule, Space, WhyNoValue
from cosearch.core.workload import Workload
from cosearch.export import STACKS
from cosearch.kernels import Product
from cosearch.paths import SEARCH_SPACES
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.targets import TARGETS


def declared_knobs() -> dict[str, Knob]:
    """Every knob of every axis, by dotted name."""
    axes = {
        "architecture": architecture.knobs(),
        "precision": precision.KNOBS,
        "sparsity": sparsity.knobs(),
        "schedule": schedule.KNOBS,
    }
    return {f"{axis}.{name}": knob for axis, knobs in axes.items() for name, knob in knobs.items()}


def dense_shape(candidate: Candidate) -> DecoderShape:
    """The sizes of the model that is trained."""
    return _dense_shape(candidate.architecture)


def served_shape(candidate: Candidate) -> DecoderShape:
    """The sizes of what sparsity leaves of it, which is what is compiled and served."""
    return _served_shape(candidate.architecture, candidate.sparsity)


@functools.lru_cache(4096)  # thousands of candidates are screened, over few shapes
def _dense_shape(architecture: Choices) -> DecoderShape:
    return DecoderShape.of(architecture)


@functools.lru_cache(4096)
def _served_shape(architecture: Choices, sparse: Choices) -> DecoderShape:
    return sparsity.served_shape(_dense_shape(architecture), sparse)


def decoder(candidate: Candidate) -> Decoder:
    """The model that is compiled and served; abstract."""
    return Decoder(served_shape(candidate), Precision.of(candidate.precision), Schedule.of(candidate.schedule))


def portable_decoder(candidate: Candidate) -> Decoder:
    """The same model over the same arrays, computed by XLA alone."""
    schedule = Schedule.of(candidate.schedule).portable
    return Decoder(served_shape(candidate), Precision.of(candidate.precision), schedule)


def native_products(candidate: Candidate, workload: Workload) -> list[Product]:
    """The products that C++ kernels do for a candidate, at any of the operating points."""
    shape, precision = served_shape(candidate), Precision.of(candidate.precision)
    schedule = Schedule.of(candidate.schedule)
    each = (decoder_of.native_products(shape, precision, schedule, point) for point in workload.points)
    return list(dict.fromkeys(itertools.chain.from_iterable(each)))


def plain(candidate: Candidate) -> Candidate:
    """The same architecture the plain way: float32, dense, every schedule knob at its default."""
    point = {f"architecture.{name}": value for name, value in candidate.architecture.items()}
    declared = declared_knobs()
    for name, knob in declared.items():
        if not name.startswith("architecture.") and knob.used_by is None:
            point[name] = knob.default
    if not scannable(dense_shape(candidate), Precision()):
        point["schedule.layers"] = "unroll"
    return Candidate.from_point(point)


def _fits(shape: Callable[[Candidate], DecoderShape]) -> Callable[[Point], str | None]:
    """Why a point has no such shape."""

    def why(point: Point) -> str | None:
        try:
            shape(Candidate.from_point(point))
        except Rejected as rejection:
            return str(rejection)
        return None

    return why


def _why_no_formats(point: Point) -> str | None:
    candidate = Candidate.from_point(point)
    return why_not(served_shape(candidate), Precision.of(candidate.precision))


def _why_no_scan(point: Point) -> str | None:
    candidate = Candidate.from_point(point)
    if Schedule.of(candidate.schedule).layers == "unroll":
        return None
    if scannable(served_shape(candidate), Precision.of(candidate.precision)):
        return None
    return "schedule.layers='scan' runs one loop over equal layers, and these layers differ; take 'unroll'"


def _why_no_kernel(point: Point) -> str | None:
    candidate = Candidate.from_point(point)
    precision, schedule = Precision.of(candidate.precision), Schedule.of(candidate.schedule)
    return why_no_kernel(served_shape(candidate), precision, schedule)


RULES = (
    Rule("architecture fits", _fits(dense_shape)),
    Rule("sparsity fits", _fits(served_shape)),
    Rule("formats hold the matrices", _why_no_formats),
    Rule("scan needs equal layers", _why_no_scan),
    Rule("kernels run something", _why_no_kernel),
)


def load_space(
    name: str, overrides: Mapping[str, Any] | None = None, target: str | None = None, deploy: str | None = None
) -> Space:
    """The search space of that name, or in that YAML file, with the values of some knobs replaced.

    With a `target` it holds only what that chip runs, with `deploy` what that serving stack loads.

    Raises:
        UserError: there is no such space, or it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SEARCH_SPACES / f"{name}.yaml"
    if not path.is_file():
        known = tuple(sorted(file.stem for file in SEARCH_SPACES.glob("*.yaml")))
        raise UserError(f"space={name}: no such search space{did_you_mean(name, known)}, or the path of a YAML file")
    rules = list(RULES)
    only: dict[str, WhyNoValue] = {}
    if target is not None:
        only[f"target={target}"] = TARGETS[target].why_no_value
        rules.append(_rule(f"{target} runs it", TARGETS[target].why_not))
    if deploy is not None:
        only[f"deploy={deploy}"] = _why_not_loaded(deploy)
        rules.append(_rule(f"{deploy} loads it", STACKS[deploy].why_not))
    return Space.from_yaml(path, declared_knobs(), rules, overrides, only)


def _why_not_loaded(deploy: str) -> WhyNoValue:
    """Why a serving stack loads nothing with some value of a knob, or with one that stands in this list."""
    loads, declared = STACKS[deploy].loads, declared_knobs()
    for knob in loads:
        if knob not in declared:
            raise UserError(f"deploy={deploy}: unknown knob {knob!r}{did_you_mean(knob, tuple(sorted(declared)))}")

    def why_not(knob: str, value: Value) -> str | None:
        if knob not in loads or loads[knob].issuperset(value if isinstance(value, tuple) else (value,)):
            return None
        return f"Allowed: {', '.join(sorted(map(str, loads[knob])))}"

    return why_not


def _rule(name: str, why_not: Callable[[Candidate], str | None]) -> Rule:
    return Rule(name, lambda point: why_not(Candidate.from_point(point)))
