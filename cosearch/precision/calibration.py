"""Ways to choose scales and rounded values of one matrix by more than the largest magnitude, on the host.

Inputs enter as their second moment E[x x^T], [in, in]: with it, a matrix stored with an error E [in, out] makes a mean
squared error of trace(E^T moment E) in what it computes (`output_error`).

To add one, name it in `CALIBRATIONS` and in the `calibrations` of the formats that take it, and call it where models
are packed.
"""

from collections.abc import Sequence

import numpy as np

from cosearch.architecture.linear import MatrixStorage
from cosearch.core.errors import Rejected
from cosearch.precision.quantized import Quantized

_DAMPING = 0.01
"""Of the mean of a moment's diagonal, added to it as in the code of GPTQ and SparseGPT: so that it can be inverted."""
_MSE_GRID = np.linspace(1, 0.5, 51, dtype=np.float32)
_AWQ_GRID = np.linspace(0, 1, 21)


def output_error(error: np.ndarray, moment: np.ndarray) -> float:
    """The mean squared error of products, summed over outputs, that errors [in, out] of a matrix make."""
    return float(np.sum(error * (moment @ error)))


def error_shares(moment: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor U of the inverse of `moment` [in, in], which is damped before.

    Row i of U, over U_ii, says how the weights of later inputs make up for an error in those of input i, all before it
    being settled. Inputs that were never there make up for nothing: U is the identity.

    Raises:
        Rejected: the moment is not finite.
    """
    if not np.isfinite(moment).all():
        raise Rejected("the moments of a matrix's inputs are not finite, so errors cannot be made up for by them")
    spread = moment.astype(np.float64)
    mean = np.diagonal(spread).mean()
    spread = spread + np.eye(len(spread)) * (_DAMPING * mean if mean > 0 else 1.0)
    return np.linalg.cholesky(np.linalg.inv(spread)).T


def mse_scale(storage: MatrixStorage, weights: np.ndarray) -> np.ndarray:
    """The scales [G, out], for `pack`, with the least squared error of each group of `weights` [in, out] as stored.

    Searched among multiples of the scale by absmax from 1 to 0.5: cutting off the largest weights lets all others be
    rounded more finely (Banner et al. 2019, arXiv:1810.05723; the search as GPTQ's code does it).

    Raises:
        Rejected: the format is not `Quantized`.
    """
    form = _quantized(storage)
    if storage.compression is not None:
        weights, _ = storage.compression.compress(weights, "in_out")
    absmax = form.absmax_scale(weights)
    best, least = absmax, np.full(absmax.shape, np.inf)
    for part in _MSE_GRID:
        off = form.unpack(form.pack(weights, "in_out", absmax * part), "in_out") - weights
        error = np.square(off).reshape(len(absmax), -1, off.shape[1]).sum(axis=1)
        best, least = np.where(error < least, absmax * part, best), np.minimum(error, least)
    return best


def gptq(storage: MatrixStorage, weights: np.ndarray, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`weights` [in, out], all of which are stored, rounded so that the product's error is small, and their scales
    [G, out], both for `pack`.

    Rows are rounded one after the other, and those that follow make up for the error (Frantar et al. 2022,
    arXiv:2210.17323); a group's scale is chosen by absmax when its first row's turn comes.

    qwix has GPTQ as well, but with a scale of absmax / (limit + 0.5) that is not rounded to what is stored, with
    codes down to -8, and with groups' scales that do not follow the errors inside a block of 128 rows.

    Raises:
        Rejected: the format is not `Quantized`, or the moment is not finite.
    """
    form = _quantized(storage)
    scales = form.scale
    assert scales is not None, "the format holds no weights"
    rows = len(weights)
    shares = error_shares(moment)
    left = weights.astype(np.float64)
    rounded = np.empty_like(left)
    group = form.group or rows
    chosen = []
    for start in range(0, rows, group):
        here = slice(start, start + group)
        absmax = abs(left[here]).max(axis=0, keepdims=True).astype(np.float32)
        # As it will be stored, for `pack` to find the same codes.
        scale = scales.load(scales.store(scales.choose(absmax, form.code.limit)), np.float64)[0]
        step = np.where(scale > 0, scale, 1)
        for row in range(start, start + group):
            codes = form.code.encode(np.where(scale > 0, left[row] / step, 0))
            rounded[row] = form.code.decode(codes, np.float64) * scale
            error = (left[row] - rounded[row]) / shares[row, row]
            left[row:] -= np.outer(shares[row, row:], error)
        chosen.append(scale)
    return rounded.astype(np.float32), np.stack(chosen).astype(np.float32)


def awq_scales(readers: Sequence[tuple[MatrixStorage, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Factors s [in], all positive, for which storing `s[:, None] * weights` and dividing by s errs least.

    The readers of one input, which is divided by s in return, are how each matrix [in, out] is stored, itself, and the
    moment [in, in] of what it sees of the input: of experts, that of their own tokens. Factors are powers from 0 to 1
    of the channels' root mean square, so that weights that meet large inputs are rounded more finely (Lin et al. 2023,
    arXiv:2306.00978, section 3.2, which takes the mean magnitude); the error is that of the products, over all matrices
    together. The power 0 is among them: no factors.

    qwix's search is for one matrix alone, in its own scales and by the moment's diagonal only.
    """
    size = np.sqrt(np.sum([np.diagonal(moment) for *_, moment in readers], axis=0, dtype=np.float64))
    size = np.clip(size / max(size.max(), 1e-30), 1e-4, None)
    best, least = np.ones(len(size), np.float32), np.inf
    for power in _AWQ_GRID:
        factors = size**power
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        error = sum(_error_with(factors, *reader) for reader in readers)
        if error < least:
            best, least = factors, error
    return best


def _error_with(factors: np.ndarray, storage: MatrixStorage, weights: np.ndarray, moment: np.ndarray) -> float:
    back = storage.unpack(storage.pack(weights * factors[:, None]), weights.shape) / factors[:, None]
    return output_error((back - weights).astype(np.float32), moment)


def _quantized(storage: MatrixStorage) -> Quantized:
    if not isinstance(storage.form, Quantized):
        raise Rejected(f"{storage.format} has no codes and scales that a calibration knows: it is not `Quantized`")
    return storage.form
