"""Writing files and folders so that they are there whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Replace each of these paths by its content. All are on the disk before the first is visible."""
    drafts = {path: _draft(path) for path in contents}
    try:
        for path, draft in drafts.items():
            with open(draft, "xb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)  # those that did not take their path's place
    for folder in {path.parent for path in contents}:
        _sync(folder)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, on the disk before it is visible."""
    write_files({path: text.encode()})


def as_json(data: Any) -> str:
    """Data as it is written; NaN and infinities are refused."""
    return json.dumps(data, indent=1, sort_keys=False, allow_nan=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by `data` as JSON; NaN and infinities are refused."""
    write_text(path, as_json(data))


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
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # where it did not take its path's place
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
