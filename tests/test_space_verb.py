"""`python -m cosearch space`: what it prints of a search space, and what it refuses."""

import random
import re

import pytest
import yaml

from cosearch import axes
from cosearch.__main__ import main
from cosearch.core.candidate import Candidate, as_value

Capture = pytest.CaptureFixture[str]
NUMBER = r"([\d.]+(?:e[+-]\d+)?)"


def told(capsys: Capture, *arguments: str) -> str:
    """What the verb prints."""
    code = main(["space", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_a_space_is_told_by_its_size_its_legal_share_its_candidates_and_an_example(capsys: Capture):
    out = told(capsys, "name=llm_decode_full", "draws=300")
    space = axes.load_space("llm_decode_full", target="cpu")
    survey = space.survey(random.Random(0), 300)
    varied = [knob for knob, values in space.knobs.items() if len(values) > 1]
    assert out.startswith("llm_decode_full for cpu\n")
    assert f"\n{space.size:.3g} points: all combinations of the values of {len(varied)} knobs\n" in out
    assert f"\n{survey.legal / 300:.1%} of 300 points drawn are legal\n" in out
    for knob in varied:
        assert f"{knob.partition('.')[2]} {len(space.knobs[knob])}" in out

    found = re.search(rf"\n{NUMBER} legal candidates that differ \[{NUMBER}, {NUMBER}\]", out)
    assert found is not None, out
    estimate, low, high = map(float, found.groups())
    assert 0 <= low < estimate < high < space.size
    assert estimate == pytest.approx(survey.candidates(space)[0], rel=0.05)

    assert "the others are refused by\n" in out
    for name, count in survey.refusals.items():
        assert f"{count / 300:5.0%}  rule {name!r}, for example: " in out

    head, _, example = out.partition("\nan example, ")
    assert head and example
    uid, _, text = example.partition(":\n")
    candidate = Candidate.from_point({knob: as_value(value) for knob, value in yaml.safe_load(text).items()})
    assert candidate.uid == uid
    assert space.canonical(candidate.point) == candidate.point
    assert space.why_invalid(candidate.point) is None


def test_the_same_seed_tells_the_same_and_another_one_differs(capsys: Capture):
    first = told(capsys, "name=llm_decode", "draws=50", "seed=1")
    assert told(capsys, "name=llm_decode", "draws=50", "seed=1") == first
    assert told(capsys, "name=llm_decode", "draws=50", "seed=2") != first


def test_an_example_is_told_even_where_no_point_drawn_is_legal(capsys: Capture):
    out = told(capsys, "name=llm_decode_full", "draws=1", "deploy=sglang")
    assert out.startswith("llm_decode_full for cpu, to be loaded by sglang\n")
    assert "\n0.0% of 1 points drawn are legal\n" in out
    uid, _, text = out.partition("\nan example, ")[2].partition(":\n")
    point = {knob: as_value(value) for knob, value in yaml.safe_load(text).items()}
    assert Candidate.from_point(point).uid == uid
    assert axes.load_space("llm_decode_full", target="cpu", deploy="sglang").why_invalid(point) is None


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["name=… is missing", "python -m cosearch space name=SPACE"]),
        (["llm_decode"], ["'llm_decode': unknown option", "Allowed: name, draws, seed, target, deploy"]),
        (["nam=llm_decode"], ["'nam=llm_decode': unknown option; did you mean 'name'?"]),
        (
            ["name=llm_decod"],
            ["space=llm_decod: no such search space; did you mean 'llm_decode'?", "Allowed: llm_decode"],
        ),
        (["name=/nowhere/space.yaml"], ["space=/nowhere/space.yaml: no such search space", "path of a YAML file"]),
        (["name=llm_decode", "draws=0"], ["draws=0: at least one point must be drawn"]),
        (["name=llm_decode", "draws=-3"], ["draws=-3: at least one point must be drawn"]),
        (["name=llm_decode", "draws=many"], ["draws=many: is not of the kind int"]),
        (["name=llm_decode", "target=tpu9"], ["unknown target 'tpu9'", "Allowed: cpu"]),
        (
            ["name=llm_decode", "deploy=vlm"],
            ["unknown stack 'vlm'; did you mean 'vllm'?", "Allowed: llama_cpp, sglang, vllm"],
        ),
    ],
    ids=str,
)
def test_what_it_cannot_describe_is_refused(capsys: Capture, arguments: list[str], messages: list[str]):
    assert main(["space", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cosearch: ") and "Traceback" not in err
    for message in messages:
        assert message in err, err
