"""How well operations on an unseen GPU are predicted, before it is measured and after few measurements. See README.md.

usage: python experiments/latency_transfer/run.py --tables DIR[,DIR…] --op gemm --targets a100_sxm,h100_sxm
           --families "h100_sxm,h200_sxm;b200_sxm,b300_sxm,gb200,gb300" [--shots 0 10 20 50] [--seeds 6]
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cosearch.core.errors import UserError
from cosearch.core.registry import did_you_mean
from cosearch.latency import tables
from cosearch.latency.error_card import leave_out, refuse_few
from cosearch.latency.table_model import Training


def families_of(systems: Sequence[str], groups: str) -> dict[str, str]:
    """The family of each system: its group's first name, or its own. Groups may name what is in no table."""
    families = {name: name for name in systems}
    for group in groups.split(";"):
        names = [name.strip() for name in group.split(",") if name.strip()]
        families |= {name: names[0] for name in names if name in systems}
    return families


def told(families: Mapping[str, str], groups: str) -> str:
    """Which systems are left out together, and which names of `groups` leave nothing out: one may be misspelt."""
    together: dict[str, list[str]] = {}
    for name, family in families.items():
        together.setdefault(family, []).append(name)
    named = {name.strip() for name in groups.replace(";", ",").split(",")} - {""}
    unknown = sorted(named - families.keys())
    lines = ["left out together: " + "; ".join(", ".join(names) for names in together.values())]
    if unknown:
        lines.append(f"--families: not in the tables, and of no effect: {', '.join(unknown)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", required=True, help="folders of measured tables, separated by commas")
    parser.add_argument("--op", required=True, choices=tuple(tables.KINDS))
    parser.add_argument("--targets", help="systems to predict, separated by commas; all by default")
    parser.add_argument("--families", default="", help="systems that are near twins: A,B;C,D")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 10, 20, 50])
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    measured = tables.read([Path(folder) for folder in arguments.tables.split(",")], arguments.op)
    systems = {one.chip.name: one for one in measured}
    targets = arguments.targets.split(",") if arguments.targets else list(systems)
    for name in targets:
        if name not in systems:
            raise UserError(f"--targets: {name!r} is not in the tables{did_you_mean(name, tuple(systems))}")
        refuse_few(systems[name], arguments.shots)
    families = families_of(list(systems), arguments.families)
    for name in targets:
        if set(families.values()) == {families[name]}:
            raise UserError(
                f"--targets: of what is in the tables nothing is left to learn from without the family of {name}"
            )
    console = Console(stderr=True)
    console.print(told(families, arguments.families), highlight=False, soft_wrap=True)
    with console.status("reading") as status:
        training = Training(
            measured,
            families,
            [count for count in arguments.shots if count],
            progress=lambda what, part: status.update(f"{name}: {what}"),
        )
        results = []
        for name in targets:
            results += leave_out(training, systems[name], arguments.shots, arguments.seeds)
    table = Table("target", "shots", "MAPE", "Kendall's tau", "in 90 % interval", "interval, ×/÷")
    for one in results:
        table.add_row(
            one["target"], *(str(one[key]) for key in ("shots", "mape", "tau", "coverage")), f"{one['width']:.2f}"
        )
    for count in arguments.shots:
        own = [one for one in results if one["shots"] == count]
        means = [f"{np.mean([one[key] for one in own]):.3f}" for key in ("mape", "tau", "coverage", "width")]
        table.add_row("mean", str(count), *means)
    console.print(table)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"latency_transfer: {error}")
