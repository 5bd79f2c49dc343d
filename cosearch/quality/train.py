"""Train an architecture once, from a fixed seed on fixed batches, and keep its weights for all later runs."""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon

import cosearch
from cosearch.architecture.decoder import Params, bind, pack, plain_decoder, random_weights, unpack
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import content_hash
from cosearch.core.errors import Rejected, UserError
from cosearch.core.files import new_folder, write_json
from cosearch.core.space import read_yaml
from cosearch.measure.fingerprint import fingerprint
from cosearch.quality import Recipe, recall
from cosearch.quality.corpus import Corpus

_STEPS_PER_CALL = 10
_RECALL_WEIGHT = 2.0
"""How much a recalled byte counts in the loss beside a byte of text."""


def trained_weights(
    shape: DecoderShape, recipe: Recipe, corpus: Corpus, cache: Path, progress: Callable[[str, float], None]
) -> dict[str, np.ndarray]:
    """The weights of `shape` after training, from `cache` where they are, else trained now and kept there.

    Raises:
        Rejected: the training diverged.
    """
    return kept(cache, repr(shape), recipe.unrecovered, corpus, lambda: train(shape, recipe, corpus, progress))


def kept(
    cache: Path, what: str, recipe: Recipe, corpus: Corpus, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The weights that `make` gives, from `cache` where they are; `what` names them beside recipe and corpus."""
    folder = cache / "weights" / weights_key(what, recipe, corpus)
    weights = _load(folder)
    if weights is None:
        weights = make()
        _save(folder, weights, what)
    return weights


def weights_key(what: str, recipe: Recipe, corpus: Corpus) -> str:
    """Names a training by all that its result depends on, the code included."""
    versions = fingerprint()
    return content_hash(
        {
            "what": what,
            "recipe": recipe.to_json(),
            "corpus": corpus.digest,
            "code": _code_digest(),
            "versions": {name: versions[name] for name in ("jaxlib", "flax", "optax", "numpy", "processor")},
        }
    )


def train(
    shape: DecoderShape, recipe: Recipe, corpus: Corpus, progress: Callable[[str, float], None]
) -> dict[str, np.ndarray]:
    """Weights after `recipe.steps` steps from random ones.

    Raises:
        Rejected: the loss is not finite.
    """
    model = plain_decoder(shape)

    def loss(params: Params, inputs: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        return next_byte_loss(bind(model, params).score(inputs), labels, weights)

    params = pack(model, random_weights(shape, recipe.seed))
    trained = descend(
        loss, params, recipe, recipe.steps, 1.0, corpus, lambda text, part: progress(f"training, {text}", part)
    )
    return {path: array.astype(np.float32) for path, array in unpack(model, trained).items()}


def next_byte_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean cross-entropy of `logits` [B, T, 256], in nats; each label [B, T] counts as much as its weight."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def descend(
    loss: Callable[..., jax.Array],
    params: Params,
    recipe: Recipe,
    steps: int,
    rate: float,
    corpus: Corpus,
    progress: Callable[[str, float], None],
) -> dict[str, np.ndarray]:
    """`params` after so many steps down `loss(params, inputs, labels, weights)`: Muon for the layers' matrices, Adam
    for the rest, warmed up and then decayed linearly to nothing (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers"). `rate` is relative to the recipe's learning rates.

    Raises:
        Rejected: the loss is not finite.
    """
    params = {path: jnp.asarray(array) for path, array in params.items()}
    optimizer = _optimizer(recipe, steps, rate)
    state = jax.jit(optimizer.init)(params)

    def step(carry: tuple[Params, optax.OptState], batch: tuple[jax.Array, ...]) -> tuple:
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params: Params, state: optax.OptState, batches: tuple[jax.Array, ...]) -> tuple:
        return jax.lax.scan(step, (params, state), batches)

    rng = np.random.default_rng(recipe.seed)
    for now in range(_STEPS_PER_CALL, steps + 1, _STEPS_PER_CALL):
        batches = [_batch(rng, recipe, corpus) for _ in range(_STEPS_PER_CALL)]
        stacked = tuple(np.stack([getattr(b, name) for b in batches]) for name in ("inputs", "labels", "weights"))
        (params, state), losses = run(params, state, stacked)
        if not np.isfinite(losses).all():
            raise Rejected(f"training diverged: the loss is not finite by step {now}")
        progress(f"step {now} of {steps}, {float(losses[-1]) / math.log(2):.2f} bits", now / steps)
    return dict(jax.device_get(params))


def _batch(rng: np.random.Generator, recipe: Recipe, corpus: Corpus) -> recall.Rows:
    starts = rng.integers(len(corpus.train) - recipe.length - 1, size=recipe.text_rows)
    text = np.stack([corpus.train[start : start + recipe.length + 1] for start in starts]).astype(np.int32)
    asked = recall.rows(rng, recipe.recall_rows, recipe.length, corpus.train)
    return recall.Rows(
        np.concatenate([text[:, :-1], asked.inputs]),
        np.concatenate([text[:, 1:], asked.labels]),
        np.concatenate([np.ones_like(text[:, 1:], np.float32), np.float32(_RECALL_WEIGHT) * (asked.weights > 0)]),
    )


def _optimizer(recipe: Recipe, steps: int, relative_rate: float) -> optax.GradientTransformation:
    warmup = min(recipe.warmup_steps, steps // 2)

    def rate(peak: float) -> optax.Schedule:
        rise = optax.linear_schedule(0.0, relative_rate * peak, warmup)
        fall = optax.linear_schedule(relative_rate * peak, 0.0, steps - warmup)
        return optax.join_schedules([rise, fall], [warmup])

    def matrices(params: Params) -> dict[str, MuonDimensionNumbers | None]:
        # The last two axes are the matrix; stacked layers have one before them.
        return {
            path: MuonDimensionNumbers((array.ndim - 2,), (array.ndim - 1,))
            if path.startswith("layers.") and path.endswith(".values")
            else None
            for path, array in params.items()
        }

    return muon(
        rate(recipe.matrix_rate),
        adam_learning_rate=rate(recipe.vector_rate),
        adam_b1=0.9,
        adam_b2=0.95,
        muon_weight_dimension_numbers=matrices,  # pyright: ignore[reportArgumentType]  # a function may be given
    )


def _save(folder: Path, weights: dict[str, np.ndarray], what: str) -> None:
    with new_folder(folder) as draft:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / "weights", weights)
        digests = {path: _digest(array) for path, array in weights.items()}
        write_json(draft / "record.json", {"what": what, "sha256": digests})


def _load(folder: Path) -> dict[str, np.ndarray] | None:
    """The kept weights; None where there are none, or where they are not what was kept."""
    if not (folder / "record.json").is_file():
        return None
    try:
        digests = read_yaml(folder / "record.json")["sha256"]
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore(folder.absolute() / "weights")
    except (UserError, ValueError, OSError, KeyError):
        return None  # damaged: train again
    weights = {path: np.asarray(array) for path, array in weights.items()}
    return weights if {path: _digest(array) for path, array in weights.items()} == digests else None


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@functools.cache  # of the code that is running, whatever becomes of its files
def _code_digest() -> str:
    package = Path(cosearch.__file__).parent
    files = sorted(
        path
        for part in ("architecture", "precision", "quality", "schedule", "sparsity")
        for path in (package / part).rglob("*.py")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
