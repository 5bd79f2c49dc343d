"""Training of the network that all operations share, end to end: through the sum over a candidate's operations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cosearch.core.target import Target
from cosearch.latency.batch import Batch, Operations
from cosearch.latency.network import MOST, SIZES, RateNetwork, scales, words_of
from cosearch.latency.operations import ROLES

_STEPS, _RATE = 1200, 0.01
_OUTLIER = 0.2
"""Errors of the logarithm beyond this count linearly: some measurements were disturbed."""


def train(
    operations: Operations,
    batch: Batch,
    target: Target,
    seconds: np.ndarray,
    hidden: int = 32,
    members: int = 3,
    decay: float = 0.7,
    seed: int = 0,
) -> RateNetwork:
    """Fit to the measured `seconds` [n] of one run of each candidate."""
    entries = [entry.tokens for entry in operations.entries.all]
    storages = [storage.tokens for storage in operations.storages.all]
    tokens = tuple(sorted({word for each in (*entries, *storages, *operations.contexts) for word in each}))
    entry, storage, sizes, context = words_of(operations, tokens)
    role = np.array([ROLES.index(one.role) for one in operations.entries.all])
    words = np.maximum(entry[batch.entry], storage[batch.storage])
    measured = np.log(seconds).astype(np.float32)
    size = batch.size * scales(target)
    examples = (words, sizes[batch.entry], role[batch.entry], context[batch.context], size, measured)
    found = [
        _fit(jax.random.key(seed + index), tuple(map(jnp.asarray, examples)), hidden, decay) for index in range(members)
    ]
    return RateNetwork(tokens, tuple({name: np.asarray(one) for name, one in member.items()} for member in found))


def _log_seconds(
    weights: Any, words: jax.Array, sizes: jax.Array, role: jax.Array, context: jax.Array, size: jax.Array
) -> jax.Array:
    inner = jnp.tanh(words @ weights["embed"] + sizes @ weights["size"] + weights["bias"])
    rates = jnp.clip(inner @ weights["out"] + words @ weights["direct"] + weights["base"], -MOST, MOST)
    by_role = jnp.einsum("nt,trq->nrq", context, weights["context"])
    rates += jnp.take_along_axis(by_role, role[..., None], axis=1)
    return jnp.log((size * jnp.exp(rates)).sum(axis=(1, 2)) + 1e-12)


@functools.partial(jax.jit, static_argnums=2)
def _fit(key: jax.Array, examples: tuple[jax.Array, ...], hidden: int, decay: float) -> Any:
    words, sizes, *rest, wanted = examples
    keys = jax.random.split(key, 3)
    weights = {
        "embed": 0.3 * jax.random.normal(keys[0], (words.shape[-1], hidden)),
        "size": 0.3 * jax.random.normal(keys[1], (SIZES, hidden)),
        "bias": jnp.zeros(hidden),
        "out": 0.1 * jax.random.normal(keys[2], (hidden, 4)),
        "direct": jnp.zeros((words.shape[-1], 4)),
        "context": jnp.zeros((words.shape[-1], len(ROLES), 4)),
        "base": jnp.array([0.0, 2.0, 2.0, 0.0]),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    def loss(weights: Any) -> jax.Array:
        errors = _log_seconds(weights, words, sizes, *rest) - wanted
        shrunk = sum(jnp.square(weights[name]).sum() for name in ("embed", "size", "out", "direct", "context"))
        return optax.huber_loss(errors, delta=_OUTLIER).sum() + 0.5 * decay * shrunk

    def step(carry: Any, _: None) -> tuple[Any, None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), None, length=_STEPS)
    return weights
