"""Writing files and folders so that they are there whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, on the disk before it is visible."""
    with new_file(path) as draft, open(draft, "x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by `data` as JSON; NaN and infinities are refused."""
    write_text(path, json.dumps(data, indent=1, sort_keys=False, allow_nan=False) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A hidden file's name beside `path`; what is written there becomes `path` if the block ends well."""
    draft = _draft(path)
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that becomes `path` if the block ends well, and vanishes if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _sync(path.parent)


def _draft(path: Path) -> Path:
    # Not by `tempfile`, whose files and folders are closed to all other users, such as a server's.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
