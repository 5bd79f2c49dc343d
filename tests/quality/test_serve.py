"""From trained weights to served ones: pruned, recovered, calibrated; and nothing else is changed on the way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture.decoder import Decoder, Params, Weights, bind, pack, plain_decoder, random_weights, unpack
from cosearch.architecture.shape import EMBEDDING, DecoderShape
from cosearch.core.candidate import Candidate, Value
from cosearch.precision import FORMATS, Precision
from cosearch.precision.calibration import output_error
from cosearch.quality import Recipe, corpus, serve
from cosearch.quality.statistics import moments
from cosearch.quality.train import trained_weights
from cosearch.sparsity import pattern_of

RECIPE = Recipe(steps=40, warmup_steps=2, text_rows=2, recall_rows=1)
POINT: dict[str, Value] = {
    "architecture.width": 64,
    "architecture.depth": 2,
    "architecture.head_dim": 16,
    "architecture.ffn_ratio": 1,
}


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.load("python")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def candidate(**choices: Value) -> Candidate:
    return Candidate.from_point(POINT | {name.replace("__", "."): value for name, value in choices.items()})


def quiet(what: str, part: float) -> None: ...


def logits(shape: DecoderShape, weights: Weights) -> np.ndarray:
    model = plain_decoder(serve.whole(shape))
    tokens = jnp.asarray(corpus.load("python").held_out[5000:5512].reshape(2, 256).astype(np.int32))
    return np.asarray(jax.jit(lambda p: bind(model, p).score(tokens))(pack(model, weights)))


def test_a_dense_candidate_is_served_as_it_was_trained(text: corpus.Corpus, cache: Path):
    one = candidate(precision__weights="int8")
    trained = trained_weights(axes.dense_shape(one), RECIPE, text, cache, quiet)
    result = serve.served(one, RECIPE, text, cache, quiet)
    assert not result.scales
    assert all(np.array_equal(result.weights[path], trained[path]) for path in trained)


def test_recovery_keeps_the_mask_and_lowers_the_loss(text: corpus.Corpus, cache: Path):
    one = candidate(sparsity__pattern="n_m", sparsity__n_m="1:4", sparsity__criterion="sparsegpt")
    pruned = serve.served(one, RECIPE, text, cache, quiet).weights
    recovered = serve.served(one, replace(RECIPE, recovery_steps=20), text, cache, quiet).weights
    shape, trained = axes.served_shape(one), trained_weights(axes.dense_shape(one), RECIPE, text, cache, quiet)
    for path in shape.linears():
        if shape.compression_of(path) is not None:
            assert (recovered[path][pruned[path] == 0] == 0).all()
            assert (pruned[path] != 0).mean() == pytest.approx(0.25, abs=0.01)
    assert any(not np.array_equal(recovered[path], pruned[path]) for path in pruned)
    wanted = jax.nn.log_softmax(logits(axes.dense_shape(one), trained))
    found = [jax.nn.log_softmax(logits(shape, weights)) for weights in (pruned, recovered)]
    divergence = [float((np.exp(wanted) * (wanted - one)).sum(axis=-1).mean()) for one in found]
    assert divergence[1] < divergence[0]


def test_what_was_recovered_is_kept(text: corpus.Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch):
    one = candidate(sparsity__pattern="structured", sparsity__heads_kept=0.5, sparsity__channels_kept=0.5)
    recipe = replace(RECIPE, recovery_steps=10)
    first = serve.served(one, recipe, text, cache, quiet)
    monkeypatch.setattr(serve, "descend", lambda *_: pytest.fail("trained again"))
    other = Candidate.from_point(one.point | {"schedule.layers": "unroll", "precision.weights": "int8"})
    again = serve.served(other, recipe, text, cache, quiet)
    assert all(np.array_equal(first.weights[path], again.weights[path]) for path in first.weights)


def test_training_through_the_rounding_helps_what_is_rounded(text: corpus.Corpus, cache: Path):
    one = candidate(precision__weights="mxfp4")
    shape, precision = axes.served_shape(one), Precision.of(one.precision)
    model = plain_decoder(shape, precision)
    trained = trained_weights(shape, RECIPE, text, cache, quiet)
    wanted = logits(shape, trained)
    away = []
    for steps in (0, 30):
        params = serve.served(one, replace(RECIPE, recovery_steps=steps, distillation=1.0), text, cache, quiet).params(
            model
        )
        away.append(np.linalg.norm(logits(shape, unpack(model, params)) - wanted))
    assert away[1] < away[0]


@pytest.mark.parametrize("sparsity", ["dense", "n_m", "block"])
@pytest.mark.parametrize(
    ("formats", "layers"),
    [
        ({"precision__weights": "int4_g32"}, "scan"),
        ({"precision__weights": "nvfp4", "precision__rules": ("embedding=int8",)}, "scan"),
        ({"precision__weights": "int4_g32", "precision__rules": ("layers.0.*=bfloat16",)}, "unroll"),
    ],
    ids=str,
)
def test_recovery_simulates_what_is_served(
    sparsity: str, formats: dict[str, Value], layers: str, monkeypatch: pytest.MonkeyPatch, text: corpus.Corpus
):
    one = candidate(architecture__feedforward="moe", sparsity__pattern=sparsity, **formats)
    dense, shape, precision = axes.dense_shape(one), axes.served_shape(one), Precision.of(one.precision)
    parent = random_weights(dense, 8)
    pattern, choices = pattern_of(one.sparsity)
    weights = pattern.prune(parent, dense, choices, {})
    used = []

    def simulation(model: Decoder, *arguments: Any) -> Callable[[Params], Params]:
        used.append((model, as_served := simulated(model, *arguments)))
        return as_served

    simulated = serve.simulation
    monkeypatch.setattr(serve, "simulation", simulation)
    monkeypatch.setattr(serve, "descend", lambda loss, start, *_: start)
    recovered = serve.recover(one, weights, parent, RECIPE, text, quiet)
    assert all(np.array_equal(recovered[path], weights[path]) for path in weights)

    ((model, as_served),) = used
    assert model.schedule.layers == layers
    rng = np.random.default_rng(10)
    weights = {path: array * rng.uniform(0.5, 2, array.shape).astype(np.float32) for path, array in weights.items()}
    told = unpack(model, jax.jit(as_served)(pack(model, weights)))
    stored = plain_decoder(shape, precision)
    served = unpack(stored, pack(stored, weights))
    coarse = [path for path in shape.linears() if "4" in precision.weight_format(path)]
    assert coarse
    for path in weights:
        if path in coarse:
            # Formats of two scales are read back in float64 here, and in float32 there.
            np.testing.assert_allclose(told[path], served[path], rtol=1e-6, atol=0)
            assert not np.array_equal(told[path], weights[path])
        else:
            np.testing.assert_array_equal(told[path], weights[path])


def spread(shape: DecoderShape, seed: int) -> dict[str, np.ndarray]:
    """Random weights whose norms differ by channel, as those of trained models do."""
    rng = np.random.default_rng(seed)
    weights = random_weights(shape, seed)
    for path in shape.vectors():
        if path.endswith("_norm") and len(weights[path]) == shape.width:
            weights[path] = np.exp(rng.normal(0, 1.5, shape.width)).astype(np.float32)
    return weights


def observer(shape: DecoderShape, text: corpus.Corpus) -> Callable[[Weights], Weights]:
    return lambda weights: moments(shape, weights, RECIPE, text)


def output_errors(shape: DecoderShape, precision: Precision, weights: Weights, known: Weights) -> dict[str, float]:
    """The mean square by which each matrix's outputs are off, once `weights` are calibrated and stored."""
    result = serve.calibrate(shape, precision, weights, lambda _: known)
    model = plain_decoder(shape, precision)
    back, errors = unpack(model, result.params(model)), {}
    for path in shape.linears():
        if path != EMBEDDING:
            # What AWQ multiplied rows by, the norm divides again.
            factors = np.linalg.norm(result.weights[path], axis=1) / np.linalg.norm(weights[path], axis=1)
            scaled = precision.calibration == "awq"
            errors[path] = output_error(back[path] / (factors[:, None] if scaled else 1) - weights[path], known[path])
    return errors


@pytest.mark.parametrize("attention", ["gqa", "gated_delta", "mla"])
def test_calibrations_lessen_what_is_wrong_in_the_outputs(text: corpus.Corpus, attention: str):
    point: dict[str, Value] = {"architecture__kv_heads": 2, "architecture__latent": 32}
    shape = axes.dense_shape(candidate(architecture__attention=attention, **point))
    weights = spread(shape, 3)
    known = moments(shape, weights, RECIPE, text)
    rules = ("*.beta=int8", "*.decay=int8")
    off = {
        method: output_errors(shape, Precision("int4_g32", calibration=method, rules=rules), weights, known)
        for method in ("absmax", "mse", "gptq", "awq")
    }
    total = {method: sum(errors.values()) for method, errors in off.items()}
    assert total["gptq"] < 0.8 * total["absmax"]
    assert total["mse"] < total["absmax"]
    assert total["awq"] < total["absmax"]


def test_awq_changes_nothing_before_it_is_packed(text: corpus.Corpus):
    shape = axes.dense_shape(candidate(architecture__feedforward=("moe", "gelu")))
    weights = spread(shape, 4)
    result = serve.calibrate(shape, Precision("int4_g32", calibration="awq"), weights, observer(shape, text))
    assert not np.array_equal(result.weights["layers.0.attention_norm"], weights["layers.0.attention_norm"])
    np.testing.assert_allclose(logits(shape, result.weights), logits(shape, weights), rtol=2e-3, atol=2e-3)


def test_awq_hears_every_expert_where_none_is_shared(text: corpus.Corpus):
    shape = axes.dense_shape(candidate(architecture__feedforward="moe", architecture__shared_ratio=0))
    weights = spread(shape, 9)
    known = moments(shape, weights, RECIPE, text)
    experts = [f"layers.{index}.feedforward.{name}" for index in range(2) for name in ("gate", "up")]

    def error(method: str) -> float:
        precision = Precision("int4_g32", calibration=method, rules=("*.router=float32",))
        result = serve.calibrate(shape, precision, weights, lambda _: known)
        model = plain_decoder(shape, precision)
        back, found = unpack(model, result.params(model)), 0.0
        for path in experts:
            norm = path.rpartition(".")[0] + "_norm"
            factors = weights[norm] / result.weights[norm]
            for matrix, wanted, moment in zip(back[path], weights[path], known[path], strict=True):
                found += output_error(matrix / factors[:, None] - wanted, moment)
        return found

    assert error("awq") < 0.9 * error("absmax")


def test_matrices_whose_format_leaves_no_choice_stay_as_they_are(text: corpus.Corpus):
    shape = axes.dense_shape(candidate())
    weights = random_weights(shape, 5)
    precision = Precision("float32", calibration="gptq", rules=("layers.0.*=int8",))
    result = serve.calibrate(shape, precision, weights, observer(shape, text))
    assert result.scales.keys() == {path for path in shape.linears() if path.startswith("layers.0.")}
    for path in weights:
        assert np.array_equal(result.weights[path], weights[path]) == (path not in result.scales), path


def test_experts_are_calibrated_one_by_one(text: corpus.Corpus):
    shape = axes.dense_shape(candidate(architecture__feedforward="moe"))
    weights = random_weights(shape, 6)
    for method in ("mse", "gptq"):
        precision = Precision("int4_g32", calibration=method)
        result = serve.calibrate(shape, precision, weights, observer(shape, text))
        model = plain_decoder(shape, precision)
        back = unpack(model, result.params(model))
        assert result.scales["layers.0.feedforward.up"].shape == (4, 2, 64)
        if method == "gptq":
            np.testing.assert_allclose(
                back["layers.0.feedforward.up"], result.weights["layers.0.feedforward.up"], atol=1e-6
            )


def test_scales_of_compressed_matrices_are_those_of_what_is_stored(text: corpus.Corpus):
    one = candidate(architecture__width=128, sparsity__pattern="n_m", sparsity__n_m="2:4")
    shape = axes.served_shape(one)
    weights = random_weights(axes.dense_shape(one), 7)
    form = FORMATS["int4_g64"]
    result = serve.calibrate(shape, Precision("int4_g64", calibration="mse"), weights, observer(shape, text))
    assert result.scales["layers.0.attention.query"].shape == (1, 128)
    model = plain_decoder(shape, Precision("int4_g64"))
    packed = result.params(model)
    assert packed["layers.attention.query.values"].shape[1:] == form.spec(64, 128, "in_out")["values"].shape
