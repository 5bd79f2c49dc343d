import json
import os
from pathlib import Path

import pytest

from cosearch.core import files


def test_write_text_replaces_the_whole_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    files.write_text(path, "a long first text")
    files.write_text(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_write_json_refuses_nan_and_keeps_the_order(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": [1.5, None]})
    assert list(json.loads(path.read_text())) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"b": float("nan")})
    assert json.loads(path.read_text())["b"] == 1


def test_new_folder_appears_whole(tmp_path: Path):
    path = tmp_path / "deep" / "artifact"
    with files.new_folder(path) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "weights").write_bytes(b"123")
        assert not path.exists()
        assert draft.parent == path.parent
    assert (path / "sub" / "weights").read_bytes() == b"123"
    assert os.listdir(path.parent) == ["artifact"]


def test_new_folder_vanishes_on_failure_and_keeps_the_old_one(tmp_path: Path):
    path = tmp_path / "artifact"
    with files.new_folder(path) as draft:
        (draft / "old").touch()
    with pytest.raises(RuntimeError), files.new_folder(path) as draft:
        (draft / "new").touch()
        raise RuntimeError
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["artifact"]


def test_new_folder_replaces_all_of_an_old_one(tmp_path: Path):
    path = tmp_path / "artifact"
    for name in ("old", "new"):
        with files.new_folder(path) as draft:
            (draft / name).touch()
    assert os.listdir(path) == ["new"]


def test_what_is_written_is_as_open_to_others_as_any_new_file(tmp_path: Path):
    plain, folder = tmp_path / "plain", tmp_path / "plain_folder"
    plain.touch()
    folder.mkdir()
    files.write_text(tmp_path / "own", "")
    with files.new_folder(tmp_path / "own_folder"):
        pass
    assert (tmp_path / "own").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "own_folder").stat().st_mode == folder.stat().st_mode
