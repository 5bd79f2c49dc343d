"""Which weights matter least: what the patterns prune by, of one trained matrix and the second moment of its inputs.

`magnitude` needs no data. `wanda` (Sun et al. 2023, arXiv:2306.11695) weighs each weight by the size of its input.
`sparsegpt` (Frantar and Alistarh 2023, arXiv:2301.00774) also changes the weights that stay, to make up for those
that go. A matrix that saw no input at all (an expert that no token went to) goes by magnitude.
"""

from collections.abc import Mapping

import numpy as np

from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, choice
from cosearch.precision.calibration import error_shares

CRITERION: Mapping[str, Knob] = {
    "criterion": choice("magnitude", lambda: ("magnitude", "wanda", "sparsegpt")),
}
"""The knob of every pattern that chooses among weights."""


def reads_moments(choices: Mapping[str, Value]) -> bool:
    """Whether the chosen criterion is one that calibration data are needed for."""
    return choices["criterion"] != "magnitude"


def refuse_sparsegpt(choices: Mapping[str, Value], units: str) -> None:
    """For patterns that take whole `units` away.

    Raises:
        Rejected: the criterion is one that takes single weights.
    """
    if choices["criterion"] == "sparsegpt":
        raise Rejected(f"criterion 'sparsegpt' takes single weights away, not {units}; take 'wanda'")


def saliency(weights: np.ndarray, moment: np.ndarray | None) -> np.ndarray:
    """How much is lost with each weight, [in, out] in float64: its square, by the mean square of its input.

    It is the square of what the papers compare, |w| and |w| * norm(x): that orders weights alike, and its sum over
    several weights estimates the squared error of an output without them. `moment` [in, in] is None for the magnitude.
    """
    squares = np.square(weights, dtype=np.float64)
    if moment is None or not moment.any():
        return squares
    return squares * np.diagonal(moment)[:, None]


def largest(scores: np.ndarray, kept: int) -> np.ndarray:
    """Where the `kept` largest along the axis before the last are, ascending; of equal ones, the first.

    NaN counts as the largest, so that a format gets to see and refuse it.
    """
    order = np.argsort(-np.where(np.isnan(scores), np.inf, scores), axis=-2, kind="stable")
    return np.sort(order[..., :kept, :], axis=-2)


def sparsegpt(weights: np.ndarray, moment: np.ndarray, kept: int, group: int) -> np.ndarray:
    """The matrix [in, out] with `kept` of every `group` consecutive inputs of each output, changed to make up for the
    others, which are zero.

    Group by group, the weights stay that have the largest w^2 / U_jj^2, U being `error_shares`, and the error is spread
    over the inputs that are still to come.

    Raises:
        Rejected: the moment is not finite.
    """
    upper = error_shares(moment)
    diagonal = np.diagonal(upper)[:, None]
    left = weights.astype(np.float64)
    for start in range(0, len(left), group):
        rows = slice(start, start + group)
        stays = np.zeros(left[rows].shape, bool)
        np.put_along_axis(stays, largest(np.square(left[rows] / diagonal[rows]), kept), True, axis=0)
        errors = np.zeros((group, left.shape[1]))
        for offset in range(group):
            row = start + offset
            errors[offset] = np.where(stays[offset], 0, left[row]) / upper[row, row]
            left[row : rows.stop] -= np.outer(upper[row, row : rows.stop], errors[offset])
        left[rows] = np.where(stays, left[rows], 0)  # exactly: the subtraction above may leave a rounding error
        left[rows.stop :] -= upper[rows, rows.stop :].T @ errors
    return left.astype(weights.dtype)
