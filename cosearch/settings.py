"""The settings of a run: what Hydra composed, as plain and checked values; saved in the run's `config.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cosearch import axes
from cosearch.core import check
from cosearch.core.errors import UserError
from cosearch.core.problem import Constraint, Objective
from cosearch.core.registry import did_you_mean
from cosearch.core.space import Space
from cosearch.core.workload import Workload
from cosearch.export import STACKS
from cosearch.proposers import PROPOSERS
from cosearch.quality import Recipe
from cosearch.report import TRACKERS, Budget
from cosearch.stages import Limits
from cosearch.targets import TARGETS

VERSION = 3
"""Of `config.yaml` and the run folder; a run folder of another version is refused."""

_KINDS: Mapping[str, type[list] | type[dict]] = {
    "knobs": dict,
    "workload": dict,
    "objectives": list,
    "constraints": list,
    "budget": dict,
    "proposer": dict,
    "quality": dict,
    "trackers": list,
    "limits": dict,
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does."""

    experiment: str
    space: str
    knobs: Mapping[str, Any]
    target: str
    deploy: str | None
    workload: Workload
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    budget: Budget
    proposer: str
    proposer_options: Mapping[str, Any]
    seed: int
    quality: Recipe
    corpus: str
    measure_seconds: float
    trackers: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    attached: bool | None = None
    """Whether the target was attached where the run was started; None before that is known."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> "Settings":
        """Check plain data.

        Raises:
            UserError: a key is missing or unknown, or a value is not allowed; the message names key and values.
        """
        known = {f.name for f in fields(cls)} - {"proposer_options"} | {"output", "version"}
        for key in config:
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), tuple(sorted(known)))}")
        for key in sorted(known - {"version", "limits", "attached"}):
            if key not in config:
                raise UserError(f"{where}: {key!r} is missing; for example: experiment=llm_decode")
        for key, kind in _KINDS.items():
            if not isinstance(config.get(key) or kind(), kind):
                what = "a list, for example ['…']" if kind is list else "a mapping of keys to values"
                raise UserError(f"{key}: {config[key]!r} is not {what}")
        proposer = dict(config["proposer"] or {})
        budget, limits = dict(config["budget"] or {}), dict(config.get("limits") or {})
        _check_numbers(budget, {"trials": int, "seconds": float}, "budget")
        _check_numbers(limits, {f.name: float for f in fields(Limits)}, "limits", complete=False)
        _check_numbers(config, {"measure_seconds": float, "seed": int}, where, complete=False, strict=False)
        if not config["objectives"]:
            raise UserError("objectives: is empty. A search needs at least one, for example 'minimize latency_s'")
        settings = cls(
            experiment=str(config["experiment"]),
            space=str(config["space"]),
            knobs=dict(config["knobs"] or {}),
            target=_name(config["target"], TARGETS, "target"),
            deploy=None if config["deploy"] is None else _name(config["deploy"], STACKS, "deploy"),
            workload=Workload.from_json(config["workload"] or {}),
            objectives=tuple(Objective.parse(text) for text in config["objectives"]),
            constraints=tuple(Constraint.parse(text) for text in config["constraints"] or ()),
            budget=Budget(budget["trials"], budget["seconds"]),
            proposer=_name(proposer.pop("name", ""), PROPOSERS, "proposer.name"),
            proposer_options=proposer,
            seed=config["seed"],
            quality=Recipe.from_json(config["quality"] or {}),
            corpus=str(config["corpus"]),
            measure_seconds=float(config["measure_seconds"]),
            trackers=tuple(_name(name, TRACKERS, "trackers") for name in config["trackers"] or ()),
            limits=Limits(**limits),
            attached=config.get("attached"),
        )
        if settings.attached not in (True, False, None):
            raise UserError(f"{where}: attached: {settings.attached!r} is not true or false")
        return settings

    def load_space(self) -> Space:
        """The search space of this run: what its target runs and its serving stack loads.

        Raises:
            UserError: there is no such space, or it is wrong.
        """
        return axes.load_space(self.space, self.knobs, self.target, self.deploy)


def _name(value: Any, registry: Any, where: str) -> str:
    if not isinstance(value, str) or value not in registry:
        raise UserError(f"{where}: unknown value {value!r}{did_you_mean(str(value), registry.names())}")
    return value


def _check_numbers(
    data: Mapping[str, Any], kinds: Mapping[str, type], where: str, complete: bool = True, strict: bool = True
) -> None:
    for key in data if strict else ():
        if key not in kinds:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), tuple(kinds))}")
    for key, kind in kinds.items():
        if key not in data:
            if complete:
                raise UserError(f"{where}: {key!r} is missing")
            continue
        if kind is int:
            check.whole(data[key], 0 if key == "seed" else 1, f"{where}.{key}")
        else:
            check.positive(data[key], f"{where}.{key}")
