"""Text to train on: the source code of the running Python's standard library, or the user's own files.

It is split by file, so that no held-out text has been seen in training.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosearch.core.errors import UserError

STANDARD_LIBRARY = "python"
_HELD_OUT_IN = 10
"""One file in so many is held out."""
_MOST_BYTES = 64_000_000
_LEAST_BYTES = 20_000
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings"}
"""Folders of the standard library that are somebody else's packages, tests, or tables rather than text."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out; `digest` names them."""

    name: str
    train: np.ndarray
    held_out: np.ndarray
    digest: str


def load(name: str) -> Corpus:
    """The corpus `name`: "python", or the path of a text file or of a folder of them.

    Raises:
        UserError: nothing is there, it cannot be read, or it is too short.
    """
    if name == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in sorted(root.rglob("*.py")) if not _EXCLUDED & set(path.relative_to(root).parts)]
    else:
        root = Path(name)
        if not root.exists():
            raise UserError(
                f"corpus={name}: there is no such file or folder, and no corpus of that name. Allowed: "
                f"{STANDARD_LIBRARY}, or a path"
            )
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    total = 0
    for path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise UserError(f"corpus={name}: {path}: {error.strerror}") from None
        if b"\0" in text or not text:
            continue  # not text
        total += len(text)
        if total > _MOST_BYTES:
            break
        key = path.relative_to(root).as_posix() if path != root else path.name
        parts[_is_held_out(key)].append(text)
    if total and (not parts[True] or not parts[False]):
        # Too few files to split by file: the end of the text is held out.
        text = b"\n".join(parts[True] + parts[False])
        cut = len(text) - len(text) // _HELD_OUT_IN
        parts = {False: [text[:cut]], True: [text[cut:]]}
    train, held_out = b"\n".join(parts[False]), b"\n".join(parts[True])
    for what, text in (("train on", train), ("hold out", held_out)):
        if len(text) < _LEAST_BYTES // (1 if what == "train on" else _HELD_OUT_IN):
            raise UserError(
                f"corpus={name}: {len(files)} files with only {len(text)} bytes of text to {what}; "
                f"at least {_LEAST_BYTES} bytes of text are needed in all"
            )
    digest = hashlib.sha256(train + b"\0" + held_out).hexdigest()[:16]
    return Corpus(name, np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), digest)


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT_IN == 0
