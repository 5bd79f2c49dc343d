"""Interrupts that are not lost: after SIGINT or SIGTERM a process ends, whatever it is doing.

The first one raises KeyboardInterrupt in the main thread, so that what is open is closed on the way out. Python ignores
exceptions inside destructors and some callbacks, and JAX has a callback into the garbage collection: on a busy machine
7 of 12 interrupts were lost there and the search went on. So one that was ignored is raised again a moment later. A
process that is still there after `_UNWIND_S`, or at a second signal, ends on the spot, which costs tidiness and nothing
that was stored: an archive and artifacts survive a kill at any moment.
"""

import atexit
import os
import signal
import sys
from functools import partial
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_UNWIND_S = 2.0
_EXIT_S = 5.0
"""For what is registered at `atexit`; the tracker `wandb` takes up to 4 s."""
_AGAIN_S = 0.01
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupts:
    """Handles the interrupts of this process from now on; those that it was started to ignore, it ignores.

    An interrupted process ends with `code`. Where it ends on the spot, it says `last_words` itself.
    """

    def __init__(self, code: int, last_words: str) -> None:
        self._code = code
        self._last_words = last_words
        self._interrupted = False
        # The first to be registered is the last to be called. What libraries do after that is no longer waited for.
        atexit.register(self._end)
        sys.unraisablehook = self._ignored
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._first)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        for each in _SIGNALS:
            signal.signal(each, self._leave)
        atexit.register(signal.setitimer, signal.ITIMER_REAL, _EXIT_S)  # the first to be called
        self._raise(_UNWIND_S, number, frame)

    def _raise(self, left_s: float, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, self._leave)
        signal.setitimer(signal.ITIMER_REAL, left_s)
        raise KeyboardInterrupt

    def _ignored(self, what: "sys.UnraisableHookArgs") -> None:
        """Not raised right here, where it would be ignored, too."""
        if not (self._interrupted and issubclass(what.exc_type, KeyboardInterrupt)):
            sys.__unraisablehook__(what)
            return
        left_s, _ = signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        if left_s > 2 * _AGAIN_S:
            signal.signal(signal.SIGALRM, partial(self._raise, left_s - _AGAIN_S))

    def _leave(self, number: int, frame: FrameType | None) -> None:
        # Not by the streams of Python, whose locks the main thread may hold where it was stopped.
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR)  # a live display hides it
        os.write(2, f"{self._last_words}\n".encode())
        os._exit(self._code)

    def _end(self) -> None:
        if self._interrupted:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(self._code)
