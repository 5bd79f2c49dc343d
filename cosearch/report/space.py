"""What a search space holds, on the console: how large it is, how much of it is legal, and what is not, and why."""

import random

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from cosearch import axes
from cosearch.core.candidate import AXES
from cosearch.core.survey import Survey


def describe(name: str, target: str, deploy: str | None, draws: int, seed: int) -> None:
    """Print the size of a space, how many candidates are legal by drawing `draws`, what refuses the rest, an example.

    Raises:
        UserError: the space, target or serving stack is unknown, or its conditions link too many values.
    """
    space = axes.load_space(name, target=target, deploy=deploy)
    rng, survey = random.Random(seed), Survey(space)
    console = Console(soft_wrap=True, highlight=False)
    for _ in track(range(draws), "drawing points", console=Console(stderr=True), transient=True):
        survey.draw(rng)
    varied = {knob: values for knob, values in space.knobs.items() if len(values) > 1}
    console.print(f"[bold]{escape(space.name)}[/] for {target}" + (f", to be loaded by {deploy}" if deploy else ""))
    for axis in AXES:
        own = [f"{knob.partition('.')[2]} {len(v)}" for knob, v in varied.items() if knob.startswith(f"{axis}.")]
        console.print(f"  {axis:13} {', '.join(own) or '-'}")
    console.print(f"{space.size:.3g} points: all combinations of the values of {len(varied)} knobs")
    distinct, share, (low, high) = survey.points.count, survey.legal / survey.drawn, survey.share()
    console.print(f"{distinct:.3g} candidates: points that differ in inactive knobs only are one")
    console.print(f"{share:.2%} [{low:.2%}, {high:.2%}] of {survey.drawn} candidates drawn are legal")
    all_legal = f"{distinct * share:.2g} [{distinct * low:.2g}, {distinct * high:.2g}]"
    console.print(f"{all_legal} candidates are legal, by these; in brackets 90% intervals")
    if survey.refusals.total:
        console.print("the others are refused by\n" + escape("\n".join(survey.refusals.lines(survey.drawn, 12))))
    example = survey.example or space.sample(rng)
    console.print(f"an example, {example.uid}:")
    told = {knob: list(value) if isinstance(value, tuple) else value for knob, value in example.point.items()}
    console.print(escape(yaml.safe_dump(told, sort_keys=False, default_flow_style=None)), end="")
