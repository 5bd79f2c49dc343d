"""Kernels in numpy that are wrong, each in a way that some test does not see, and honest ones that only look different.

Each takes an output buffer, which it may write to and return, and the inputs of a product (`x` and the matrix, in
float32) or of attention (queries [B, H, D], keys and values [B, S, H, D], and a length).
"""

import threading
import time
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

Product = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Attention = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def blocks(size: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


# Wrong products.


def skipped_tail(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The columns after the last whole vector are not written."""
    whole = w.shape[1] // 16 * 16
    out[:, :whole] = x @ w[:, :whole]
    return out


def added_to_what_was_there(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The buffer is taken for zeros."""
    out += x @ w
    return out


def only_if_poisoned(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What is there and is finite is taken for the result."""
    return x @ w if np.isnan(out).any() else out


class Stale:
    """The result of an earlier call of this shape is given again."""

    def __init__(self) -> None:
        self._results: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return self._results.setdefault(out.shape, x @ w).copy()


class LateStale(Stale):
    """Right for ten calls, then stale."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __call__(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        self._calls += 1
        return x @ w if self._calls < 10 else super().__call__(out, x, w)


def narrow_sums(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Summed in bfloat16."""
    sums = np.zeros(out.shape, np.float32)
    for part in blocks(len(w), 8):
        sums = half(sums + x[:, part] @ w[part])
    return sums


def narrow_inputs(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Multiplied in bfloat16, summed in float32."""
    return half(x) @ half(w)


def tf32(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Ten bits of each factor."""
    return np.matmul(*(((a.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32) for a in (x.copy(), w.copy())))


def overflowing(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Summed by squares, which are infinite where inputs are huge: (x + w)^2 - (x - w)^2."""
    with np.errstate(over="ignore", invalid="ignore"):
        plus, minus = x[:, :, None] + w[None], x[:, :, None] - w[None]
        return ((plus**2 - minus**2) / 4).sum(axis=1, dtype=np.float64).astype(np.float32)


def skipped_part_of_k(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """An eighth of every sum is left out."""
    used = len(w) - len(w) // 8
    return x[:, :used] @ w[:used]


def last_row_skipped(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x[:, :-1] @ w[:-1]


def changed_input(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The first token is scaled in its own memory, and not back."""
    result = x @ w
    x[0] *= 2
    return result


def first_token_for_all(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Right where all tokens are equal."""
    return np.broadcast_to(x[:1] @ w, out.shape).copy()


def constant_rows(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Right where a token is one number."""
    return x.mean(axis=1, keepdims=True) * w.sum(axis=0)


def clipped(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Inputs beyond what float16 holds are its largest."""
    return x.clip(-65504, 65504) @ w


def flushed(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Inputs below what float16 holds are 0."""
    return np.where(np.abs(x) < 6e-8, 0, x) @ w


def wide(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of another dtype."""
    return x.astype(np.float64) @ w


def broadcastable(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of a shape that would compare."""
    return (x @ w)[None]


class Race:
    """Two threads each add their half of the sums to what they read before; now and then one's is lost."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        sums, half = np.zeros(out.shape, np.float32), len(w) // 2
        slow = self._rng.random() < 0.2

        def add(part: slice) -> None:
            read = sums.copy()
            if slow:
                time.sleep(0.01)
            sums[:] = read + x[:, part] @ w[part]

        threads = [threading.Thread(target=add, args=(part,)) for part in (slice(half), slice(half, None))]
        for thread in threads:
            thread.start()
            if not slow:
                thread.join()
        for thread in threads:
            thread.join()
        return sums


class RandomOrder:
    """Right, and not the same twice: the order of the sums is drawn."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        order = self._rng.permutation(len(w))
        sums = np.zeros(out.shape, np.float32)
        for row in order:
            sums += x[:, row, None] * w[row]
        return sums


WRONG_PRODUCTS: tuple[Callable[[], Product], ...] = (
    *(lambda kernel=kernel: kernel for kernel in (skipped_tail, added_to_what_was_there, only_if_poisoned)),
    Stale,
    LateStale,
    Race,
    RandomOrder,
    *(
        lambda kernel=kernel: kernel
        for kernel in (
            narrow_sums,
            narrow_inputs,
            tf32,
            overflowing,
            skipped_part_of_k,
            last_row_skipped,
            changed_input,
            first_token_for_all,
            constant_rows,
            clipped,
            flushed,
            wide,
            broadcastable,
        )
    ),
)


# Honest products.


def in_place(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.matmul(x, w, out=out)


def in_float64(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ w).astype(np.float32)


def transposed(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(w.T) @ np.ascontiguousarray(x.T)).T.copy()


def by_einsum(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.einsum("tk,kn->tn", x, w)


def by_token(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.stack([token @ w for token in x])


def by_column(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.stack([x @ column for column in w.T], axis=1)


def one_after_the_other(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    sums = np.zeros(out.shape, np.float32)
    for row in range(len(w)):
        sums += x[:, row, None] * w[row]
    return sums


def backwards(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return one_after_the_other(out, x[:, ::-1], w[::-1])


def reordered(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    order = np.random.default_rng(3).permutation(len(w))
    return x[:, order] @ w[order]


def pairwise(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (x.T[:, :, None] * w[:, None, :]).sum(axis=0, dtype=np.float32)


def tree(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    terms = list(x.T[:, :, None] * w[:, None, :])
    while len(terms) > 1:
        terms = [np.stack(terms[i : i + 2]).sum(axis=0) for i in range(0, len(terms), 2)]
    return terms[0]


def kahan(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    sums, lost = np.zeros(out.shape, np.float32), np.zeros(out.shape, np.float32)
    for row in range(len(w)):
        term = x[:, row, None] * w[row] - lost
        summed = sums + term
        lost, sums = (summed - sums) - term, summed
    return sums


def split_k(parts: int) -> Product:
    def kernel(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        cut = np.array_split(np.arange(len(w)), parts)
        return np.stack([x[:, part] @ w[part] for part in cut]).sum(axis=0)

    return kernel


def even_and_odd(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x[:, ::2] @ w[::2] + x[:, 1::2] @ w[1::2]


def lanes(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Sixteen sums that are added up in the end, as vector registers hold them."""
    pad = -len(w) % 16
    x, w = np.pad(x, ((0, 0), (0, pad))), np.pad(w, ((0, pad), (0, 0)))
    sums = np.zeros((*out.shape, 16), np.float32)
    for part in blocks(len(w), 16):
        sums += x[:, None, part] * w[part].T
    return sums.sum(axis=-1)


def tiled(rows: int, columns: int, tokens: int) -> Product:
    def kernel(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        out[:] = 0
        for t in blocks(len(x), tokens):
            for n in blocks(w.shape[1], columns):
                for k in blocks(len(w), rows):
                    out[t, n] += x[t, k] @ w[k, n]
        return out

    return kernel


def padded(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    (tokens, rows), columns = x.shape, w.shape[1]
    x, w = np.pad(x, ((0, -tokens % 8), (0, -rows % 64))), np.pad(w, ((0, -rows % 64), (0, -columns % 16)))
    return (x @ w)[:tokens, :columns].copy()


def scaled_by_token(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Each token is divided by its largest number first."""
    size = np.abs(x).max(axis=1, keepdims=True)
    size = np.exp2(np.floor(np.log2(np.where(size > 0, size, 1))))
    return (x / size) @ w * size


def scaled_by_column(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    size = np.abs(w).max(axis=0)
    size = np.where(size > 0, size, 1)
    return x @ (w / size) * size


def two_threads(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Each its own columns."""
    half = w.shape[1] // 2

    def fill(part: slice) -> None:
        out[:, part] = x @ w[:, part]

    threads = [threading.Thread(target=fill, args=(part,)) for part in (slice(half), slice(half, None))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


HONEST_PRODUCTS: dict[str, Product] = {
    kernel.__name__: kernel
    for kernel in (
        in_place,
        in_float64,
        transposed,
        by_einsum,
        by_token,
        by_column,
        one_after_the_other,
        backwards,
        reordered,
        pairwise,
        tree,
        kahan,
        even_and_odd,
        lanes,
        padded,
        scaled_by_token,
        scaled_by_column,
        two_threads,
    )
} | {
    "split in 2": split_k(2),
    "split in 7": split_k(7),
    "tiles of 32": tiled(32, 32, 32),
    "tiles of 17 x 5": tiled(17, 5, 2),
}


# Wrong attention.


def scores_of(query: np.ndarray, key: np.ndarray, length: int) -> np.ndarray:
    return np.einsum("bhd,bshd->bhs", query * np.float32(query.shape[-1] ** -0.5), key[:, :length])


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def weighted(weights: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.einsum("bhs,bshd->bhd", weights, value[:, : weights.shape[-1]])


def one_more_slot(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return weighted(softmax(scores_of(query, key, min(length + 1, key.shape[1]))), value)


def one_slot_less(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return weighted(softmax(scores_of(query, key, max(length - 1, 1))), value)


def not_normalised(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    """The sum of the weights is taken for what it is where all scores are 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        return weighted(np.exp(scores_of(query, key, length)) / np.float32(length), value)


def no_largest(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    """Scores are not made relative to their largest, and overflow where they are large."""
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(scores_of(query, key, length))
        return weighted(weights / weights.sum(axis=-1, keepdims=True), value)


def wrong_scale(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return weighted(softmax(np.float32(1.001) * scores_of(query, key, length)), value)


def narrow_scores(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return weighted(softmax(half(scores_of(query, key, length))), value)


def narrow_weights(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return weighted(half(softmax(scores_of(query, key, length))), value)


def other_heads(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    """Heads take turns with the key/value heads instead of sharing them in groups."""
    order = np.arange(query.shape[1]).reshape(2, -1).T.reshape(-1)
    return weighted(softmax(scores_of(query, key[:, :, order], length)), value[:, :, order])


def largest_only(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    """Right where attention is sharp."""
    scores = scores_of(query, key, length)
    return weighted((scores == scores.max(axis=-1, keepdims=True)).astype(np.float32), value)


def unmerged(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    """Two parts of the context are merged as if their largest scores were one."""
    found, sums = np.zeros_like(out), np.zeros(query.shape[:2], np.float32)
    for part in blocks(length, 32):
        scores = scores_of(query, key[:, part], length)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found, sums = found + weighted(weights, value[:, part]), sums + weights.sum(axis=-1)
    return found / sums[..., None]


WRONG_ATTENTIONS: tuple[Attention, ...] = (
    one_more_slot,
    one_slot_less,
    not_normalised,
    no_largest,
    wrong_scale,
    narrow_scores,
    narrow_weights,
    other_heads,
    largest_only,
    unmerged,
)


# Honest attention.


def plain(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return weighted(softmax(scores_of(query, key, length)), value)


def exact(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    scores = np.einsum("bhd,bshd->bhs", query.astype(np.float64), key[:, :length]) * query.shape[-1] ** -0.5
    return weighted(softmax(scores), value).astype(np.float32)


def scaled_late(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    scores = np.einsum("bhd,bshd->bhs", query, key[:, :length]) * np.float32(query.shape[-1] ** -0.5)
    return weighted(softmax(scores), value)


def normalised_late(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    scores = scores_of(query, key, length)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weighted(weights, value) / weights.sum(axis=-1)[..., None]


def by_exp2(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    scores = scores_of(query, key, length) * np.float32(np.log2(np.e))
    weights = np.exp2(scores - scores.max(axis=-1, keepdims=True))
    return weighted(weights / weights.sum(axis=-1, keepdims=True), value)


def masked(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    """Every slot is read, and those beyond the length get a weight of 0."""
    scores = scores_of(query, key, key.shape[1]) + np.where(np.arange(key.shape[1]) < length, 0, np.float32(-1e30))
    return weighted(softmax(scores), value)


def online(width: int) -> Attention:
    """One pass over the context (Milakov and Gimelshein 2018, arXiv:1805.02867)."""

    def kernel(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
        most = np.full((*query.shape[:2], 1), -np.inf, np.float32)
        sums, found = np.zeros_like(most), np.zeros_like(query)
        for part in blocks(length, width):
            scores = scores_of(query, key[:, part], length)
            larger = np.maximum(most, scores.max(axis=-1, keepdims=True))
            weights, less = np.exp(scores - larger), np.exp(most - larger)
            sums = sums * less + weights.sum(axis=-1, keepdims=True)
            found, most = found * less + weighted(weights, value[:, part]), larger
        out[:] = found / sums
        return out

    return kernel


def split_context(parts: int) -> Attention:
    """Parts of the context on their own, merged by their largest scores (flash decoding)."""

    def kernel(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
        scores = [scores_of(query, key[:, part], length) for part in blocks(length, -(-length // parts))]
        most = [one.max(axis=-1, keepdims=True) for one in scores]
        weights = [np.exp(one - top) for one, top in zip(scores, most, strict=True)]
        found = [
            weighted(one, value[:, part])
            for one, part in zip(weights, blocks(length, -(-length // parts)), strict=True)
        ]
        shares = [np.exp(top - np.max(most, axis=0)) for top in most]
        sums = sum(one.sum(axis=-1, keepdims=True) * share for one, share in zip(weights, shares, strict=True))
        return sum((one * share for one, share in zip(found, shares, strict=True)), np.zeros_like(out)) / sums

    return kernel


def by_head(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    for head in range(query.shape[1]):
        one = slice(head, head + 1)
        out[:, one] = plain(out, query[:, one], key[:, :, one], value[:, :, one], length)
    return out


def newest_first(out: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, length: int) -> np.ndarray:
    return plain(out, query, key[:, :length][:, ::-1], value[:, :length][:, ::-1], length)


HONEST_ATTENTIONS: dict[str, Attention] = {
    kernel.__name__: kernel
    for kernel in (plain, exact, scaled_late, normalised_late, by_exp2, masked, by_head, newest_first)
} | {
    "online by 1": online(1),
    "online by 16": online(16),
    "online by 64": online(64),
    "context in 2": split_context(2),
    "context in 5": split_context(5),
}
