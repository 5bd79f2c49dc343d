"""A space to be deployed holds only what a stack loads."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cosearch import axes, testing
from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import UserError
from cosearch.export import STACKS
from cosearch.proposers import PROPOSERS, Setting
from cosearch.testing import small_problem
from tests.tiny import install, python


@pytest.mark.parametrize("name", STACKS.names())
@pytest.mark.parametrize("space_name", ["llm_decode", "llm_decode_full"])
def test_a_space_to_be_deployed_holds_only_what_is_loaded(space_name: str, name: str):
    space = axes.load_space(space_name, target="cpu", deploy=name)
    assert space.knobs["architecture.attention"] == ("mha", "gqa", "mqa")
    rng = random.Random(0)
    drawn = {space.sample(rng) for _ in range(30)}
    proposed = PROPOSERS["nevergrad"](Setting(space, small_problem(), 0, {})).ask(10)
    assert len(drawn) == 30 and len(proposed) == 10
    assert all(STACKS[name].why_not(candidate) is None for candidate in (space.reference, *drawn, *proposed))


def test_what_is_never_loaded_is_refused_by_name():
    with pytest.raises(UserError, match=r"attention: deploy=vllm allows none of 'mla'\. Allowed: gqa, mha, mqa"):
        axes.load_space("llm_decode_full", {"architecture.attention": ["mla"]}, target="cpu", deploy="vllm")
    space = axes.load_space("llm_decode_full", target="cpu", deploy="vllm")
    refused = space.reference.point | {"architecture.attention": "mla", "architecture.latent": 32}
    assert space.why_invalid(refused) == (
        "rule 'vllm loads it': architecture.attention='mla' is not loaded, only gqa, mha, mqa"
    )


def test_a_stack_that_names_an_unknown_knob_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(STACKS["vllm"]), "loads", {"architecture.atention": frozenset({"mha"})})
    with pytest.raises(UserError) as caught:
        axes.load_space("llm_decode", deploy="vllm")
    assert str(caught.value).startswith(
        "deploy=vllm: unknown knob 'architecture.atention'; did you mean 'architecture.attention'? Allowed: "
    )


def test_an_unknown_stack_is_refused():
    with pytest.raises(UserError, match=r"unknown stack 'vlm'; did you mean 'vllm'\? Allowed: llama_cpp, sglang, vllm"):
        axes.load_space("llm_decode", deploy="vlm")


@dataclass
class Wrong:
    loads: Mapping[str, frozenset[Value]]
    answer: Any

    def why_not(self, candidate: Candidate) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (Wrong({"architecture.atention": frozenset()}, None), "knobs that there are, not of 'architecture.atention'"),
        (Wrong({"architecture.attention": frozenset({"mhaa"})}, None), "values that it can have: unknown value 'mhaa'"),
        (
            Wrong({"architecture.attention": frozenset({"mha"})}, None),
            "architecture.attention='mqa', which is said nev",
        ),
        (Wrong({}, "never"), "one at least is not refused; the first is: never"),
        (Wrong({}, False), "why not is told in words, not False"),
    ],
)
def test_the_contract_finds_what_is_wrong(wrong: Wrong, rule: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(STACKS._entries, "wrong", wrong)
    with pytest.raises(AssertionError, match=rule):
        testing.check_stack("wrong")


STACK = '''
"""Loads one layer only."""
from cosearch.export import STACKS


class OneLayer:
    loads = {}

    def why_not(self, candidate):
        return None if candidate.architecture["depth"] == 1 else "it has room for one layer"


STACKS.register("one_layer")(OneLayer())
'''

SPACE = """
knobs: {architecture.depth: [1, 2, 3], architecture.width: [32, 64]}
reference: {architecture.depth: 1}
"""

USE = """
import random, sys
from cosearch import axes, testing
from cosearch.__main__ import compose
from cosearch.export import STACKS
from cosearch.settings import Settings

assert "one_layer" in STACKS.names() and "vllm" in STACKS.names(), STACKS.names()
testing.check_stack("one_layer")
config = compose(["experiment=llm_decode", "proposer=random", "deploy=one_layer", f"space={sys.argv[1]}"])
space = Settings.from_config(config).load_space()
rng = random.Random(0)
assert {space.sample(rng).architecture["depth"] for _ in range(20)} == {1}
print(space.why_invalid(space.reference.point | {"architecture.depth": 2}))
"""


def test_a_stack_of_another_package_is_deployed_to_by_name(tmp_path: Path):
    install(tmp_path / "site", {"one_layer": STACK}, "[cosearch.stack]\none_layer = acme_cosearch.one_layer\n")
    (tmp_path / "theirs.yaml").write_text(SPACE)
    result = python(tmp_path / "site", USE, str(tmp_path / "theirs.yaml"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "rule 'one_layer loads it': it has room for one layer\n"
