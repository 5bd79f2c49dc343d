"""Learning operation models from measured tables, and telling on the console how wrong they are."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cosearch.core.errors import UserError
from cosearch.latency import pretrained


def learn(folders: Sequence[Path], output: Path | None) -> None:
    """Train on the tables in `folders` and save the models to `output`, or where predictions look for them first.

    Raises:
        UserError: there is no table, one is wrong, or `output` cannot be written to.
    """
    folder = output or pretrained.trained()
    try:  # before minutes of training
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output={folder}: cannot be written to: {error}") from None
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("reading", total=1.0)
        made = pretrained.train(folders, lambda what, part: shown.update(task, description=str(what), completed=part))
        shown.update(task, description="trained", completed=1.0)
    pretrained.save(made, folder)
    console.print(errors(made))
    console.print(f"{made.name}\nsaved to {folder}", highlight=False)


def errors(made: pretrained.Pretrained) -> Table:
    """The error card: how the models predict generations of GPUs that were left out."""
    table = Table("operations", "system", "shots", "MAPE", "Kendall's tau", "in 90 % interval", "interval, ×/÷")
    for kind, card in made.card.items():
        for one in card["errors on generations left out"]:
            figures = (f"{one[name]:.3f}" for name in ("mape", "tau", "coverage"))
            table.add_row(kind, one["target"], str(one["shots"]), *figures, f"{one['width']:.2f}")
        table.add_section()
    return table
