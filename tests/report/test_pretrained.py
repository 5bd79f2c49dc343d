"""Learning from measured tables, as it is told on the console."""

import pytest

from cosearch.core.errors import UserError
from cosearch.latency import pretrained
from cosearch.report.pretrained import learn
from tests.latency.tables import write


@pytest.mark.parametrize("below", ["", "models"])
def test_an_output_that_cannot_be_written_to_is_told_before_anything_is_learnt(tmp_path, below: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"output=.*file.*: cannot be written to"):
        learn([tmp_path / "no tables are read"], tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "kept"


def test_what_is_wrong_with_tables_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSEARCH_CACHE", str(tmp_path / "cache"))
    write(tmp_path, systems=("new", "twin"))
    with pytest.raises(UserError, match="one generation of GPUs, Hopper"):
        learn([tmp_path], None)
    assert list(pretrained.trained().iterdir()) == []
