"""How often a tracker redraws, so that watching a search never costs it more than a little."""

import time
from collections.abc import Callable

_SHARE = 0.05
"""The part of a search's time that one kind of redrawing may take."""


class Pace:
    """Lets a piece of work through every `every_s`, and less often where it is slow."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = float("-inf")

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` if it is due."""
        started = time.monotonic()
        if started < self._next:
            return
        work()
        now = time.monotonic()
        self._next = now + max(self._every_s, (now - started) / _SHARE)
