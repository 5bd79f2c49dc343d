"""A small network shared by all operations: how far each is from its roofline, by what it is, how its operand is stored,
what runs it and what else was chosen. A candidate's seconds are the sum over its operations.

What it has learnt is `pretrained/<platform>.npz`; `experiments/cpu_latency/pretrain.py` writes it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosearch.core.target import Target
from cosearch.latency.batch import QUANTITIES, Batch, Operations

PRETRAINED = Path(__file__).parent / "pretrained"
_SIZES = 6
_MOST = 8.0
"""Of the logarithm of how far an operation may be from its roofline."""

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RateNetwork:
    """An ensemble of networks of one hidden layer over the `tokens` (words of entries, storages and contexts).

    Each member gives for an operation the logarithms of four factors: over `target.overhead_s` for each run, over the
    peak for each multiplication, over the bandwidth for each byte, and for each output. Words that it does not know
    count nothing.
    """

    tokens: tuple[str, ...]
    members: tuple[Weights, ...]

    @classmethod
    def untrained(cls) -> "RateNetwork":
        """One that says the roofline."""
        empty = {"embed": np.zeros((0, 1)), "direct": np.zeros((0, 4)), "size": np.zeros((_SIZES, 1))}
        return cls((), ({**empty, "bias": np.zeros(1), "out": np.zeros((1, 4)), "base": np.array(_ROOFLINE)},))

    @classmethod
    def load(cls, platform: str) -> "RateNetwork":
        """What was learnt on chips of this kind; the roofline where nothing was."""
        path = PRETRAINED / f"{platform}.npz"
        return _load(path) if path.is_file() else cls.untrained()

    def save(self, path: Path) -> None:
        """Write `path`."""
        arrays = {f"{index}.{name}": one for index, member in enumerate(self.members) for name, one in member.items()}
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, tokens=np.array(self.tokens), **{k: v.astype(np.float32) for k, v in arrays.items()})

    def log_seconds(self, operations: Operations, batch: Batch, target: Target) -> np.ndarray:
        """[members, n]: the logarithm of the seconds of one run."""
        words = words_of(operations, self.tokens)
        size = batch.size * scales(target)
        triple = (batch.entry.astype(np.int64) * len(words[1]) + batch.storage) * len(words[2]) + batch.context[:, None]
        there = np.flatnonzero(batch.size[..., 0].ravel() > 0)
        distinct, inverse = np.unique(triple.ravel()[there], return_inverse=True)
        rest, context = np.divmod(distinct, len(words[2]))
        entry, storage = np.divmod(rest, len(words[1]))
        found = []
        for member in self.members:
            inner = [_times(one, member["embed"]) for one in words[:3]]
            inner[0] = inner[0] + words[3] @ member["size"] + member["bias"]
            outer = [_times(one, member["direct"]) for one in words[:3]]
            hidden = np.tanh(inner[0][entry] + inner[1][storage] + inner[2][context])
            rates = hidden @ member["out"] + outer[0][entry] + outer[1][storage] + outer[2][context] + member["base"]
            factors = np.exp(np.clip(rates, -_MOST, _MOST))
            each = np.zeros(triple.size, np.float32)
            each[there] = np.einsum("ij,ij->i", size.reshape(-1, len(QUANTITIES))[there], factors[inverse])
            found.append(np.log(each.reshape(triple.shape).sum(axis=1) + 1e-12))
        return np.array(found)


_ROOFLINE = (0.0, -_MOST, 0.0, -_MOST)
"""Factors of the roofline: overhead and bytes count once; multiplications and outputs hardly, beside them."""


def scales(target: Target) -> np.ndarray:
    """Seconds of one of each quantity at best."""
    peak = max(target.peak_flops_per_s.values())
    read_s = 1 / target.bandwidth_bytes_per_s
    return np.array([target.overhead_s, 2 / peak, read_s, 4 * read_s], np.float32)


def words_of(operations: Operations, tokens: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which of `tokens` each entry, storage and context has, [kinds, tokens], and the sizes of entries."""
    number = {token: at for at, token in enumerate(tokens)}

    def of(each: Sequence[Sequence[str]]) -> np.ndarray:
        found = np.zeros((len(each), len(tokens)), np.float32)
        for row, words in enumerate(each):
            found[row, [number[word] for word in words if word in number]] = 1
        return found

    entries = [entry.tokens for entry in operations.entries.all]
    storages = [storage.tokens for storage in operations.storages.all]
    sizes = np.array([entry.sizes for entry in operations.entries.all], np.float32)
    return of(entries), of(storages), of(operations.contexts), sizes


def _times(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (words @ weights).astype(np.float32)


@functools.cache
def _load(path: Path) -> RateNetwork:
    with np.load(path) as data:
        members: dict[str, dict[str, np.ndarray]] = {}
        for name in data.files:
            if name != "tokens":
                index, _, part = name.partition(".")
                members.setdefault(index, {})[part] = data[name]
        return RateNetwork(tuple(map(str, data["tokens"])), tuple(members.values()))
