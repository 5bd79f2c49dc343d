"""Pareto dominance and hypervolume, over losses (lower is better), by moocore."""

import moocore
import numpy as np

from cosearch.core.problem import LOSS_LIMIT


def front(losses: np.ndarray) -> np.ndarray:
    """The indices of the rows of `losses` [n, objectives] that no other row dominates, by first loss.

    Of equal rows only the first counts.
    """
    if len(losses) == 0:
        return np.zeros(0, dtype=int)
    indices = np.flatnonzero(moocore.is_nondominated(losses))
    return indices[np.lexsort(losses[indices].T[::-1])]


def hypervolume(losses: np.ndarray, limit: float = LOSS_LIMIT) -> float:
    """The volume that `losses` [n, objectives] dominate below `limit` in every objective."""
    inside = losses[(losses < limit).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=np.full(losses.shape[1], limit))) if len(inside) else 0.0


def knee(losses: np.ndarray) -> int:
    """The row that trades best: nearest to the best of every loss, each scaled to its range."""
    low, high = losses.min(axis=0), losses.max(axis=0)
    scaled = (losses - low) / np.where(high > low, high - low, 1.0)
    return int(np.linalg.norm(scaled, axis=1).argmin())
