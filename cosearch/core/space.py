"""The space of candidates: knobs with finite values, when each is active, and rules that say why not.

A space is plain YAML (`search_spaces/<name>.yaml`):

    knobs:       knob -> list of values; order is neighbourhood. A value that is itself a list differs by layer
    when:        knob -> expression; the knob is active only where it holds
    rules:       list of {name, require: expression, because: text}
    reference:   the plain point that everything is compared with; knobs left out take their defaults

What the axes themselves know (which knobs exist, which values are legal, which variant reads which knob)
comes in as `Knob` declarations and rules from the axes' packages, so a space need not repeat it.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from cosearch.core.candidate import Candidate, Point, Value, as_value
from cosearch.core.errors import UserError
from cosearch.core.expression import Expression
from cosearch.core.registry import Registry, did_you_mean

_MAX_FILE_BYTES = 1_000_000
_QUICK_TRIES = 100


class Condition(Protocol):
    """Whether something holds of the knobs it names."""

    @property
    def names(self) -> frozenset[str]: ...

    def __call__(self, values: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Rule:
    """A reason why points are illegal; `why(point)` is None for a legal one."""

    name: str
    why: Callable[[Point], str | None]

    @classmethod
    def require(cls, name: str, condition: Expression, because: str) -> "Rule":
        """A rule from an expression. It does not speak of points where a knob it names is inactive."""

        def why(point: Point) -> str | None:
            if not condition.names <= point.keys() or condition(point):
                return None
            read = ", ".join(f"{name}={point[name]!r}" for name in sorted(condition.names))
            return f"{because} (needs {condition.text}; here {read})"

        return cls(name, why)


@dataclass(frozen=True)
class Knob:
    """What an axis declares of a knob.

    `why_not(value)` says why a value cannot be (None if it can); `used_by` names, where the knob belongs to
    some variants only, the knob that chooses the variant and the variants.
    """

    default: Value
    why_not: Callable[[Value], str | None]
    per_layer: bool = False
    used_by: tuple[str, tuple[str, ...]] | None = None

    def refusal(self, value: Value) -> str | None:
        """Why `value`, or a layer's part of it, cannot be taken."""
        if isinstance(value, tuple) and self.per_layer:
            if not value:
                return "a list by layer must not be empty"
            return next((why for item in value if (why := self.why_not(item))), None)
        return self.why_not(value)


def choice(default: Value, allowed: Callable[[], Sequence[Value]], **more: Any) -> Knob:
    """A knob whose values are the given ones, usually the names of a registry."""

    def why_not(value: Value) -> str | None:
        if any(value == one and type(value) is type(one) for one in allowed()):
            return None
        if isinstance(value, str):
            return f"unknown value {value!r}{did_you_mean(value, tuple(map(str, allowed())))}"
        return f"{value!r} is not among {', '.join(map(repr, allowed()))}"

    return Knob(default, why_not, **more)


def integer(default: int, *, at_least: int = 1, **more: Any) -> Knob:
    """A whole number."""

    def why_not(value: Value) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
            return None
        return f"{value!r} is not a whole number of at least {at_least}"

    return Knob(default, why_not, **more)


def fraction(default: float, **more: Any) -> Knob:
    """A number above 0 and up to 1."""

    def why_not(value: Value) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            return None
        return f"{value!r} is not a number above 0 and up to 1"

    return Knob(default, why_not, **more)


def whole_part(units: float, part: float) -> int | None:
    """`part` of `units`, where that is a whole number of at least 1 but for the rounding of floats."""
    left = units * part
    return round(left) if round(left) >= 1 and abs(left - round(left)) < 1e-9 else None


WhyNoValue = Callable[[str, Value], str | None]
"""Why somebody cannot do with a value of a knob; None where they can."""


class HasKnobs(Protocol):
    """A variant, a pattern: something that brings knobs of its own."""

    @property
    def knobs(self) -> Mapping[str, Knob]: ...


def variant_knobs(chooser: str, variants: Registry[Any]) -> dict[str, Knob]:
    """The knobs that registered `HasKnobs` bring, each active where the knob `chooser` names one that reads it."""
    users: dict[str, list[str]] = {}
    found: dict[str, Knob] = {}
    for name in variants:
        variant: HasKnobs = variants[name]
        for knob, declared in variant.knobs.items():
            users.setdefault(knob, []).append(name)
            found[knob] = declared
    return {knob: replace(declared, used_by=(chooser, tuple(users[knob]))) for knob, declared in found.items()}


@dataclass(frozen=True)
class Space:
    """Knobs of the four axes, by dotted name, and what is legal among them."""

    name: str
    knobs: Mapping[str, tuple[Value, ...]]
    when: Mapping[str, Condition] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    reference: Candidate = field(default_factory=lambda: Candidate.from_point({}))

    @classmethod
    def from_yaml(
        cls,
        path: Path,
        declared: Mapping[str, Knob],
        rules: Sequence[Rule] = (),
        overrides: Mapping[str, Any] | None = None,
        only: Mapping[str, WhyNoValue] | None = None,
    ) -> "Space":
        """Read a space; `overrides` replaces the values of some knobs, `only` leaves out, for each who asks for it, the
        values that it has a reason against.

        Raises:
            UserError: the file cannot be read, or a key, knob, value or expression in it is wrong.
        """
        data = read_yaml(path)
        _check_keys(data, ("knobs", "when", "rules", "reference"), str(path))
        knobs = _knobs({**_mapping(data, "knobs", path), **(overrides or {})}, path, declared)
        for asker, why_not in (only or {}).items():
            knobs = _narrowed(knobs, why_not, asker, path)
        when, own_rules = _conditions(data, path, declared), _own_rules(data, path, declared)
        space = cls(path.stem, knobs, when, (*own_rules, *rules))
        reference = space.canonical(_reference(data, path, declared))
        if why := space.why_invalid(reference):
            raise UserError(f"{path}: reference: {why}")
        space = replace(space, reference=Candidate.from_point(reference))
        space.sample(random.Random(0))
        return space

    @property
    def size(self) -> int:
        """The number of points before rules and inactive knobs are taken off."""
        return math.prod(len(values) for values in self.knobs.values())

    def canonical(self, point: Point) -> dict[str, Value]:
        """`point` without its inactive knobs; the uid is taken of this."""
        active = dict(point)
        while dropped := [name for name in active if name in self.when and not self._holds(self.when[name], active)]:
            for name in dropped:
                del active[name]
        return active

    def why_invalid(self, point: Point) -> str | None:
        """Which rule a canonical point breaks and by which knobs, or None for a legal one."""
        broken = self.broken_rule(point)
        return f"rule {broken[0]!r}: {broken[1]}" if broken else None

    def points(self) -> Iterator[dict[str, Value]]:
        """Every raw point, in order."""
        for values in itertools.product(*self.knobs.values()):
            yield dict(zip(self.knobs, values, strict=True))

    def draw(self, rng: random.Random) -> dict[str, Value]:
        """A raw point, uniform over the knobs' values; it may be illegal."""
        return {name: rng.choice(values) for name, values in self.knobs.items()}

    def sample(self, rng: random.Random, tries: int = 20_000) -> Candidate:
        """A legal candidate, uniform over the legal raw points.

        Raises:
            UserError: none was found; the message counts the points by the rule that refused them.
        """
        for _ in range(_QUICK_TRIES):
            candidate = self.candidate(self.draw(rng))
            if candidate is not None:
                return candidate
        # A small space is walked whole, so that "no legal point" is certain.
        refusals = Refusals()
        for raw in self.points() if self.size <= tries else (self.draw(rng) for _ in range(tries)):
            point = self.canonical(raw)
            broken = self.broken_rule(point)
            if broken is None:
                return Candidate.from_point(point)
            refusals.add(*broken)
        which = "points" if self.size <= tries else "sampled points"
        raise UserError(
            f"the space {self.name!r} has no legal point; its {refusals.total} {which} are refused by\n"
            + "\n".join(refusals.lines(refusals.total))
        )

    def candidate(self, raw: Point) -> Candidate | None:
        """The candidate of a raw point, or None where a rule refuses it."""
        point = self.canonical(raw)
        return None if self.why_invalid(point) else Candidate.from_point(point)

    def nearest(self, point: Point) -> dict[str, Value]:
        """A raw point with the values of `point`, and the first that is offered for a knob that it has not, or has at a
        value that the space does not offer (as the reference may)."""
        return {name: point[name] if point.get(name) in values else values[0] for name, values in self.knobs.items()}

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Legal candidates that differ by one step of one knob; names step to every other name. A knob that becomes
        active by a step takes every value: what it has by default may be where nobody would stay."""
        base, found = self.nearest(candidate.point), {}
        for name, values in self.knobs.items():
            ordered = all(isinstance(value, int | float) for value in values)
            at = values.index(base[name])
            steps = values[max(0, at - 1) : at + 2] if ordered else values
            for value in steps:
                stepped = base | {name: value}
                new = [knob for knob in self.canonical(stepped) if knob not in candidate.point]
                others = [stepped | {knob: other} for knob in new for other in self.knobs[knob]]
                for near in map(self.candidate, [stepped, *others]):
                    if near is not None and near != candidate:
                        found[near.uid] = near
        return list(found.values())

    def broken_rule(self, point: Point) -> tuple[str, str] | None:
        """The name of the first rule that `point` breaks, and why."""
        return next(((rule.name, why) for rule in self.rules if (why := rule.why(point))), None)

    def _holds(self, condition: Condition, point: Point) -> bool:
        return condition.names <= point.keys() and bool(condition(point))


@dataclass
class Refusals:
    """How many points each rule refuses, and why it refused the first."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, rule: str, why: str) -> None:
        """Count one point."""
        self.counts[rule] += 1
        self.reasons.setdefault(rule, why)

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self, points: int, most: int = 5) -> list[str]:
        """A line for each of the rules that refuse most, with its share of `points`."""
        return [
            f"  {count / points:5.0%}  rule {rule!r}, for example: {self.reasons[rule]}"
            for rule, count in self.counts.most_common(most)
        ]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, without duplicate keys, tags or aliases.

    Raises:
        UserError: the file is missing, unreadable, too large, or not such a mapping.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UserError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: the bytes are no UTF-8, or a date or number is out of range.
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: too deeply nested") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a mapping of keys to values")
    return data


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML would let pass, and aliases, which can blow a file up."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed (line {self.peek_event().start_mark.line + 1})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, count in Counter(map(str, keys)).items():
            if count > 1:
                raise yaml.YAMLError(f"the key {key!r} stands {count} times (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def _check_keys(data: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), allowed)}")


def _check_known(name: str, declared: Mapping[str, Any], where: str) -> None:
    if name not in declared:
        raise UserError(f"{where}: unknown knob {name!r}{did_you_mean(str(name), tuple(sorted(declared)))}")


def _mapping(data: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key!r} must be a mapping")
    return value


def _knobs(raw: Mapping[str, Any], path: Path, declared: Mapping[str, Knob]) -> dict[str, tuple[Value, ...]]:
    """Every declared knob's values. One that the space leaves out stands at its default, so that a point always says
    all of itself."""
    if not raw:
        raise UserError(
            f"{path}: 'knobs' is empty. A space needs at least one knob, for example of {sorted(declared)[:3]}"
        )
    knobs: dict[str, tuple[Value, ...]] = {name: (knob.default,) for name, knob in declared.items()}
    for name, values in raw.items():
        at = f"{path}: knobs.{name}"
        _check_known(name, declared, at)
        values = values if isinstance(values, list) else [values]
        knobs[name] = tuple(as_value(value) for value in values)
        if not values or len(set(map(repr, knobs[name]))) < len(values):
            raise UserError(f"{at}: needs a list of at least one value, each only once, and has {values!r}")
        for value in knobs[name]:
            if why := declared[name].refusal(value):
                raise UserError(f"{at}: {why}")
    return knobs


def _narrowed(
    knobs: Mapping[str, tuple[Value, ...]], why_not: WhyNoValue, asker: str, path: Path
) -> dict[str, tuple[Value, ...]]:
    """The knobs with those of their values that nothing is said against."""
    narrowed = {}
    for name, values in knobs.items():
        reasons = {value: why_not(name, value) for value in values}
        narrowed[name] = tuple(value for value in values if reasons[value] is None)
        if not narrowed[name]:
            raise UserError(
                f"{path}: knobs.{name}: {asker} allows none of {', '.join(map(repr, values))}. {reasons[values[0]]}"
            )
    return narrowed


def _conditions(data: Mapping[str, Any], path: Path, declared: Mapping[str, Knob]) -> dict[str, Condition]:
    """When each knob is active: where a variant that reads it is chosen, or where the file says."""
    when: dict[str, Condition] = {}
    for name, knob in declared.items():
        if knob.used_by:
            chooser, variants = knob.used_by
            when[name] = Expression(" or ".join(f"{variant!r} in {chooser}" for variant in variants))
    for name, text in _mapping(data, "when", path).items():
        at = f"{path}: when.{name}"
        _check_known(name, declared, at)
        when[name] = _expression(text, at, declared)
    return when


def _own_rules(data: Mapping[str, Any], path: Path, declared: Mapping[str, Knob]) -> list[Rule]:
    rules = []
    entries = data.get("rules") or []
    if not isinstance(entries, list):
        raise UserError(f"{path}: 'rules' must be a list")
    for index, entry in enumerate(entries):
        at = f"{path}: rules[{index}]"
        if not isinstance(entry, dict) or set(entry) != {"name", "require", "because"}:
            raise UserError(f"{at}: must have exactly the keys name, require, because")
        condition = _expression(entry["require"], at, declared)
        rules.append(Rule.require(str(entry["name"]), condition, str(entry["because"])))
    return rules


def _reference(data: Mapping[str, Any], path: Path, declared: Mapping[str, Knob]) -> dict[str, Value]:
    """The raw point of the reference."""
    point = {name: knob.default for name, knob in declared.items()}
    for name, value in _mapping(data, "reference", path).items():
        at = f"{path}: reference.{name}"
        _check_known(name, declared, at)
        point[name] = as_value(value)
        if why := declared[name].refusal(point[name]):
            raise UserError(f"{at}: {why}")
    return point


def _expression(text: Any, where: str, declared: Mapping[str, Knob]) -> Expression:
    expression = Expression(str(text), where)
    for name in expression.names:
        _check_known(name, declared, where)
    return expression
