import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.experimental.layout import Layout
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_of

from cosearch import axes
from cosearch.__main__ import main
from cosearch.architecture.decoder import Decoder, bind
from cosearch.artifact import DTYPES, save
from cosearch.artifact.generate import generate
from cosearch.artifact.load import _placed, _read_weights, load, read_manifest
from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import Rejected, UserError
from cosearch.core.workload import OperatingPoint, Workload
from cosearch.kernels.cpu import build, program
from cosearch.kernels.cpu.program import TARGET, Kernel
from cosearch.measure.verify import sharp_weights
from cosearch.precision import FORMATS
from cosearch.quality.serve import Served
from cosearch.schedule.program import Program
from tests import tiny

PROMPT = "def main("
TOKENS = 16
FILES = (
    "decode.executable",
    "decode.stablehlo",
    "manifest.json",
    "prefill.executable",
    "prefill.stablehlo",
    "verification.json",
    "weights.safetensors",
)


@pytest.fixture(scope="module")
def text(artifact: Path) -> str:
    """What follows the prompt, as this process generates it."""
    return generate(load(artifact), PROMPT, TOKENS).text


def test_an_artifact_has_exactly_its_files(artifact: Path):
    assert tuple(sorted(os.listdir(artifact))) == FILES
    manifest = read_manifest(artifact)
    assert set(manifest["sha256"]) == set(FILES) - {"manifest.json"}
    assert manifest["uid"] == Candidate.from_point(manifest["candidate"]).uid == artifact.name
    verification = json.loads((artifact / "verification.json").read_text())
    assert all(
        result["typical"] <= result["typical_allowed"] and result["worst"] <= result["worst_allowed"]
        for result in verification["results"].values()
    )


def test_a_fresh_process_needs_nothing_but_the_folder(artifact_copy: Path, tmp_path: Path, text: str):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = ["-m", "cosearch", "generate", f"artifact={artifact_copy}", f"prompt={PROMPT}", f"tokens={TOKENS}"]
    told = subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": str(tiny.ROOT), "HOME": str(empty), "PATH": os.environ["PATH"]},
        cwd=empty,
        capture_output=True,
        timeout=120,
        check=True,
    )
    out = told.stdout.decode()
    assert out.startswith(PROMPT + text + "\n")
    assert f"\n{TOKENS} tokens, " in out
    assert os.listdir(empty) == []


def test_greedy_text_is_what_the_model_itself_thinks_likeliest(artifact: Path):
    manifest = read_manifest(artifact)
    model = axes.decoder(Candidate.from_point(manifest["candidate"]))
    params = load_file(artifact / "weights.safetensors")
    loaded = load(artifact)
    score = jax.jit(lambda params, tokens: bind(model, params).score(tokens))
    made = list(generate(loaded, PROMPT, TOKENS).text.encode("ascii"))
    shown = list(PROMPT.encode())
    for byte in made:
        padded = np.zeros((1, manifest["capacity"]), np.int32)
        padded[0, : len(shown)] = shown
        logits = np.asarray(score(params, padded))[0, len(shown) - 1]
        # Where two bytes are as likely, cached and uncached sums may choose either.
        assert logits[byte] > logits.max() - 1e-3
        shown.append(byte)


def test_a_seed_gives_the_same_text_and_a_temperature_another(artifact: Path, text: str):
    loaded = load(artifact)
    first, second = (generate(loaded, PROMPT, TOKENS, temperature=1.5, seed=3) for _ in range(2))
    assert first.text == second.text != text
    assert generate(loaded, PROMPT, TOKENS, temperature=1.5, seed=4).text != first.text
    assert generate(loaded, PROMPT, TOKENS).text == text
    assert first.tokens == TOKENS and first.tokens_per_s > 0


def test_a_prompt_may_fill_the_cache_but_for_one(artifact: Path):
    loaded = load(artifact)
    capacity = loaded.manifest["capacity"]
    assert generate(loaded, "x" * (capacity - 1), 1).tokens == 1
    with pytest.raises(UserError, match=f"at most {capacity}"):
        generate(loaded, "x" * capacity, 1)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    code = main(["generate", f"artifact={folder}", *(more or ("prompt=x", "tokens=1"))])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("cosearch: ") and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_flipped_byte_is_found(artifact_copy: Path, capsys: pytest.CaptureFixture[str], name: str, where: float):
    data = bytearray((artifact_copy / name).read_bytes())
    data[min(int(where * len(data)), len(data) - 1)] ^= 1
    (artifact_copy / name).write_bytes(data)
    assert f"{name} is not the file that was saved" in refused(capsys, artifact_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_found(artifact_copy: Path, capsys: pytest.CaptureFixture[str], name: str):
    os.truncate(artifact_copy / name, (artifact_copy / name).stat().st_size // 2)
    assert name in refused(capsys, artifact_copy)
    os.truncate(artifact_copy / name, 0)
    assert name in refused(capsys, artifact_copy)
    (artifact_copy / name).unlink()
    assert f"{name}: No such file or directory" in refused(capsys, artifact_copy)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=1), "is not of version 2"),
        (lambda m: m.update(version="2"), "is not of version 2"),
        (lambda m: m.pop("version"), "is not of version 2"),
        (lambda m: m.pop("sha256"), "'sha256'"),
        (lambda m: m.update(sha256=[]), "'sha256'"),
        (lambda m: m.update(sha256={}), "decode.executable"),
        (lambda m: m["sha256"].pop("weights.safetensors"), "weights.safetensors"),
        (lambda m: m["sha256"].update({"../secret": "0"}), "names a file outside the folder: '../secret'"),
        (lambda m: m["sha256"].update({"/etc/passwd": "0"}), "names a file outside the folder: '/etc/passwd'"),
        (lambda m: m["sha256"].update({"a/b": "0"}), "names a file outside the folder: 'a/b'"),
        (lambda m: m["sha256"].update({"..": "0"}), "names a file outside the folder: '..'"),
        (lambda m: m["sha256"].update({"": "0"}), "names a file outside the folder: ''"),
        (lambda m: m.pop("params"), "'params'"),
        (lambda m: m["params"].append("layers.9"), "layers.9"),
        (lambda m: m.pop("fingerprint"), "'fingerprint'"),
        (lambda m: m.pop("cache"), "'cache'"),
        (lambda m: m.update(capacity="many"), "'capacity'"),
        (lambda m: m.update(prefill_chunk=0), "'prefill_chunk'"),
        (lambda m: m.pop("batch"), "'batch'"),
        (lambda m: m.pop("platform"), "'platform'"),
        (lambda m: m["layouts"].pop(), "'layouts'"),
        (lambda m: m["layouts"].__setitem__(0, [[5, 7], []]), "'layouts'"),
        (lambda m: m["layouts"].__setitem__(0, "in order"), "'layouts'"),
        (lambda m: m["layouts"].__setitem__(-1, 3), "'layouts'"),
    ],
)
def test_a_wrong_manifest_is_refused(
    artifact_copy: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], message: str
):
    edit(artifact_copy, change)
    err = refused(capsys, artifact_copy)
    assert f"artifact={artifact_copy}: " in err and message in err


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00\x01", "[" * 100_000, '{"version": 1, "version": 1}'])
def test_a_manifest_that_is_none_is_refused(artifact_copy: Path, capsys: pytest.CaptureFixture[str], text: str):
    (artifact_copy / "manifest.json").write_text(text)
    assert "manifest.json" in refused(capsys, artifact_copy)
    (artifact_copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert "manifest.json is not JSON" in refused(capsys, artifact_copy)


def test_what_is_no_artifact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "manifest.json: No such file or directory" in refused(capsys, tmp_path / "nowhere")
    assert "manifest.json: No such file or directory" in refused(capsys, tmp_path)
    (tmp_path / "file").write_text("x")
    assert "manifest.json: Not a directory" in refused(capsys, tmp_path / "file")


def test_a_link_out_of_the_folder_is_hashed_like_any_file(artifact_copy: Path, capsys: pytest.CaptureFixture[str]):
    (artifact_copy / "weights.safetensors").unlink()
    (artifact_copy / "weights.safetensors").symlink_to("/etc/hostname")
    assert "weights.safetensors is not the file that was saved" in refused(capsys, artifact_copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["prompt=" + "x" * 5000], "with the 5000 bytes of the prompt, at most 32"),
        (["prompt="], "prompt: is empty"),
        (["prompt=x", "tokens=0"], "tokens=0: must be at least 1"),
        (["prompt=x", "tokens=-1"], "tokens=-1: must be at least 1"),
        (["prompt=x", "tokens=1000000000"], "tokens=1000000000: must be at least 1"),
        (["prompt=x", "tokens=x"], "tokens=x: is not of the kind int"),
        (["prompt=x", "tokens=1.5"], "tokens=1.5: is not of the kind int"),
        (["prompt=x", "tokens="], "tokens=: is not of the kind int"),
        (["prompt=x", "tokens=1", "temperature=hot"], "temperature=hot: is not of the kind float"),
        (["prompt=x", "tokens=1", "temperature=nan"], "temperature=nan: "),
        (["prompt=x", "tokens=1", "temperature=inf"], "temperature=inf: "),
        (["prompt=x", "tokens=1", "temperature=-1"], "temperature=-1.0: "),
        (["prompt=x", "tokens=1", "seed=-1"], "seed=-1: "),
        (["prompt=x", "token=1"], "'token=1': unknown option; did you mean 'tokens'?"),
        (["prompt=x", "tokens"], "'tokens': unknown option"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_options_are_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    assert message in refused(capsys, artifact, *options)


def test_what_was_compiled_elsewhere_is_compiled_again_and_says_so(artifact_copy: Path, text: str):
    edit(artifact_copy, lambda manifest: manifest["fingerprint"].update(jaxlib="0.0.1"))
    (artifact_copy / "decode.executable").write_bytes(b"for another machine")
    digest = hashlib.sha256(b"for another machine").hexdigest()
    edit(artifact_copy, lambda manifest: manifest["sha256"].update({"decode.executable": digest}))
    code, out, err = tiny.command(
        "generate", f"artifact={artifact_copy}", f"prompt={PROMPT}", f"tokens={TOKENS}", timeout_s=120
    )
    assert code == 0, err
    assert err.startswith("cosearch: compiled again from the StableHLO (jaxlib 0.0.1 there, ")
    assert out.startswith(PROMPT + text + "\n")


CANDIDATE = Candidate.from_point(
    {"architecture.width": 32, "architecture.depth": 1, "architecture.head_dim": 16, "architecture.ffn_ratio": 2}
)
WORKLOAD = Workload("tiny", (OperatingPoint("decode", 1, 32),))


@pytest.mark.parametrize(
    "choices",
    [
        {"precision.weights": "float8_e4m3", "precision.kv_cache": "float8_e4m3"},
        {"precision.weights": "nvfp4", "precision.kv_cache": "int4"},
        {"precision.weights": "mxfp4", "sparsity.attention": "block_topk", "sparsity.attention_block": 4},
        {"precision.weights": "int8", "sparsity.pattern": "n_m", "precision.rules": ("embedding=bfloat16",)},
        {"sparsity.pattern": "block", "architecture.attention": "mla", "architecture.latent": 32},
        {"architecture.attention": "gated_delta", "architecture.feedforward": "moe"},
    ],
    ids=str,
)
def test_whatever_is_stored_is_loaded_and_continued(tmp_path: Path, choices: dict[str, Value]):
    """The artifact writes what the model writes that is scored as a whole."""
    point: dict[str, Value] = {"architecture.depth": 1, "architecture.head_dim": 16, "architecture.ffn_ratio": 2}
    one = Candidate.from_point(point | {"architecture.width": 64} | choices)
    served = Served(sharp_weights(axes.dense_shape(one), 0), {})
    save.save_artifact(one, WORKLOAD, served, {}, tmp_path / "artifact")
    written = generate(load(tmp_path / "artifact"), "def main(", 12).text
    model = axes.decoder(one)
    params = served.params(model)
    score = jax.jit(lambda params, tokens: bind(model, params).score(tokens))
    text = b"def main("
    for _ in range(12):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = list(text)
        text += bytes([int(np.argmax(score(params, padded)[0, len(text) - 1]))])
    assert written == text[len("def main(") :].decode(errors="replace")


def test_every_dtype_that_safetensors_and_numpy_have_is_read_back(tmp_path: Path):
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items()}
    (tmp_path / "weights.safetensors").write_bytes(safetensors_of(arrays))
    read = _read_weights(tmp_path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].tobytes()) == (array.dtype, array.tobytes())


def test_whatever_a_registered_format_stores_has_a_place_in_an_artifact():
    dtypes = [np.dtype(dtype) for dtype in DTYPES.values()]
    for name in FORMATS.names():
        if FORMATS[name].weights:
            for part, spec in FORMATS[name].spec(256, 24, "in_out").items():
                assert spec.dtype in dtypes, (name, part)


def test_a_dtype_that_cannot_be_read_is_named(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match=r"weights.safetensors: 'a' is of F4, not of BOOL, U8"):
        _read_weights(tmp_path)


def test_a_dtype_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Served, "params", lambda *_: {"norm": np.zeros(2, ml_dtypes.int4)})
    with pytest.raises(Rejected, match=r"norm is of int4, which weights.safetensors cannot hold"):
        save.save_artifact(CANDIDATE, WORKLOAD, Served({}, {}), {}, tmp_path / "artifact")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(path: Path, data: Any) -> None:
        assert len(list(path.parent.iterdir())) >= 5
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "write_json", interrupt)
    weights = Served(sharp_weights(axes.dense_shape(CANDIDATE), 0), {})
    with pytest.raises(KeyboardInterrupt):
        save.save_artifact(CANDIDATE, WORKLOAD, weights, {}, tmp_path / "artifact")
    assert os.listdir(tmp_path) == []


def test_an_artifact_that_computes_something_else_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Louder(Decoder):
        def _logits(self, x: jax.Array) -> jax.Array:
            return 1.01 * super()._logits(x)

    def louder(candidate: Candidate) -> Decoder:
        return Louder(axes.served_shape(candidate))

    monkeypatch.setattr(axes, "decoder", louder)
    weights = Served(sharp_weights(axes.dense_shape(CANDIDATE), 0), {})
    with pytest.raises(Rejected, match="wrong result"):
        save.save_artifact(CANDIDATE, WORKLOAD, weights, {}, tmp_path / "artifact")
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from cosearch.artifact import save
honest = save.write_json
def write_json(path, data):
    if path.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    honest(path, data)
save.write_json = write_json
from tests.artifact.test_artifact import CANDIDATE, WORKLOAD, Served, axes, sharp_weights
weights = Served(sharp_weights(axes.dense_shape(CANDIDATE), 0), {})
save.save_artifact(CANDIDATE, WORKLOAD, weights, {}, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["verification.json", "manifest.json"])
def test_a_killed_save_leaves_nothing_that_looks_like_an_artifact(tmp_path: Path, name: str):
    folder = tmp_path / "artifact"
    arguments = [sys.executable, "-c", KILLED, str(folder), name]
    told = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(tiny.ROOT)}, check=False, timeout=120)
    assert told.returncode == -signal.SIGKILL
    assert not folder.exists()
    (draft,) = tmp_path.iterdir()
    assert draft.name.startswith(".") and not (draft / "manifest.json").exists()
    shutil.rmtree(draft)


FUSED = Candidate.from_point(
    CANDIDATE.point
    | {
        "architecture.depth": 2,
        "precision.weights": "int8",
        "precision.kv_cache": "int8",
        "schedule.layers": "unroll",
        "schedule.matmul": "cpp",
        "schedule.fusion": "step",
        "schedule.cache_layout": "bhsd",
    }
)
CALLED = re.compile(r"custom_call @(\w+)")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose programs call C++ kernels; to be read, or copied."""
    folder = tmp_path_factory.mktemp("fused") / "artifact"
    save.save_artifact(FUSED, WORKLOAD, Served(sharp_weights(axes.dense_shape(FUSED), 0), {}), {}, folder)
    return folder


@pytest.mark.compiler
def test_an_artifact_with_kernels_lists_them_and_has_a_portable_form_without(fused: Path):
    kernels = [Kernel.of_name(name) for name in read_manifest(fused)["kernels"]]
    assert {kernel.source for kernel in kernels} >= {"attend", "heads", "matmul", "prefill", "prepare"}
    for phase in ("decode", "prefill"):
        program = export.deserialize(bytearray((fused / f"{phase}.stablehlo").read_bytes()))
        assert CALLED.findall(program.mlir_module()) == []
        assert TARGET not in program.mlir_module()
    here = Program(axes.decoder(FUSED), "decode", 1, 32)
    assert set(CALLED.findall(here.jitted().lower(*here.arguments()).as_text())) == {TARGET}, "which would be found"


def test_an_artifact_says_how_its_arrays_lie_where_the_compiler_chose_it(tmp_path: Path):
    own = Candidate.from_point({**CANDIDATE.point, "schedule.boundary": "compiler"})
    weights = Served(sharp_weights(axes.dense_shape(own), 0), {})
    for name, one in (("default", CANDIDATE), ("chosen", own)):
        save.save_artifact(one, WORKLOAD, weights, {}, tmp_path / name)
    default, chosen = (load(tmp_path / name) for name in ("default", "chosen"))
    assert set(default.manifest["layouts"]) == {None}
    arrays = [*chosen.params, *chosen.empty_cache()]
    assert [order for order, _ in chosen.manifest["layouts"]] == [list(range(one.ndim)) for one in arrays]
    assert chosen.recompiled is None
    assert generate(chosen, PROMPT, TOKENS).text == generate(default, PROMPT, TOKENS).text


def test_arrays_are_placed_as_the_manifest_says(tmp_path: Path):
    arrays = [np.arange(6.0).reshape(2, 3), np.ones(4)]
    placed: list[Any] = list(_placed(tmp_path, arrays, [[[1, 0], []], None]))
    turned, plain = placed
    assert isinstance(turned.format.layout, Layout) and turned.format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(turned, arrays[0])
    np.testing.assert_array_equal(plain, arrays[1])


@pytest.mark.compiler
def test_an_artifact_of_other_kernels_is_compiled_again(fused: Path, monkeypatch: pytest.MonkeyPatch):
    """The saved program would hand the kernels of today what those of then took."""
    text = generate(load(fused), PROMPT, TOKENS).text
    monkeypatch.setattr(build, "state", lambda: "0123456789abcdef")
    program.load.cache_clear()
    again = load(fused)
    assert again.recompiled is not None and "was made from other sources than are here" in again.recompiled
    assert generate(again, PROMPT, TOKENS).text == text


@pytest.mark.parametrize("compiler", [None, "/nonexistent"])
@pytest.mark.compiler
def test_a_fresh_process_runs_kernels_or_says_why_not(fused: Path, compiler: str | None):
    """With a compiler the same program; without one, what XLA makes of the portable form."""
    text = generate(load(fused), PROMPT, TOKENS).text
    given: Any = {} if compiler is None else {"CXX": compiler}
    code, out, err = tiny.command("generate", f"artifact={fused}", f"prompt={PROMPT}", f"tokens={TOKENS}", **given)
    assert code == 0, err
    assert out.startswith(PROMPT + text + "\n")
    if compiler is None:
        assert err == ""
    else:
        assert err.startswith(
            "cosearch: compiled again from the StableHLO (a native kernel cannot be compiled: there is "
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "'nothing' names no native kernel"),
        ("../../x::avx2", "names no native kernel"),
        (3, "names no native kernel"),
        (
            replace(Kernel("combine"), isa=("avx2", "avx1024")).name,
            "made for avx1024, which this processor does not have",
        ),
        (replace(Kernel("gone"), isa=("avx2",)).name, "does not compile a native kernel"),
    ],
)
@pytest.mark.compiler
def test_a_kernel_that_is_not_to_be_had_is_told(fused: Path, tmp_path: Path, name: Any, words: str):
    folder = tmp_path / "artifact"
    shutil.copytree(fused, folder)
    edit(folder, lambda manifest: manifest["kernels"].append(name))
    loaded = load(folder)
    assert loaded.recompiled is not None and words in loaded.recompiled
    assert generate(loaded, PROMPT, TOKENS).text == generate(load(fused), PROMPT, TOKENS).text
