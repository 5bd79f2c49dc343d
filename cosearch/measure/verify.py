"""Does a compiled candidate compute what its architecture says? Compared with float64, position by position.

The yardstick is the candidate's own format: the same weights and formats run the plain way (teacher forcing, no
cache, no options) have some error against float64. Over all positions a candidate may have twice its root mean square,
at the worst position four times its largest (a maximum over few positions says less), and a floor for the order of
float32 sums. So bfloat16 is judged as bfloat16 and float32 as float32, and a lowering that quietly drops precision
fails.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from cosearch.architecture.decoder import Decoder, Params, bind, pack, plain_decoder, random_weights, unpack
from cosearch.architecture.shape import DecoderShape
from cosearch.core.errors import Rejected
from cosearch.precision import Precision

_FLOOR = 2e-5
MOST_TYPICAL, MOST_WORST = 2.0, 4.0
"""How often its format's own error a candidate or a kernel may have, over all positions and at the worst."""
_SHARPER = 3.0
"""Random queries are made so much larger: flat attention would hide a wrong mask."""

_EXACT = Precision("float64", "float64", "float64")


@dataclass(frozen=True)
class Verification:
    """Errors relative to the size of the float64 logits: `typical` is their root mean square over the positions,
    `worst` the largest, each with what was allowed."""

    positions: int
    typical: float
    typical_allowed: float
    worst: float
    worst_allowed: float
    worst_position: int

    @property
    def ratio(self) -> float:
        """The error as a part of what is allowed; above 1 the result is wrong."""
        return max(self.typical / self.typical_allowed, self.worst / self.worst_allowed)


def sharp_weights(shape: DecoderShape, seed: int) -> dict[str, np.ndarray]:
    """Random weights whose attention is sharp enough to show what it attends to."""
    weights = random_weights(shape, seed)
    return {path: array * np.float32(_SHARPER if path.endswith(".query") else 1) for path, array in weights.items()}


class Reference:
    """The float64 logits of a model's packed weights, and how far the format's own plain run is from them."""

    def __init__(self, plain: Decoder, packed: Params, tokens: np.ndarray) -> None:
        _, own_score = _scored(plain.shape, plain.precision)
        own = np.asarray(own_score(packed, tokens), np.float64)
        exact_model, exact_score = _scored(replace(plain.shape, compression=None), _EXACT)
        with jax.enable_x64(True):
            self.logits = np.asarray(exact_score(pack(exact_model, unpack(plain, packed)), tokens))
        if self.logits.dtype != np.float64:
            raise RuntimeError("the float64 reference was not computed in float64")
        self.tokens = tokens
        self._format_errors = relative_errors(own, self.logits)

    def compare(self, logits: np.ndarray) -> Verification:
        """Judge the logits [batch, positions, 256] that a compiled candidate gave after the last of `tokens`.

        Raises:
            Rejected: they are not finite, or too far from the reference.
        """
        exact = self.logits[:, -logits.shape[1] :]
        if logits.shape != exact.shape:
            raise Rejected(f"wrong result: logits of shape {logits.shape}, not {exact.shape}")
        errors = relative_errors(logits.astype(np.float64), exact)
        first = self.logits.shape[1] - errors.shape[1]
        position = first + int(np.argmax(np.where(np.isfinite(errors), errors, np.inf).max(axis=0)))
        if not np.isfinite(errors).all():
            raise Rejected(f"wrong result: the logits at position {position} are not finite")
        # A format's error differs by position, and few positions can all be among the worse.
        own = self._format_errors
        typical = max(root_mean_square(own), root_mean_square(own[:, -errors.shape[1] :]))
        result = Verification(
            positions=errors.shape[1],
            typical=root_mean_square(errors),
            typical_allowed=MOST_TYPICAL * typical + _FLOOR,
            worst=float(errors.max()),
            worst_allowed=MOST_WORST * float(own.max()) + _FLOOR,
            worst_position=position,
        )
        if result.ratio > 1:
            raise Rejected(
                f"wrong result: the logits are {result.typical:.2e} from float64, and {result.worst:.2e} at position "
                f"{position}; its formats allow {result.typical_allowed:.2e} and {result.worst_allowed:.2e}"
            )
        return result


def relative_errors(logits: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[batch, positions]: the distance of the logits over the size of the exact ones."""
    return np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


def digest(arrays: Any) -> bytes:
    """Names the contents of all arrays of a tree."""
    found = hashlib.blake2b()
    for array in jax.tree.leaves(arrays):
        found.update(np.asarray(array).tobytes())
    return found.digest()


def root_mean_square(errors: np.ndarray) -> float:
    """Of all errors."""
    return float(np.sqrt(np.mean(np.square(errors))))


@functools.lru_cache(maxsize=16)
def _scored(shape: DecoderShape, precision: Precision) -> tuple[Decoder, Callable[[Params, Any], jax.Array]]:
    """The plain model of a shape and its compiled `score`; in float64 they are the same for all formats."""
    model = plain_decoder(shape, precision)

    def score(params: Mapping[str, Any], tokens: Any) -> jax.Array:
        return bind(model, params).score(tokens)

    # It runs once or twice: code that is not optimised gives the same and is there in half the time.
    return model, jax.jit(score, compiler_options={"xla_backend_optimization_level": 0})
