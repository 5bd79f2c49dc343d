"""The learned model of operations on GPUs: a network gives what any chip would take, few measurements adapt it to one.

A small ensemble of networks, shared by all chips, gives how far an operation is from its roofline, from sizes and from
ratios of the chip's own times, bytes and multiprocessors (`tables.describe`); so it reads from one chip what holds for
another. What a chip does differently is the `transfer` posterior, whose prior is learnt by leaving out one family of
chips after the other.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cosearch.latency.tables import Description, GPUChip, Measured, Operations, describe
from cosearch.latency.transfer import Function, Linear, Prior, Smooth

VERSION = 1
"""Of the features and networks: weights of another version are refused."""
_WIDTH, _LAYERS, _MEMBERS = 96, 2, 3
STEPS = 3000
_BATCH, _RATE, _DECAY = 1024, 3e-3, 1e-3
_EXAMPLES = 65_536
"""That each member is trained on: drawn with replacement, as many of each family of chips."""
_ROUND = 0.01
"""Errors of a logarithm smaller than this count squared, others as they are: medians, which relative errors ask for."""
_LENGTHS = {"wide": 4.0, "narrow": 0.5}
"""Octaves over which smooth differences between chips change."""
_LEARNT_ROWS = 1500

Progress = Callable[[str, float], None]


class Residual(nnx.Module):
    """The logarithm of latency over roofline, [n] of standardised features [n, f]."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        sizes = [features, *[_WIDTH] * _LAYERS]
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.out = nnx.Linear(_WIDTH, 1, kernel_init=nnx.initializers.normal(0.03), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = jax.nn.gelu(layer(x))
        return self.out(x)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(features: int, steps: int, key: jax.Array, x: jax.Array, y: jax.Array) -> nnx.State:
    start, order = jax.random.split(key)
    graph, state = nnx.split(Residual(features, nnx.Rngs(start)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(_RATE, steps), weight_decay=_DECAY)

    def loss(state: nnx.State, key: jax.Array) -> jax.Array:
        drawn = jax.random.randint(key, (_BATCH,), 0, len(x))
        error = nnx.merge(graph, state)(x[drawn]) - y[drawn]
        return jnp.mean(jnp.sqrt(error**2 + _ROUND**2))

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        state, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(state, key), moments, state)
        return (optax.apply_updates(state, updates), moments), None

    keys = jax.random.split(order, steps)
    (state, _), _ = jax.lax.scan(step, (state, optimizer.init(state)), keys)
    return state


@dataclass(frozen=True)
class Network:
    """An ensemble of `Residual`s, by the leaves of their states, and the `bounds` of features [2, f] and their mean
    and deviation [2, f] over what they were trained on."""

    members: tuple[tuple[np.ndarray, ...], ...]
    bounds: np.ndarray
    standard: np.ndarray

    @classmethod
    def train(
        cls, measured: Sequence[Measured], families: Mapping[str, str], seed: int = 0, steps: int = STEPS
    ) -> "Network":
        """Learn from tables; each family of chips counts as much as any other."""
        descriptions = [describe(one.operations, one.chip) for one in measured]
        x = np.concatenate([one.features for one in descriptions])
        y = np.concatenate(
            [np.log(one.latency_s / own.roofline_s) for one, own in zip(measured, descriptions, strict=True)]
        )
        family = np.concatenate([np.full(len(one.latency_s), families[one.chip.name]) for one in measured])
        names, counts = np.unique(family, return_counts=True)
        weights = (1 / counts)[np.searchsorted(names, family)]
        bounds, standard = np.stack([x.min(0), x.max(0)]), np.stack([x.mean(0), x.std(0) + 1e-6])
        x = ((x - standard[0]) / standard[1]).astype(np.float32)
        members = []
        for member in range(_MEMBERS):
            rng = np.random.default_rng((seed, member))
            drawn = rng.choice(len(x), _EXAMPLES, p=weights / weights.sum())
            key = jax.random.key(int(rng.integers(2**31)))
            state = _train(x.shape[1], steps, key, jnp.asarray(x[drawn]), jnp.asarray(y[drawn], jnp.float32))
            members.append(tuple(np.asarray(leaf) for leaf in jax.tree.leaves(state)))
        return cls(tuple(members), bounds, standard)

    def __call__(self, description: Description) -> np.ndarray:
        """The mean of the members [n]; features outside the range count as its ends."""
        x = (np.clip(description.features, *self.bounds) - self.standard[0]) / self.standard[1]
        count, width = x.shape
        # Of few sizes, for each of which it is compiled.
        padded = np.zeros((1 << max(count - 1, 1).bit_length(), width), np.float32)
        padded[:count] = x
        graph, state = _structure(width)
        found = [_apply(graph, jax.tree.unflatten(state, map(jnp.asarray, member)), padded) for member in self.members]
        return np.mean([np.asarray(one, float) for one in found], axis=0)[:count]

    def outside(self, description: Description) -> np.ndarray:
        """How far each operation [n] is outside of what was learnt from: of its features that do not depend on the
        chip, the most that one is beyond the range, in parts of the range."""
        own = slice(None, description.relative)
        low, high = self.bounds[0, own], self.bounds[1, own]
        x = description.features[:, own]
        beyond = np.maximum(low - x, x - high) / np.maximum(high - low, 1.0)
        return np.maximum(beyond.max(axis=1), 0.0)


@functools.cache
def _structure(features: int) -> tuple[Any, Any]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Residual(features, nnx.Rngs(0))))
    return graph, jax.tree.structure(state)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, state: nnx.State, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(x)


def function(network: Network, operations: Operations, chip: GPUChip) -> Function:
    """The logarithm of the latency of operations on a chip that was not measured."""
    one = describe(operations, chip)
    residual = network(one)
    blocks = (
        Linear("scale", np.ones((len(operations), 1))),
        Linear("regimes", one.shares),
        Linear("kernels", np.einsum("ns,nk->nsk", one.shares, one.kernels).reshape(len(operations), -1)),
        Linear("network", residual[:, None]),
        *(Smooth(name, one.octaves / length) for name, length in _LENGTHS.items()),
    )
    return Function(np.log(one.roofline_s) + residual, blocks)


@dataclass(frozen=True)
class OperationModel:
    """What operations of one kind take on any GPU: `network`, and the `prior` of how a chip differs from it.

    `fingerprint` is of the data that it was trained on.
    """

    kind: str
    network: Network
    prior: Prior
    fingerprint: str

    def function(self, operations: Operations, chip: GPUChip) -> Function:
        """The logarithm of the latency of operations on a chip before it is measured."""
        return function(self.network, operations, chip)


@dataclass
class Training:
    """Operation models from tables of one kind, for any families of chips left out; each network is trained once.

    `families` are of all chips in the tables; what is of one family is never learnt from when one of it is predicted.
    """

    measured: Sequence[Measured]
    families: Mapping[str, str]
    shots: Sequence[int]
    seed: int = 0
    steps: int = STEPS
    progress: Progress = lambda what, part: None

    def __post_init__(self) -> None:
        self._networks: dict[frozenset[str], Network] = {}

    def network(self, without: Iterable[str] = ()) -> Network | None:
        """The network of all families but these; None where there is none left."""
        left_out = frozenset(without)
        rest = [one for one in self.measured if self.families[one.chip.name] not in left_out]
        if not rest:
            return None
        if left_out not in self._networks:
            self._networks[left_out] = Network.train(rest, self.families, self.seed, self.steps)
        return self._networks[left_out]

    def model(self, without: Iterable[str] = ()) -> OperationModel:
        """The model of all families but these. What chips differ in is learnt by predicting each of the rest from the
        others."""
        left_out = frozenset(without)
        rest = [one for one in self.measured if self.families[one.chip.name] not in left_out]
        network = self.network(left_out)
        assert network is not None, "there must be another family"
        examples = []
        for index, one in enumerate(rest):
            self.progress(f"leaving out {one.chip.name}", index / len(rest))
            others = self.network({*left_out, self.families[one.chip.name]})
            if others is None:
                continue
            rng = np.random.default_rng((self.seed, index))
            rows = rng.choice(len(one.latency_s), min(_LEARNT_ROWS, len(one.latency_s)), replace=False)
            own = function(others, one.operations[rows], one.chip)
            examples.append((own, np.arange(len(rows)), np.log(one.latency_s[rows])))
        prior = Prior.fit(examples, self.shots, seed=self.seed)
        return OperationModel(rest[0].operations.kind, network, prior, fingerprint(rest))


def fingerprint(measured: Sequence[Measured]) -> str:
    """Of tables: their systems, versions and figures."""
    digest = hashlib.sha256()
    for one in measured:
        digest.update(f"{one.chip} {one.version} {one.operations.kind}".encode())
        for name in sorted(one.operations.columns):
            column = one.operations.columns[name]
            digest.update(column.astype("S").tobytes() if column.dtype == object else column.tobytes())
        digest.update(one.latency_s.tobytes())
    return digest.hexdigest()[:16]
