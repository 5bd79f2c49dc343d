import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture.decoder import pack, plain_decoder, random_weights
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Candidate, Choices
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.quality import Recipe, corpus, train
from cosearch.quality.evaluate import evaluate

# A restore that fails leaves calls of Orbax's pending when its loop is closed, which Python reports as unraisable.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RECIPE = Recipe(
    steps=20, length=224, text_rows=2, recall_rows=1, warmup_steps=2, evaluated_windows=8, evaluated_recalls=4
)
SHAPE = DecoderShape.of(Choices({"width": 32, "depth": 1, "head_dim": 16, "ffn_ratio": 2}))


def quiet(what: str, fraction: float) -> None:
    pass


@pytest.fixture(scope="module")
def text(inputs: Path) -> corpus.Corpus:
    return corpus.load(str(inputs / "text"))


@pytest.fixture(scope="module")
def trained(text: corpus.Corpus) -> dict[str, np.ndarray]:
    return train.train(SHAPE, RECIPE, text, quiet)


@pytest.fixture(scope="module")
def kept(text: corpus.Corpus, trained: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the trained weights."""
    cache = tmp_path_factory.mktemp("kept")
    train._save(cache / "weights" / train.weights_key(repr(SHAPE), RECIPE, text), trained, repr(SHAPE))
    return cache


def same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def bits(weights: Mapping[str, np.ndarray], text: corpus.Corpus, weight_format: str = "float32") -> float:
    model = plain_decoder(SHAPE, Precision(weight_format))
    return float(np.mean(evaluate(model, pack(model, weights), RECIPE, text)["bits_per_byte"]))


def test_training_lowers_the_loss_on_held_out_text(trained: dict[str, np.ndarray], text: corpus.Corpus):
    assert bits(trained, text) < bits(random_weights(SHAPE, RECIPE.seed), text) - 1.0


def test_training_is_deterministic(trained: dict[str, np.ndarray], text: corpus.Corpus):
    told: list[tuple[str, float]] = []
    assert same(train.train(SHAPE, RECIPE, text, lambda what, fraction: told.append((what, fraction))), trained)
    assert [fraction for _, fraction in told] == [0.5, 1.0]
    assert told[0][0].startswith("training, step 10 of 20, ")


def test_every_weight_is_float32_and_was_trained(trained: dict[str, np.ndarray]):
    start = random_weights(SHAPE, RECIPE.seed)
    assert trained.keys() == start.keys()
    for path, array in trained.items():
        assert array.dtype == np.float32 and array.shape == start[path].shape and np.isfinite(array).all()
        assert not np.array_equal(array, start[path]), path


def test_evaluation_gives_its_raw_samples(trained: dict[str, np.ndarray], text: corpus.Corpus):
    model = plain_decoder(SHAPE)
    samples = evaluate(model, pack(model, trained), RECIPE, text)
    assert len(samples["bits_per_byte"]) == 8 and len(samples["recall_accuracy"]) == 4
    assert all(0 < value < 10 for value in samples["bits_per_byte"])
    assert all(0 <= value <= 1 for value in samples["recall_accuracy"])
    assert evaluate(model, pack(model, trained), RECIPE, text) == samples


def test_int8_and_bfloat16_score_nearly_as_float32(trained: dict[str, np.ndarray], text: corpus.Corpus):
    exact = bits(trained, text)
    for name, most in (("int8", 0.02), ("bfloat16", 0.02)):
        assert abs(bits(trained, text, name) - exact) < most * exact
        assert bits(trained, text, name) != exact


def test_batches_are_fixed_by_the_seed(text: corpus.Corpus):
    def batches(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [train._batch(rng, RECIPE, text).inputs for _ in range(3)]

    for first, second in zip(batches(0), batches(0), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (batches(0)[0] != batches(1)[0]).any()
    assert (batches(0)[0] != batches(0)[1]).any()


def test_the_labels_of_text_are_the_bytes_that_follow(text: corpus.Corpus):
    batch = train._batch(np.random.default_rng(0), RECIPE, text)
    np.testing.assert_array_equal(batch.inputs[:2, 1:], batch.labels[:2, :-1])
    for row in batch.inputs[:2]:
        assert row.astype(np.uint8).tobytes() in text.train.tobytes()


def test_weights_are_trained_once(text: corpus.Corpus, kept: Path, trained: dict[str, np.ndarray]):
    def never(what: str, fraction: float) -> None:
        raise AssertionError("trained again")

    assert same(train.trained_weights(SHAPE, RECIPE, text, kept, never), trained)


def test_whatever_changes_the_result_changes_the_key(text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch):
    key = train.weights_key(repr(SHAPE), RECIPE, text)
    wider = axes.dense_shape(Candidate.from_point({"architecture.width": 64, "architecture.depth": 1}))
    others = {
        train.weights_key(repr(wider), RECIPE, text),
        train.weights_key(repr(SHAPE), dataclasses.replace(RECIPE, steps=30), text),
        train.weights_key(repr(SHAPE), dataclasses.replace(RECIPE, seed=1), text),
        train.weights_key(repr(SHAPE), RECIPE, dataclasses.replace(text, digest="0")),
    }
    assert len(others | {key}) == 5
    assert train.weights_key(repr(SHAPE), RECIPE, dataclasses.replace(text, name="copy")) == key
    here = train.fingerprint()
    monkeypatch.setattr(train, "fingerprint", lambda: here | {"jaxlib": "0.0.0"})
    assert train.weights_key(repr(SHAPE), RECIPE, text) not in others | {key}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9])
def test_no_damaged_checkpoint_is_loaded_as_if_it_were_whole(
    kept: Path, trained: dict[str, np.ndarray], tmp_path: Path, where: float
):
    (folder,) = (kept / "weights").iterdir()
    refused = 0
    for file in files(folder):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damaged = copy / file.relative_to(folder)
        data = bytearray(damaged.read_bytes())
        data[int(where * len(data))] ^= 0x20
        damaged.write_bytes(data)
        found = train._load(copy)
        assert found is None or same(found, trained), damaged
        refused += found is None
        shutil.rmtree(copy)
    assert refused


def test_an_incomplete_checkpoint_is_not_loaded(kept: Path, trained: dict[str, np.ndarray], tmp_path: Path):
    (folder,) = (kept / "weights").iterdir()
    for file in files(folder):
        for cut in (None, 0, file.stat().st_size // 2):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            damaged = copy / file.relative_to(folder)
            if cut is None:
                damaged.unlink()
            else:
                os.truncate(damaged, cut)
            found = train._load(copy)
            assert found is None or same(found, trained), (damaged, cut)
            shutil.rmtree(copy)


def test_a_damaged_checkpoint_is_trained_again_and_replaced(
    text: corpus.Corpus, kept: Path, trained: dict[str, np.ndarray], tmp_path: Path
):
    cache = tmp_path / "cache"
    shutil.copytree(kept, cache)
    largest = max(files(cache), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    told: list[str] = []
    again = train.trained_weights(SHAPE, RECIPE, text, cache, lambda what, fraction: told.append(what))
    assert told and same(again, trained)
    told.clear()
    assert same(train.trained_weights(SHAPE, RECIPE, text, cache, lambda what, fraction: told.append(what)), trained)
    assert not told


def test_weights_of_another_training_are_not_loaded(
    text: corpus.Corpus, kept: Path, trained: dict[str, np.ndarray], tmp_path: Path
):
    cache = tmp_path / "cache"
    swapped = {path: array[::-1].copy() for path, array in trained.items()}
    (folder,) = (kept / "weights").iterdir()
    train._save(cache / "weights" / folder.name, swapped, repr(SHAPE))
    shutil.copyfile(folder / "record.json", cache / "weights" / folder.name / "record.json")
    assert same(train.trained_weights(SHAPE, RECIPE, text, cache, quiet), trained)


def test_a_training_that_diverges_is_rejected_and_not_kept(text: corpus.Corpus, tmp_path: Path):
    wild = dataclasses.replace(RECIPE, matrix_rate=1e30, vector_rate=1e30)
    with pytest.raises(Rejected, match="training diverged: the loss is not finite by step "):
        train.trained_weights(SHAPE, wild, text, tmp_path, quiet)
    assert not (tmp_path / "weights").exists()
