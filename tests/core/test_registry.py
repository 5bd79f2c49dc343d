import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from cosearch.core import registry
from cosearch.core.errors import UserError
from cosearch.core.registry import Registry, did_you_mean


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package with a registry and two files that register themselves."""
    package = tmp_path / "colours_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from cosearch.core.registry import Registry\nCOLOURS = Registry('colour', __name__)\n"
    )
    for name in ("red", "blue"):
        (package / f"{name}.py").write_text(
            f"from colours_of_a_test import COLOURS\n\n\n@COLOURS.register('{name}')\ndef {name}():\n"
            f"    return '{name}'\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("colours_of_a_test").COLOURS
    for module in [module for module in sys.modules if module.startswith("colours_of_a_test")]:
        del sys.modules[module]


def test_files_of_the_package_register_themselves(colours: Registry[Any]):
    assert colours.names() == ("blue", "red")
    assert list(colours) == ["blue", "red"]
    assert "red" in colours
    assert "rde" not in colours
    assert colours["red"]() == "red"


def test_threads_wait_until_all_names_are_there(colours: Registry[Any], tmp_path: Path):
    asked = threading.Event()
    (tmp_path / "colours_of_a_test" / "amber.py").write_text("import sys\nsys.modules['asked'].wait_until_asked()\n")
    module = types.ModuleType("asked")
    with ThreadPoolExecutor(2) as threads:

        def wait_until_asked() -> None:
            """Runs while names are loaded: has another thread ask for one."""
            found.append(threads.submit(lambda: (asked.set(), colours["red"]())[1]))
            asked.wait()
            threading.Event().wait(0.05)  # it asks as soon as it has said so

        found: list[Any] = []
        module.wait_until_asked = wait_until_asked  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["asked"] = module
        try:
            assert threads.submit(colours.__getitem__, "blue").result()() == "blue"
            assert found[0].result() == "red"
        finally:
            del sys.modules["asked"]


def test_an_unknown_name_lists_what_is_allowed(colours: Registry[Any]):
    with pytest.raises(UserError) as caught:
        colours["bleu"]
    assert str(caught.value) == "unknown colour 'bleu'; did you mean 'blue'? Allowed: blue, red"


def test_a_name_is_taken_once(colours: Registry[Any]):
    entry = colours["red"]
    assert colours.register("red")(entry) is entry
    with pytest.raises(ValueError, match="two entries of kind 'colour' are named 'red'"):
        colours.register("red")(lambda: "another")


def test_an_entry_point_adds_a_name(colours: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "colours_of_a_test_extra.py").write_text(
        "from colours_of_a_test import COLOURS\nCOLOURS.register('green')('green')\n"
    )
    points = [EntryPoint("green", "colours_of_a_test_extra", "cosearch.colour")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "cosearch.colour" else [])
    assert colours.names() == ("blue", "green", "red")


def test_an_entry_point_that_registers_nothing_is_named(colours: Registry[Any], monkeypatch: pytest.MonkeyPatch):
    points = [EntryPoint("green", "json", "cosearch.colour")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    for _ in range(2):  # the second look-up must not pass over what the first one found
        with pytest.raises(UserError, match=r"entry point 'green' in group 'cosearch.colour' loads 'json'"):
            colours.names()


def test_did_you_mean_without_a_near_name():
    assert did_you_mean("zzz", ("abc",)) == ". Allowed: abc"
    assert did_you_mean("zzz", ()) == ". Allowed: none"
