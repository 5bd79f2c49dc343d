"""Bad input: exit code 2, one clear message that names the key and what is allowed, and no run folder."""

import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from cosearch import __main__ as cli
from cosearch.__main__ import main
from cosearch.measure.energy import why_uncounted
from cosearch.settings import VERSION
from tests import tiny

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: str) -> str:
    """The message of a command that must refuse."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert err.startswith("cosearch: ") and err.count("cosearch: ") == 1, err
    assert "Traceback" not in err and len(err) < 3000, err
    return err


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("experiment=llm_decod", ["llm_decod", "llm_decode"]),
        ("workload=chatt", ["workload/chatt", "chat", "decode_short"]),
        ("proposer=randm", ["proposer/randm", "random", "surrogate"]),
        ("quality=long", ["quality/long", "minimal", "short"]),
        ("target=tpu9", ["target: unknown value 'tpu9'", "Allowed: a100, b200, cpu"]),
        ("target=7", ["target: unknown value 7", "Allowed: a100, b200, cpu"]),
        ("deploy=vlm", ["deploy: unknown value 'vlm'; did you mean 'vllm'?", "Allowed: llama_cpp, sglang, vllm"]),
        ("proposer.name=nope", ["proposer.name: unknown value 'nope'", "Allowed: nevergrad, random, surrogate"]),
        ("quality.steps=15", ["quality.steps: 15 is not a multiple of 10"]),
        ("+quality.epochs=3", ["quality: unknown key 'epochs'", "Allowed: steps"]),
        ("quality.length=100", ["quality.length: ", "at least 256"]),
        ("objectives=[minimize latency]", ["objectives: unknown metric 'latency'", "did you mean 'latency_s'?"]),
        ("objectives=[latency_s]", ["objectives: 'latency_s' must read 'minimize METRIC'"]),
        ("objectives=[]", ["objectives: is empty", "minimize latency_s"]),
        ("objectives=minimize latency_s", ["objectives: 'minimize latency_s' is not a list"]),
        ("constraints=['latency_s < 3']", ["constraints: 'latency_s < 3' must read 'METRIC <= EXPRESSION'"]),
        ("constraints=['latencys <= 3']", ["constraints: unknown metric 'latencys'", "latency_s"]),
        ("constraints=['latency_s <= __import__']", ["constraints", "__import__"]),
        ("constraints=['latency_s <= 2 *']", ["constraints", "2 *"]),
        ("constraints=latency_s <= 3", ["'constraints=latency_s <= 3' is no key=value", "quoted"]),
        ("constraints='latency_s <= 3'", ["constraints: 'latency_s <= 3' is not a list"]),
        ("budget=null", ["budget: 'trials' is missing"]),
        ("workload=null", ["Config group override must be a string"]),
        ("knobs.architecture.nope=[1]", ["knobs.architecture.nope: unknown knob 'architecture.nope'", "Allowed: "]),
        ("knobs.architecture.attention=[mhaa]", ["knobs.architecture.attention: unknown value 'mhaa'", "'mha'", "mqa"]),
        ("knobs.architecture.width=[0]", ["knobs.architecture.width: 0 is not a whole number of at least 1"]),
        ("knobs.architecture.width=[32,32]", ["knobs.architecture.width: ", "each only once"]),
        ("knobs.architecture.width=[]", ["knobs.architecture.width: ", "at least one value"]),
        ("knobs.precision.weights=[int3]", ["knobs.precision.weights: unknown value 'int3'", "int8"]),
        ("knobs.schedule.compiler_options=[[xla_nope]]", ["knobs.schedule.compiler_options", "must read 'name=value'"]),
        ("knobs.architecture.width=[24]", ["has no legal point", "heads of 16 do not divide a width of 24"]),
        ("knobs=3", ["knobs: 3 is not a mapping"]),
        ("budget.trials=-1", ["budget.trials: -1 is not a whole number of at least 1"]),
        ("budget.trials=0", ["budget.trials: 0"]),
        ("budget.trials=2.5", ["budget.trials: 2.5"]),
        ("budget.trials=many", ["budget.trials: 'many'"]),
        ("budget.seconds=-5", ["budget.seconds: -5 is not a number above 0"]),
        ("budget.seconds=nan", ["budget.seconds: nan"]),
        ("+budget.hours=1", ["budget: unknown key 'hours'", "Allowed: trials, seconds"]),
        ("budget=5", ["budget: 5 is not a mapping"]),
        ("budget.trial=5", ["budget.trial", "trial"]),
        ("seed=text", ["seed: 'text' is not a whole number"]),
        ("seed=-1", ["seed: -1 is not a whole number of at least 0"]),
        ("measure_seconds=0", ["measure_seconds: 0"]),
        ("trackers=[htm]", ["trackers: unknown value 'htm'", "did you mean 'html'?"]),
        ("trackers=html", ["trackers: 'html' is not a list"]),
        ("limits.compile_s=0", ["limits.compile_s: 0"]),
        ("+limits.nope=1", ["limits: unknown key 'nope'", "Allowed: compile_s"]),
        ("workload.points=[]", ["workload: 'points' is empty"]),
        ("workload.points=[{phase:train,batch:1,context:1}]", ["workload.points[0].phase: 'train'", "decode, prefill"]),
        ("workload.points=[{phase:decode,batch:0,context:1}]", ["workload.points[0].batch: 0"]),
        ("space=nowhere", ["space=nowhere: no such search space", "llm_decode"]),
        ("space=/nowhere/space.yaml", ["space=/nowhere/space.yaml: no such search space"]),
        ("corpus=/nowhere", ["corpus=/nowhere: there is no such file or folder", "python"]),
        ("nonsense=1", ["nonsense"]),
        ("+nonsense=1", ["config: unknown key 'nonsense'", "Allowed: "]),
        ("buget.trials=3", ["buget"]),
        ("budget.trials=", ["budget.trials: ''"]),
        ("a=b=c=[", ["a=b=c=["]),
        ("=3", ["override"]),
        ("budget.trials=[", ["'budget.trials=[' is no key=value"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_override_is_refused(inputs: Path, tmp_path: Path, capsys: Capture, override: str, messages: list[str]):
    err = refused(capsys, *tiny.overrides(inputs, tmp_path / "runs", override))
    for message in messages:
        assert message in err, err
    assert not (tmp_path / "runs").exists()


def test_a_compiler_option_that_is_none_is_refused(inputs: Path, tmp_path: Path, capsys: Capture):
    override = "knobs.schedule.compiler_options=[[],['xla_cpu_no_such_option=true']]"
    err = refused(capsys, *tiny.overrides(inputs, tmp_path / "runs", override))
    assert "knobs.schedule.compiler_options: ['xla_cpu_no_such_option=true'] is refused: " in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("override", ["objectives=[minimize energy_j]", "constraints=['energy_j <= reference']"])
def test_energy_is_measured_or_refused(inputs: Path, tmp_path: Path, capsys: Capture, override: str):
    arguments, why = tiny.overrides(inputs, tmp_path / "runs", override, "budget.trials=1"), why_uncounted("cpu")
    if why is None:
        assert main(arguments) == 0
        (told,) = (tmp_path / "runs").glob("*/*/pareto.json")
        (point,) = json.loads(told.read_text())["points"]
        assert point["metrics"]["energy_j"]["source"] == "measured"
        return
    err = refused(capsys, *arguments)
    assert f"energy_j can be neither measured nor predicted for target=cpu: {why}; and" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knobs: [", "not readable as YAML"),
        ("", "must hold a mapping"),
        ("knobs: {}", "'knobs' is empty"),
        ("knob: {}", "unknown key 'knob'; did you mean 'knobs'?"),
        ("knobs: {architecture.width: [32]}\nknobs: {}", "the key 'knobs' stands 2 times"),
        ("knobs: &a [*a]", "aliases are not allowed"),
        ("knobs: !!python/object/apply:os.system ['exit']", "not readable as YAML"),
        ("knobs: {architecture.width: [32]}\nreference: {architecture.width: 33}", "reference: "),
        (
            "knobs: {architecture.width: [32]}\n"
            "rules: [{name: none, require: architecture.width > 99, because: it is small}]\n",
            "it is small",
        ),
    ],
)
def test_a_bad_space_is_refused_by_its_file(inputs: Path, tmp_path: Path, capsys: Capture, text: str, message: str):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    err = refused(capsys, *tiny.overrides(inputs, tmp_path / "runs", f"space={path}"))
    assert message in err and "own" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("too short")])
def test_a_corpus_without_text_is_refused(
    inputs: Path, tmp_path: Path, capsys: Capture, make: Callable[[Path], object]
):
    make(tmp_path / "text")
    err = refused(capsys, *tiny.overrides(inputs, tmp_path / "runs", f"corpus={tmp_path / 'text'}"))
    assert f"corpus={tmp_path / 'text'}: " in err and "at least 20000 bytes" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_output_that_is_a_file_is_refused(inputs: Path, tmp_path: Path, capsys: Capture, below: str):
    (tmp_path / "runs").write_text("a file")
    err = refused(capsys, *tiny.overrides(inputs, Path(f"{tmp_path}/runs{below}")))
    assert f"output={tmp_path}/runs{below}: " in err
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["serch"], ["unknown verb 'serch'; did you mean 'search'?", "Allowed: search, resume"]),
        ([], ["experiment=NAME is missing. Allowed: llm_decode", "python -m cosearch"]),
        (["search"], ["experiment=NAME is missing"]),
        (["resume"], ["run=… is missing"]),
        (["resume", "runs/1"], ["'runs/1': unknown option"]),
        (["resume", "rum=runs/1"], ["unknown option; did you mean 'run'?"]),
        (["resume", "run=/nowhere"], ["run=/nowhere: no run folder, since it has no config.yaml"]),
        (["report", "run=/nowhere"], ["run=/nowhere: no run folder"]),
        (["generate"], ["artifact=… is missing"]),
        (["doctor", "now=1"], ["'now=1': unknown option"]),
    ],
    ids=str,
)
def test_a_bad_command_is_refused(capsys: Capture, arguments: list[str], messages: list[str]):
    err = refused(capsys, *arguments)
    for message in messages:
        assert message in err, err


def test_help_is_no_error(capsys: Capture):
    for word in ("help", "--help", "-h"):
        assert main([word]) == 0
        assert capsys.readouterr().out == cli.USAGE + "\n"


@pytest.mark.parametrize("verb", ["resume", "report"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace(f"version: {VERSION}", f"version: {VERSION + 1}"),
            f"version {VERSION + 1}; this cosearch reads run folders of version {VERSION}",
        ),
        (
            # As it was before there was a `deploy`.
            lambda text: text.replace(f"version: {VERSION}", "version: 1").replace("deploy: null\n", ""),
            f"version 1; this cosearch reads run folders of version {VERSION}",
        ),
        (lambda text: text.replace(f"version: {VERSION}\n", ""), "version None; this cosearch reads"),
        (lambda text: text[: len(text) // 2] + "\n  : [", "not readable as YAML"),
        (lambda text: "", "must hold a mapping"),
        (lambda text: text.replace("target: cpu", "target: tpu9"), "target: unknown value 'tpu9'"),
        (lambda text: text.replace("seed: 0\nmeas", "meas"), "'seed' is missing"),
        (lambda text: text + "evil: !!python/object/apply:os.getpid []\n", "not readable as YAML"),
    ],
    ids=["newer", "older", "no version", "cut", "empty", "target", "no seed", "tag"],
)
def test_a_wrong_run_folder_is_refused(
    run_copy: Path, capsys: Capture, verb: str, change: Callable[[str], str], message: str
):
    path = run_copy / "config.yaml"
    path.write_text(change(path.read_text()))
    err = refused(capsys, verb, f"run={run_copy}")
    assert message in err


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def execute(statement: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        zero,
        cut,
        execute("PRAGMA user_version = 9"),
        execute("UPDATE trials SET trial = '{'"),
        execute("UPDATE trials SET trial = '[]'"),
        execute("UPDATE trials SET trial = '{\"point\": {}}'"),
        execute('UPDATE trials SET trial = replace(trial, \'"point":{\', \'"point":{"nonsense.x":1,\')'),
    ],
    ids=["zeroed", "cut", "version", "json", "list", "keys", "axis"],
)
def test_a_damaged_archive_is_refused_and_left_alone(run_copy: Path, capsys: Capture, damage: Callable[[Path], None]):
    path = run_copy / "trials.db"
    damage(path)
    err = refused(capsys, "resume", f"run={run_copy}")
    assert str(path) in err


def test_a_run_is_not_continued_where_its_energies_would_be_of_another_source(run_copy: Path, capsys: Capture):
    source = "measured" if why_uncounted("cpu") else "predicted"
    energy = f'"energy_j":{{"value":1.0,"unit":"J/token","source":"{source}","interval":null}},'
    execute(f"""UPDATE trials SET trial = replace(trial, '"metrics":{{', '"metrics":{{{energy}')""")(
        run_copy / "trials.db"
    )
    assert f"run={run_copy}: its energies are {source}; here they would not be" in refused(
        capsys, "resume", f"run={run_copy}"
    )


def test_two_processes_do_not_work_on_one_run(run_copy: Path, capsys: Capture):
    with open(run_copy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for verb in ("resume", "report"):
            assert f"run={run_copy}: another process is working on this run" in refused(capsys, verb, f"run={run_copy}")
    shutil.rmtree(run_copy)


PAYLOADS = (
    "+evil={_target_:os.system,_args_:['touch CANARY']}",
    "proposer={_target_:os.system,_args_:['touch CANARY'],name:random}",
    "+proposer._target_=os.system",
    "+quality={_target_:subprocess.getoutput,cmd:'touch CANARY'}",
    "+quality._target_=builtins.eval",
    "trackers=[{_target_:os.system,_args_:['touch CANARY']}]",
    "target={_target_:logging.os.system,_args_:['touch CANARY']}",
    "target=os.system",
    "proposer.name=os.system",
    "knobs.architecture.attention=[{_target_:os.system}]",
    "knobs={_target_:os.system,_args_:['touch CANARY']}",
    'objectives=[\'minimize __import__("os").system("touch CANARY")\']',
    'constraints=[\'latency_s <= __import__("os").system("touch CANARY")\']',
    "constraints=['latency_s <= (1).__class__']",
    "+limits={_target_:os.system,_args_:['touch CANARY']}",
    "hydra.job.name={_target_:os.system}",
    "+workload.points.0._target_=os.system",
    "space='!!python/object/apply:os.system [touch CANARY]'",
    "corpus=${oc.env:NO_SUCH_VARIABLE}",
    "experiment=../../etc/passwd",
)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload[:40])
def test_nothing_in_a_config_is_ever_called(
    inputs: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, payload: str
):
    # Whatever is not refused outright stops here, before a search.
    def stop(config: object) -> None:
        raise cli.UserError("inert")

    from cosearch import run, settings

    monkeypatch.setattr(run, "start", lambda config: (settings.Settings.from_config(config), stop(config)))
    canary = tmp_path / "canary"
    refused(capsys, *tiny.overrides(inputs, tmp_path / "runs", payload.replace("CANARY", str(canary))))
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()
