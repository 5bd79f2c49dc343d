"""From a trained model to the one that is served: pruned, recovered, calibrated, packed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cosearch import axes
from cosearch.architecture.cache import straight_through
from cosearch.architecture.decoder import (
    Decoder,
    Params,
    Weights,
    bind,
    pack,
    plain_decoder,
    scannable,
    stored_as,
    unpack,
)
from cosearch.architecture.linear import Compression, MatrixStorage
from cosearch.architecture.shape import EMBEDDING, DecoderShape
from cosearch.core.candidate import Candidate
from cosearch.precision import FORMATS, Precision
from cosearch.precision.calibration import awq_scales, gptq, mse_scale
from cosearch.quality import Recipe
from cosearch.quality.corpus import Corpus
from cosearch.quality.statistics import moments
from cosearch.quality.train import descend, kept, next_byte_loss, trained_weights
from cosearch.schedule import Schedule
from cosearch.sparsity import pattern_of

Progress = Callable[[str, float], None]

_COARSE_BITS = 8
"""Weights in fewer bits than this are recovered; int8 loses nothing that a short training could give back."""


@dataclass(frozen=True)
class Served:
    """What is packed: weights, and the scales that a calibration chose for some of them."""

    weights: Weights
    scales: Weights

    def params(self, model: Decoder) -> dict[str, np.ndarray]:
        """As `model` stores them."""
        return pack(model, self.weights, self.scales)


def served(candidate: Candidate, recipe: Recipe, corpus: Corpus, cache: Path, progress: Progress) -> Served:
    """A candidate's model as it is served; what takes training is done once and kept in `cache`.

    Raises:
        Rejected: a training diverged, or a format cannot hold the weights.
    """
    dense, shape = axes.dense_shape(candidate), axes.served_shape(candidate)
    precision = Precision.of(candidate.precision)
    parent = trained_weights(dense, recipe, corpus, cache, progress)
    pattern, choices = pattern_of(candidate.sparsity)

    def prune() -> dict[str, np.ndarray]:
        known = moments(dense, parent, recipe, corpus) if pattern.needs_moments(choices) else {}
        return pattern.prune(parent, dense, choices, known)

    coarse = few_bits(shape, precision)
    if recipe.recovery_steps and (candidate.sparsity.get("pattern", "dense") != "dense" or coarse.rules):
        what = f"{dense!r} {candidate.sparsity!r} {coarse.rules}"
        weights = kept(
            cache, what, recipe, corpus, lambda: recover(candidate, prune(), parent, recipe, corpus, progress)
        )
    else:
        weights = prune()
    return calibrate(shape, precision, weights, lambda pruned: moments(whole(shape), pruned, recipe, corpus))


def whole(shape: DecoderShape) -> DecoderShape:
    """The same mathematics, with matrices that are stored whole."""
    return replace(shape, compression=None)


def recover(
    candidate: Candidate, weights: Weights, parent: Weights, recipe: Recipe, corpus: Corpus, progress: Progress
) -> dict[str, np.ndarray]:
    """`weights`, pruned for a candidate, after a short training: zeros of compressed matrices stay, matrices in few
    bits are rounded as they will be stored, and the loss is in part the divergence from the distribution of `parent`,
    the model before pruning (Hinton et al. 2015, arXiv:1503.02531).
    """
    dense, shape = axes.dense_shape(candidate), axes.served_shape(candidate)
    teacher = plain_decoder(dense)
    teacher_params = {path: jnp.asarray(array) for path, array in pack(teacher, parent).items()}
    coarse = few_bits(shape, Precision.of(candidate.precision))
    model = Decoder(whole(shape), schedule=Schedule(layers="scan" if scannable(shape, coarse) else "unroll"))
    start = pack(model, weights)
    as_served = simulation(model, shape, coarse, start)

    def loss(params: Params, inputs: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        logits = bind(model, as_served(params)).score(inputs)
        own = next_byte_loss(logits, labels, weights)
        if not recipe.distillation:
            return own
        wanted = jax.nn.log_softmax(jax.lax.stop_gradient(bind(teacher, teacher_params).score(inputs)))
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits)), axis=-1)
        divergence = jnp.sum(divergence * weights) / jnp.sum(weights)
        return recipe.distillation * divergence + (1 - recipe.distillation) * own

    params = descend(
        loss,
        start,
        recipe,
        recipe.recovery_steps,
        recipe.recovery_rate,
        corpus,
        lambda text, part: progress(f"recovering, {text}", part),
    )
    recovered = {path: array.astype(np.float32) for path, array in unpack(model, params).items()}
    for path in shape.linears():
        if shape.compression_of(path) is not None:
            recovered[path] *= weights[path] != 0
    return recovered


def simulation(
    model: Decoder, shape: DecoderShape, coarse: Precision, start: Params
) -> Callable[[Params], dict[str, jax.Array]]:
    """A function from the parameters of `model`, whose matrices are whole and in float32, to what is served of them,
    stored as `shape` and `coarse` say: zeros that compressed matrices have in `start` stay, and matrices in coarse
    formats are rounded, straight through which gradients pass.
    """
    storages = {_stored_path(model, path): stored_as(shape, coarse, path) for path in shape.linears()}
    masks = {path: start[path] != 0 for path, storage in storages.items() if storage.compression is not None}
    rounded = {
        path: _rounding(storage, start[path]) for path, storage in storages.items() if storage.format != coarse.weights
    }

    def as_served(params: Params) -> dict[str, jax.Array]:
        params = dict(params)
        for path, mask in masks.items():
            params[path] = params[path] * mask
        for path, rounding in rounded.items():
            params[path] = straight_through(params[path], rounding(params[path]))
        return params

    return as_served


def _rounding(storage: MatrixStorage, start: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """A function from a matrix [..., in, out] to what is read back from where it is stored; of a compressed one, the
    weights stay that `start` [..., in, out] has."""
    form, compression = storage.form, storage.compression

    def one(matrix: jax.Array, *places: jax.Array) -> jax.Array:
        if compression is None:
            return form.dequantize(form.pack(matrix, "in_out"), "in_out", matrix.dtype)
        rows, indices = places
        values = jnp.take_along_axis(matrix, rows - 1, axis=0) * (rows > 0)
        again = form.dequantize(form.pack(values, "in_out"), "in_out", matrix.dtype)
        return compression.dense(again, indices, len(matrix), "in_out")

    places = () if compression is None else _places(compression, start)
    return lambda matrix: jax.vmap(one)(matrix.reshape(-1, *matrix.shape[-2:]), *places).reshape(matrix.shape)


def _places(compression: Compression, start: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The row of each weight of `start` [..., in, out] that is stored, counted from 1 and 0 for one that is zero, and
    the indices, both stacked for all the matrices."""
    rows = np.arange(1, start.shape[-2] + 1, dtype=np.int32)[:, None]
    pairs = [compression.compress((matrix != 0) * rows, "in_out") for matrix in _matrices(start)]
    return jnp.stack([rows for rows, _ in pairs]), jnp.stack([indices for _, indices in pairs])


def calibrate(
    shape: DecoderShape, precision: Precision, weights: Weights, observe: Callable[[Weights], Weights]
) -> Served:
    """Choose what is stored of `weights` by the precision's calibration; `observe` gives the moments of weights.

    AWQ scales the inputs that come from a norm, whose own scales take up the inverse. GPTQ and the search for the least
    squared error are for each matrix alone; GPTQ leaves the embedding out, whose columns are also read one by one and
    whose errors there no other column can make up for. A matrix whose format leaves nothing to choose stays as it is.

    Raises:
        Rejected: moments are not finite, or a format names a calibration that it cannot have.
    """
    method = precision.calibration
    chosen = {
        path: stored_as(shape, precision, path)
        for path in shape.linears()
        if method in FORMATS[precision.weight_format(path)].calibrations and (method, path) != ("gptq", EMBEDDING)
    }
    match method:
        case "mse":
            return _by_mse(chosen, weights)
        case "gptq":
            return _by_gptq(chosen, weights, observe(weights))
        case "awq":
            return _by_awq(chosen, weights, observe(weights), shape)
        case _:
            return Served(weights, {})


def _by_mse(chosen: Mapping[str, MatrixStorage], weights: Weights) -> Served:
    scales = {}
    for path, storage in chosen.items():
        scales[path] = np.vectorize(partial(mse_scale, storage), signature="(i,o)->(g,o)")(weights[path])
    return Served(weights, scales)


def _by_gptq(chosen: Mapping[str, MatrixStorage], weights: Weights, known: Weights) -> Served:
    rounded, scales = dict(weights), {}
    for path, storage in chosen.items():
        each = np.vectorize(partial(gptq, storage), signature="(i,o),(i,i)->(i,o),(g,o)")
        rounded[path], scales[path] = each(weights[path], known[path])
    return Served(rounded, scales)


def _by_awq(chosen: Mapping[str, MatrixStorage], weights: Weights, known: Weights, shape: DecoderShape) -> Served:
    """For each normalised input, the rows of the matrices that read it multiplied, and the norm's scales divided."""
    scaled = dict(weights)
    for index, layer in enumerate(shape.layers):
        for block, one in layer.blocks():
            paths = [f"layers.{index}.{block}.{name}" for name in one.reads_norm]
            readers = [
                (chosen[path], matrix, moment)
                for path in paths
                if path in chosen
                for matrix, moment in zip(_matrices(weights[path]), _matrices(known[path]), strict=True)
            ]
            if not readers:
                continue
            factors = awq_scales(readers)
            for path in paths:
                scaled[path] = (weights[path] * factors[:, None]).astype(np.float32)
            norm = f"layers.{index}.{block}_norm"
            scaled[norm] = (weights[norm] / factors).astype(np.float32)
    return Served(scaled, {})


def _matrices(stack: np.ndarray) -> np.ndarray:
    """[..., in, out] as [N, in, out]."""
    return stack.reshape(-1, *stack.shape[-2:])


def few_bits(shape: DecoderShape, precision: Precision) -> Precision:
    """The formats of the matrices that are stored in few bits a weight, indices apart; of all else, float32."""
    rules = []
    for path, (*_, rows, columns) in shape.linears().items():
        storage = stored_as(shape, precision, path)
        stored = (storage.stored_rows(rows), columns)
        if replace(storage, compression=None).bits(stored) < _COARSE_BITS * math.prod(stored):
            rules.append(f"{path}={storage.format}")
    return Precision(rules=tuple(rules))


def _stored_path(model: Decoder, path: str) -> str:
    """Where a float32 `model` keeps the matrix at `path`."""
    if model.scanned and path.startswith("layers."):
        return "layers." + path.split(".", 2)[2] + ".values"
    return f"{path}.values"
