"""Score a trained model as it will be served: packed in its formats, thinned by its pattern."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cosearch.architecture.decoder import Decoder, Params, bind
from cosearch.quality import Recipe, recall
from cosearch.quality.corpus import Corpus

_ROWS = 16


def evaluate(model: Decoder, params: Params, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Raw samples: bits per byte of each held-out window, accuracy of each recall row.

    Returns:
        {"bits_per_byte": [window, …], "recall_accuracy": [row, …]}
    """

    @jax.jit
    def score(params: Params, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = bind(model, params).score(inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(axis=1) / math.log(2), jnp.argmax(logits, axis=-1) == labels

    rng = np.random.default_rng(recipe.seed + 1)
    text = corpus.held_out
    starts = np.linspace(0, len(text) - recipe.length - 1, recipe.evaluated_windows).astype(int)
    windows = np.stack([text[start : start + recipe.length + 1] for start in starts]).astype(np.int32)
    asked = recall.rows(rng, recipe.evaluated_recalls, recipe.length, text)
    params = jax.device_put(dict(params))
    bits: list[float] = []
    for start in range(0, len(windows), _ROWS):
        rows = windows[start : start + _ROWS]
        bits += map(float, score(params, rows[:, :-1], rows[:, 1:])[0])
    right: list[float] = []
    far = recall.is_far(asked)
    for start in range(0, len(far), _ROWS):
        rows = slice(start, start + _ROWS)
        hit = np.asarray(score(params, asked.inputs[rows], asked.labels[rows])[1])
        right += (np.sum(hit & far[rows], axis=1) / far[rows].sum(axis=1)).tolist()
    return {"bits_per_byte": bits, "recall_accuracy": right}
