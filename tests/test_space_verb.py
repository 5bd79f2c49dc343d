"""`python -m cosearch space`: what it prints of a search space, and what it refuses."""

import random
import re

import pytest
import yaml

from cosearch import axes
from cosearch.__main__ import main
from cosearch.core.candidate import Candidate, as_value
from cosearch.core.survey import Survey

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
    survey, rng = Survey(space), random.Random(0)
    for _ in range(300):
        survey.draw(rng)
    varied = [knob for knob, values in space.knobs.items() if len(values) > 1]
    assert out.startswith("llm_decode_full for cpu\n")
    assert f"\n{space.size:.3g} points: all combinations of the values of {len(varied)} knobs\n" in out
    assert f"\n{survey.points.count:.3g} candidates: points that differ in inactive knobs only are one\n" in out
    low, high = survey.share()
    assert f"\n{survey.legal / 300:.2%} [{low:.2%}, {high:.2%}] of 300 candidates drawn are legal\n" in out
    for knob in varied:
        assert f"{knob.partition('.')[2]} {len(space.knobs[knob])}" in out

    found = re.search(rf"\n{NUMBER} \[{NUMBER}, {NUMBER}\] candidates are legal, by these; in brackets 90% interv", out)
    assert found is not None, out
    least, estimate, most = (survey.points.count * share for share in (low, survey.legal / 300, high))
    assert tuple(map(float, found.groups())) == pytest.approx((estimate, least, most), rel=0.05)
    assert 0 < least < estimate < most < survey.points.count < space.size

    assert "the others are refused by\n" in out
    for name, count in survey.refusals.counts.items():
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


def test_an_example_is_told_even_where_no_candidate_drawn_is_legal(capsys: Capture):
    out = told(capsys, "name=llm_decode_full", "draws=1", "deploy=sglang")
    assert out.startswith("llm_decode_full for cpu, to be loaded by sglang\n")
    assert re.search(r"\n0\.00% \[0\.00%, \d\d\.\d\d%\] of 1 candidates drawn are legal\n", out)
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
        (["name=llm_decode", "target=tpu9"], ["unknown target 'tpu9'", "Allowed: a100, b200, cpu"]),
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
