from pathlib import Path

import numpy as np
import pytest

from cosearch.core.errors import UserError
from cosearch.quality import corpus


def write(folder: Path, files: int, size: int = 2000) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(files):
        (folder / f"{index}.txt").write_bytes(b"%04d " % index * (size // 5))
    return folder


def numbers(text: np.ndarray) -> set[str]:
    return set(text.tobytes().decode().split())


def test_a_file_is_either_trained_on_or_held_out(tmp_path: Path):
    found = corpus.load(str(write(tmp_path / "text", 60)))
    assert not numbers(found.train) & numbers(found.held_out)
    assert len(numbers(found.train) | numbers(found.held_out)) == 60
    assert 1 <= len(numbers(found.held_out)) <= 15
    assert found.train.dtype == found.held_out.dtype == np.uint8


def test_the_split_depends_on_names_alone(tmp_path: Path):
    first, second = corpus.load(str(write(tmp_path / "a", 60))), corpus.load(str(write(tmp_path / "b", 60)))
    assert first.digest == second.digest
    np.testing.assert_array_equal(first.train, second.train)
    more = corpus.load(str(write(tmp_path / "c", 61)))
    assert numbers(first.held_out) <= numbers(more.held_out)
    assert more.digest != first.digest


def test_a_changed_byte_is_another_corpus(tmp_path: Path):
    folder = write(tmp_path / "text", 60)
    before = corpus.load(str(folder)).digest
    (folder / "7.txt").write_bytes(b"7" + (folder / "7.txt").read_bytes()[1:])
    assert corpus.load(str(folder)).digest != before


def test_the_standard_library_is_split_by_file():
    found = corpus.load("python")
    assert found.name == "python"
    assert len(found.train) > 5 * len(found.held_out) > 500_000
    assert b"def " in found.train.tobytes()[:100_000]
    assert corpus.load("python").digest == found.digest


@pytest.mark.parametrize("name", ["text", "text/0.txt"])
def test_of_one_file_the_end_is_held_out(tmp_path: Path, name: str):
    write(tmp_path / "text", 1, 30_000)
    found = corpus.load(str(tmp_path / name))
    assert len(found.held_out) == 3000
    assert (found.train.tobytes() + found.held_out.tobytes()) == (tmp_path / "text" / "0.txt").read_bytes()


def test_what_is_not_text_is_passed_over(tmp_path: Path):
    folder = write(tmp_path / "text", 60)
    plain = corpus.load(str(folder)).digest
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0\0" * 1000)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "folder").mkdir()
    assert corpus.load(str(folder)).digest == plain


def test_text_of_any_bytes_is_taken(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(bytes(range(1, 256)) * 200)
    assert len(corpus.load(str(tmp_path)).train) > 40_000


def refusal(name: Path | str) -> str:
    with pytest.raises(UserError) as error:
        corpus.load(str(name))
    message = str(error.value)
    assert message.startswith(f"corpus={name}: ")
    return message


def test_a_path_that_is_not_there_is_refused(tmp_path: Path):
    assert "no such file or folder, and no corpus of that name. Allowed: python, or a path" in refusal(tmp_path / "no")
    assert "Allowed: python" in refusal("pyton")


@pytest.mark.parametrize(("files", "size"), [(0, 0), (1, 100), (30, 100)])
def test_too_little_text_is_refused(tmp_path: Path, files: int, size: int):
    message = refusal(write(tmp_path / "text", files, size))
    assert f"{files} files with only " in message
    assert "at least 20000 bytes" in message


def test_binary_files_alone_are_too_little(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"\0" * 100_000)
    assert "only 0 bytes of text" in refusal(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # By the call that fails: whoever may read everything, as in a container, is not stopped by a file's mode.
    folder, honest = write(tmp_path / "text", 60), Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "7.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refusal(folder).endswith("7.txt: Permission denied")


def test_a_link_to_nowhere_is_no_file(tmp_path: Path):
    folder = write(tmp_path / "text", 60)
    plain = corpus.load(str(folder)).digest
    (folder / "link.txt").symlink_to(tmp_path / "nowhere")
    assert corpus.load(str(folder)).digest == plain
