"""The process in which W&B runs, `python -m cosearch.report.wandb_process`: messages are JSON lines on its input.

It ends when its input does. What goes wrong here is this process's own end, and its parent says so.
"""

import json
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def main() -> None:
    """Record what the parent says."""
    import wandb

    with os.fdopen(os.dup(0), "rb") as messages, open(os.devnull, "rb") as nothing:
        # W&B starts a process too, which must not inherit, and so keep open, the parent's pipe.
        os.dup2(nothing.fileno(), 0)
        start = json.loads(messages.readline() or "{}").get("start")
        if start is None:
            return
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cosearch"),
            id=start["id"],
            name=start["name"],
            dir=start["folder"],
            config=start["config"],
            resume="allow",
            mode=_mode(os.environ),
            # Sampling the machine would disturb what is measured on it.
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )
        for line in messages:
            message = json.loads(line)
            if "row" in message:
                run.log(message["row"])
            else:
                _show(run, message["picture"])
        run.finish()


def _show(run: Any, picture: Mapping[str, Any]) -> None:
    import plotly.io
    import wandb

    # A table cannot be changed once it is logged, so each picture has new ones.
    columns, rows, plane = picture["columns"], picture["rows"], picture["plane"]
    shown: dict[str, Any] = {
        "trials": wandb.Table(columns=columns, data=rows, allow_mixed_types=True),
        "front": wandb.Plotly(plotly.io.from_json(picture["figure"])),
    }
    if len(plane) == 2 and set(plane) <= set(columns):
        at = [columns.index(name) for name in plane]
        complete: list[Any] = [[row[0], *(row[i] for i in at)] for row in rows if all(row[i] is not None for i in at)]
        table = wandb.Table(columns=["uid", *plane], data=complete)
        shown["pareto"] = wandb.plot.scatter(table, *plane, title="Trials")
    run.log({**shown, "hypervolume": picture["summary"]["hypervolume"]})
    run.summary.update(picture["summary"])


def _mode(environment: Mapping[str, str]) -> Any:
    """The mode the user asked for, else online where there is a login, else offline."""
    if asked := environment.get("WANDB_MODE"):
        return asked
    return "online" if environment.get("WANDB_API_KEY") or _in_netrc(environment) else "offline"


def _in_netrc(environment: Mapping[str, str]) -> bool:
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        logins = netrc.netrc(environment.get("NETRC", str(Path.home() / ".netrc")))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(host) is not None


if __name__ == "__main__":
    main()
