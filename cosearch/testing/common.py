"""What the contracts share: requirements that name the rule and the numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NONE: Mapping[str, Any] = {}


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise AssertionError(rule)


def close(found: Any, expected: Any, tolerance: float, rule: str) -> None:
    """Within `tolerance` of the largest magnitude that is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    require(found.shape == expected.shape, f"{rule}: shapes {found.shape} and {expected.shape}")
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    require(error <= tolerance, f"{rule}: relative error {error:.3g}, allowed {tolerance:.3g}")


def within(off: np.ndarray, bound: np.ndarray, rule: str) -> None:
    """Each error within its own bound."""
    worst = float(np.max(off / np.where(bound > 0, bound, 1e-300)))
    require(bool((off <= bound).all()), f"{rule}; off by {worst:.3g} bounds")


def same_arrays(what: str, spec: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    said = {path: (tuple(one.shape), jnp.dtype(one.dtype).name) for path, one in spec.items()}
    made = {path: (tuple(one.shape), jnp.dtype(one.dtype).name) for path, one in arrays.items()}
    require(said == made, f"{what} is as its spec says: {difference(said, made)}")


def difference(said: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*said, *made}) if said.get(name) != made.get(name)]
    return "; ".join(f"{name} is said to be {said.get(name)} and is {made.get(name)}" for name in names[:3])


def flat(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
