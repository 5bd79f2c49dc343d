"""Random legal candidates of the full space: each builds, decodes, and gives what its own `score` gives.

The default suite draws a few; `scripts/test -m slow tests/test_full_space.py` draws 500.
"""

import functools
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture import cache as kv
from cosearch.architecture.decoder import Decoder, bind, pack, params_spec
from cosearch.core.candidate import Candidate
from cosearch.core.space import Space
from cosearch.measure.verify import sharp_weights
from cosearch.precision import Precision

_TOKENS = 5
_PLAIN = {"xla_backend_optimization_level": 0}
"""Compiled without optimisation: what is asked is whether the mathematics is right, and 500 models are compiled."""


@functools.cache
def full_space() -> Space:
    return axes.load_space("llm_decode_full", target="cpu")


def check(candidate: Candidate) -> None:
    """Steps give what `score` gives, to 1e-4 in float32.

    What is rounded on the way may fall on either side of a tie, as score and steps sum in other orders. With such
    formats everything between the roundings runs in float64, where ties do not happen, and they agree to 1e-9.
    """
    model, precision = axes.decoder(candidate), Precision.of(candidate.precision)
    caches = {precision.cache_format(index) for index in range(len(model.shape.layers))}
    rounds = not {precision.activations, precision.matmul_inputs, *caches} <= {"float32", "as_is"}
    if rounds:
        jax.eval_shape(lambda p, t: bind(model, p).score(t), params_spec(model), jnp.zeros((1, _TOKENS), jnp.int32))
        model = Decoder(model.shape, replace(precision, activations="float64"), model.schedule)
    with jax.enable_x64(rounds):
        params = pack(model, sharp_weights(model.shape, 0))
        tokens = np.random.default_rng(1).integers(0, 256, (1, _TOKENS), dtype=np.int32)
        score = np.asarray(jax.jit(lambda p, t: bind(model, p).score(t), compiler_options=_PLAIN)(params, tokens))
        step = jax.jit(lambda p, c, t, at: bind(model, p).decode_step(c, t, at), compiler_options=_PLAIN)
        cache = kv.zeros(model.cache_spec(1, 2 * _TOKENS))
        for position in range(_TOKENS):
            logits, cache = step(params, cache, tokens[:, position], np.int32(position))
            error = np.linalg.norm(logits[0] - score[0, position]) / np.linalg.norm(score[0, position])
            assert error <= (1e-9 if rounds else 1e-4), f"the step at {position} is {error:.2e} from score"


def check_drawn(index: int, seed: int) -> None:
    candidate = full_space().sample(random.Random(f"{seed} {index}"))
    try:
        check(candidate)
    except Exception as error:
        raise AssertionError(f"candidate {candidate.uid}: {candidate.point}") from error


@pytest.mark.parametrize("index", range(6))
def test_a_random_candidate_decodes_what_it_scores(index: int):
    check_drawn(index, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(500))
def test_each_of_500_random_candidates_decodes_what_it_scores(index: int):
    check_drawn(index, seed=1)
