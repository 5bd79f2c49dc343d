"""Training of the network that all operations share, end to end: through the sum over a candidate's operations."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cosearch.core.target import Target
from cosearch.latency.batch import Operations
from cosearch.latency.network import MOST, PROCESSOR, SIZES, RateNetwork, scales, words_of
from cosearch.latency.operations import ROLES

_BATCH, _RATE = 256, 0.005
_OUTLIER = 0.2
"""Errors of the logarithm beyond this count linearly: some measurements were disturbed."""
_SHRUNK = ("embed", "size", "out", "direct", "context", "knobs", "knobs_out")


@dataclass(frozen=True)
class Examples:
    """Candidates, `rows` [n, knobs] of an encoding, and the `seconds` [n] that one run of each took on a processor."""

    rows: np.ndarray
    seconds: np.ndarray
    target: Target
    processor: str


def train(
    operations: Operations,
    examples: Sequence[Examples],
    hidden: int = 64,
    hidden_knobs: int = 32,
    members: int = 3,
    decay: float = 1.0,
    steps: int = 16_000,
    seed: int = 0,
) -> RateNetwork:
    """Fit to what was measured on some processors."""
    rows = np.concatenate([one.rows for one in examples])
    batch, features = operations(rows), operations.encoding.features(rows)
    processors = sorted({PROCESSOR + one.processor for one in examples})
    entries = [entry.tokens for entry in operations.entries.all]
    storages = [storage.tokens for storage in operations.storages.all]
    words = {word for each in (*entries, *storages, *operations.contexts) for word in each}
    tokens, knobs = (*sorted(words), *processors), (*operations.encoding.words, *processors)
    entry, storage, sizes, context = words_of(operations, tokens)
    part = np.repeat(np.arange(len(examples)), [len(one.rows) for one in examples])
    place = np.array([[PROCESSOR + one.processor == name for name in processors] for one in examples], float)[part]
    contexts = context[batch.context]
    contexts[:, len(words) :] = place
    size = batch.size * np.array([scales(one.target) for one in examples])[part, None]
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[deviation == 0] = np.inf  # what never differed teaches nothing
    chosen = np.hstack([(features - mean) / deviation, place])
    measured = np.log(np.concatenate([one.seconds for one in examples]))
    role = np.array([ROLES.index(one.role) for one in operations.entries.all])
    numbers = [jnp.asarray(one, jnp.int32) for one in (batch.entry, batch.storage, role[batch.entry])]
    data = (*numbers, *(jnp.asarray(one, jnp.float32) for one in (contexts, size, chosen, measured)))
    tables = tuple(jnp.asarray(one, jnp.float32) for one in (entry, storage, sizes))
    found = []
    for index in range(members):
        weights = _fit(jax.random.key(seed + index), tables, data, (hidden, hidden_knobs), decay, steps)
        member = {name: np.asarray(one) for name, one in weights.items()}
        free = len(mean)
        member["knobs_bias"] = member["knobs_bias"] - mean / deviation @ member["knobs"][:free]
        scaled = member["knobs"][:free] / deviation[:, None]
        found.append(member | {"knobs": np.vstack([scaled, member["knobs"][free:]])})
    return RateNetwork(tokens, knobs, tuple(found))


def _log_seconds(
    weights: Any,
    tables: tuple[jax.Array, ...],
    entry: jax.Array,
    storage: jax.Array,
    role: jax.Array,
    context: jax.Array,
    size: jax.Array,
    knobs: jax.Array,
) -> jax.Array:
    entries, storages, sizes = tables
    inner = entries @ weights["embed"] + sizes @ weights["size"] + weights["bias"]
    hidden = jnp.tanh(inner[entry] + (storages @ weights["embed"])[storage])
    outer = (entries @ weights["direct"])[entry] + (storages @ weights["direct"])[storage]
    rates = jnp.clip(hidden @ weights["out"] + outer + weights["base"], -MOST, MOST)
    by_role = jnp.einsum("nt,trq->nrq", context, weights["context"])
    rates += jnp.take_along_axis(by_role, role[..., None], axis=1)
    summed = jnp.log((size * jnp.exp(rates)).sum(axis=(1, 2)) + 1e-12)
    return summed + jnp.tanh(knobs @ weights["knobs"] + weights["knobs_bias"]) @ weights["knobs_out"]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _fit(
    key: jax.Array,
    tables: tuple[jax.Array, ...],
    data: tuple[jax.Array, ...],
    hidden: tuple[int, int],
    decay: float,
    steps: int,
) -> Any:
    words, count = tables[0].shape[1], len(data[0])
    draw, *keys = jax.random.split(key, 5)
    weights = {
        "embed": 0.3 * jax.random.normal(keys[0], (words, hidden[0])),
        "size": 0.3 * jax.random.normal(keys[1], (SIZES, hidden[0])),
        "bias": jnp.zeros(hidden[0]),
        "out": 0.1 * jax.random.normal(keys[2], (hidden[0], 4)),
        "direct": jnp.zeros((words, 4)),
        "context": jnp.zeros((words, len(ROLES), 4)),
        "base": jnp.array([0.0, 2.0, 2.0, 0.0]),
        "knobs": 0.1 * jax.random.normal(keys[3], (data[-2].shape[1], hidden[1])),
        "knobs_bias": jnp.zeros(hidden[1]),
        "knobs_out": jnp.zeros(hidden[1]),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, steps))

    def loss(weights: Any, batch: list[jax.Array]) -> jax.Array:
        *inputs, wanted = batch
        errors = optax.huber_loss(_log_seconds(weights, tables, *inputs), wanted, delta=_OUTLIER).mean()
        return errors + 0.5 * decay / count * sum(jnp.square(weights[name]).sum() for name in _SHRUNK)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        weights, state = carry
        chosen = jax.random.choice(key, count, (min(_BATCH, count),))
        updates, state = optimizer.update(jax.grad(loss)(weights, [one[chosen] for one in data]), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), jax.random.split(draw, steps))
    return weights
