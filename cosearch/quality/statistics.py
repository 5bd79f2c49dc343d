"""What a trained model's matrices are multiplied with, on calibration text: the second moments of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture.decoder import Decoder, Weights, bind, pack
from cosearch.architecture.shape import DecoderShape
from cosearch.precision import Precision
from cosearch.quality import Recipe, recall
from cosearch.quality.corpus import Corpus
from cosearch.schedule import Schedule

_ROWS = 16
"""Rows of text, and half as many of the recall task: 6,000 tokens of 256 tell the moments of a few hundred inputs."""


def moments(shape: DecoderShape, weights: Weights, recipe: Recipe, corpus: Corpus) -> dict[str, np.ndarray]:
    """The mean of each matrix's inputs times themselves: path to [in, in], or [E, in, in] for a stack, in float64.

    The text is of the training part of the corpus, so nothing of what is held out is seen.
    """
    model = Decoder(shape, Precision(), Schedule(layers="unroll"), observed=True)
    rng = np.random.default_rng(recipe.seed + 2)
    starts = rng.integers(len(corpus.train) - recipe.length, size=_ROWS)
    text = np.stack([corpus.train[start : start + recipe.length] for start in starts]).astype(np.int32)
    tokens = np.concatenate([text, recall.rows(rng, _ROWS // 2, recipe.length, corpus.train).inputs])

    @jax.jit
    def observe(params: dict[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
        bound = bind(model, params)
        bound.score(tokens)
        flat = nnx.to_flat_state(nnx.state(bound, nnx.Intermediate))
        return {".".join(map(str, keys[:-1])).replace(".parts", ""): one.get_value() for keys, one in flat}

    packed = {path: jnp.asarray(array) for path, array in pack(model, weights).items()}
    return {path: np.asarray(array, np.float64) for path, array in observe(packed, tokens).items()}
