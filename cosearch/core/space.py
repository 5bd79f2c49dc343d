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
        only: Mapping[str, frozenset[Value]] | None = None,
    ) -> "Space":
        """Read a space; `overrides` replaces the values of some knobs, `only` leaves out all values but these (of a
        list by layer, all that stand in it).

        Raises:
            UserError: the file cannot be read, or a key, knob, value or expression in it is wrong.
        """
        data = read_yaml(path)
        _check_keys(data, ("knobs", "when", "rules", "reference"), str(path))
        raw = {**_mapping(data, "knobs", path), **(overrides or {})}
        if not raw:
            raise UserError(
                f"{path}: 'knobs' is empty. A space needs at least one knob, for example of {sorted(declared)[:3]}"
            )
        # A knob that the space leaves out stands at its default, so that a point always says all of itself.
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
        for name, allowed in (only or {}).items():
            left = tuple(v for v in knobs[name] if allowed.issuperset(v if isinstance(v, tuple) else (v,)))
            if not left:
                raise UserError(
                    f"{path}: knobs.{name}: none of {', '.join(map(repr, knobs[name]))} is left. "
                    f"Allowed here: {', '.join(sorted(map(str, allowed)))}"
                )
            knobs[name] = left

        when: dict[str, Condition] = {}
        for name, knob in declared.items():
            if knob.used_by:
                chooser, variants = knob.used_by
                when[name] = Expression(" or ".join(f"{variant!r} in {chooser}" for variant in variants))
        for name, text in _mapping(data, "when", path).items():
            at = f"{path}: when.{name}"
            _check_known(name, declared, at)
            when[name] = _expression(text, at, declared)

        own_rules = []
        entries = data.get("rules") or []
        if not isinstance(entries, list):
            raise UserError(f"{path}: 'rules' must be a list")
        for index, entry in enumerate(entries):
            at = f"{path}: rules[{index}]"
            if not isinstance(entry, dict) or set(entry) != {"name", "require", "because"}:
                raise UserError(f"{at}: must have exactly the keys name, require, because")
            condition = _expression(entry["require"], at, declared)
            own_rules.append(Rule.require(str(entry["name"]), condition, str(entry["because"])))

        point = {name: knob.default for name, knob in declared.items()}
        for name, value in _mapping(data, "reference", path).items():
            at = f"{path}: reference.{name}"
            _check_known(name, declared, at)
            point[name] = as_value(value)
            if why := declared[name].refusal(point[name]):
                raise UserError(f"{at}: {why}")
        space = cls(path.stem, knobs, when, (*own_rules, *rules))
        reference = space.canonical(point)
        if why := space.why_invalid(reference):
            raise UserError(f"{path}: reference: {why}")
        space = cls(path.stem, knobs, when, space.rules, Candidate.from_point(reference))
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
        survey = Survey()
        for raw in self.points() if self.size <= tries else (self.draw(rng) for _ in range(tries)):
            survey.add(self, raw)
            if survey.example is not None:
                return survey.example
        which = "points" if self.size <= tries else "sampled points"
        raise UserError(
            f"the space {self.name!r} has no legal point; its {survey.drawn} {which} are refused by\n"
            + "\n".join(survey.reasons())
        )

    def survey(self, rng: random.Random, draws: int) -> "Survey":
        """What `draws` raw points, drawn uniformly, tell of the space."""
        survey = Survey()
        for _ in range(draws):
            survey.add(self, self.draw(rng))
        return survey

    def candidate(self, raw: Point) -> Candidate | None:
        """The candidate of a raw point, or None where a rule refuses it."""
        point = self.canonical(raw)
        return None if self.why_invalid(point) else Candidate.from_point(point)

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Legal candidates that differ by one step of one knob; names step to every other name."""
        base = {name: values[0] for name, values in self.knobs.items()} | {
            name: value for name, value in candidate.point.items() if name in self.knobs
        }
        found = {}
        for name, values in self.knobs.items():
            ordered = all(isinstance(value, int | float) for value in values)
            at = values.index(base[name]) if base[name] in values else None
            steps = values if at is None or not ordered else values[max(0, at - 1) : at + 2]
            for value in steps:
                near = self.candidate(base | {name: value})
                if near is not None and near != candidate:
                    found[near.uid] = near
        return list(found.values())

    def broken_rule(self, point: Point) -> tuple[str, str] | None:
        """The name of the first rule that `point` breaks, and why."""
        return next(((rule.name, why) for rule in self.rules if (why := rule.why(point))), None)

    def _holds(self, condition: Condition, point: Point) -> bool:
        return condition.names <= point.keys() and bool(condition(point))


@dataclass
class Survey:
    """Raw points of a space, counted: how many are legal, and which rules refuse the others.

    `distinct` has, for each point drawn, the part of one legal candidate that it stands for: points that differ in
    inactive knobs only are the same candidate.
    """

    drawn: int = 0
    legal: int = 0
    distinct: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    reason: dict[str, str] = field(default_factory=dict)
    example: Candidate | None = None

    def add(self, space: Space, raw: Point) -> None:
        """Count one raw point."""
        self.drawn += 1
        point = space.canonical(raw)
        broken = space.broken_rule(point)
        if broken is None:
            self.legal += 1
            self.example = self.example or Candidate.from_point(point)
            same = math.prod(len(space.knobs[name]) for name in raw if name not in point)
            self.distinct.append(1 / same)
            return
        self.distinct.append(0.0)
        self.refusals[broken[0]] += 1
        self.reason.setdefault(*broken)

    def candidates(self, space: Space) -> tuple[float, tuple[float, float]]:
        """How many distinct legal candidates the space has, by these points: the estimate and its 90 % interval."""
        mean = sum(self.distinct) / self.drawn
        variance = sum((one - mean) ** 2 for one in self.distinct) / self.drawn**2
        reach = 1.645 * math.sqrt(variance)
        return mean * space.size, (max(mean - reach, 0.0) * space.size, (mean + reach) * space.size)

    def reasons(self, most: int = 5) -> list[str]:
        """A line for each of the rules that refuse most."""
        return [
            f"  {count / self.drawn:5.0%}  rule {rule!r}, for example: {self.reason[rule]}"
            for rule, count in self.refusals.most_common(most)
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


def _check_known(name: str, declared: Mapping[str, Knob], where: str) -> None:
    if name not in declared:
        raise UserError(f"{where}: unknown knob {name!r}{did_you_mean(str(name), tuple(sorted(declared)))}")


def _mapping(data: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key!r} must be a mapping")
    return value


def _expression(text: Any, where: str, declared: Mapping[str, Knob]) -> Expression:
    expression = Expression(str(text), where)
    for name in expression.names:
        _check_known(name, declared, where)
    return expression
