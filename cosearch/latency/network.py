"""A small network shared by all operations: how far each is from its roofline, by what it is, how its operand is
stored, what runs it and what else was chosen. A candidate's seconds are the sum over its operations, times what a
second network says of all choices together: fusion, launches and what overlaps are of no single operation.

What it has learnt is `pretrained/rates_<platform>.safetensors`, of CPUs by
`experiments/cpu_latency/run.py --pretrain`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from cosearch.core.files import write_files
from cosearch.core.target import Target
from cosearch.latency import SHIPPED
from cosearch.latency.batch import QUANTITIES, Batch, Operations
from cosearch.latency.operations import ROLES

SIZES = 6
PROCESSOR = "processor="
"""The beginning of the word for a processor."""
MOST = 8.0
"""Of the logarithm of how far an operation may be from its roofline."""

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RateNetwork:
    """An ensemble of networks of one hidden layer over `tokens`, the words of entries, storages and contexts, and of
    ones over `knobs`, the words of an encoding.

    Each member gives for an operation the logarithms of four factors: over `target.overhead_s` for each run, over the
    peak for each multiplication, over the bandwidth for each byte, and for each output. What an operation is and how it
    is stored decide them together, and the context changes them for each role. The processor is a word of the context
    and of the knobs, too. Words that it does not know count nothing.
    """

    tokens: tuple[str, ...]
    knobs: tuple[str, ...]
    members: tuple[Weights, ...]

    @property
    def processors(self) -> list[str]:
        """Those that it was trained on, by name."""
        return [word.removeprefix(PROCESSOR) for word in self.tokens if word.startswith(PROCESSOR)]

    @classmethod
    def untrained(cls) -> "RateNetwork":
        """One that says the roofline."""
        empty = {"embed": np.zeros((0, 1)), "direct": np.zeros((0, 4)), "context": np.zeros((0, len(ROLES), 4))}
        none = {"size": np.zeros((SIZES, 1)), "bias": np.zeros(1), "out": np.zeros((1, 4))}
        whole = {"knobs": np.zeros((0, 1)), "knobs_bias": np.zeros(1), "knobs_out": np.zeros(1)}
        return cls((), (), ({**empty, **none, **whole, "base": np.array(_ROOFLINE)},))

    @classmethod
    def load(cls, platform: str) -> "RateNetwork":
        """What was learnt on chips of this kind; the roofline where nothing was."""
        path = rates(platform)
        return read(path) if path.is_file() else cls.untrained()

    def save(self, path: Path) -> None:
        """Replace `path`, whole or not at all: searches may read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        members = enumerate(self.members)
        arrays = {
            f"{index}.{name}": np.ascontiguousarray(one, np.float32)
            for index, own in members
            for name, one in own.items()
        }
        write_files({path: save(arrays, {"tokens": json.dumps(self.tokens), "knobs": json.dumps(self.knobs)})})


class Seconds:
    """What a network says of the candidates that some `Operations` describe, on one chip, as if it were of one of the
    network's `processors`."""

    def __init__(self, network: RateNetwork, operations: Operations, target: Target, processor: str = "") -> None:
        self._network, self._operations, self._scales = network, operations, scales(target)
        self._also = (PROCESSOR + processor,) if processor else ()
        self._whole = [self._of_knobs(member) for member in network.members]
        self._factors = np.zeros((len(network.members), 0, 0, len(QUANTITIES)), np.float32)
        self._by_context = np.zeros((0, 0, len(QUANTITIES)), np.float32)

    def log_seconds(self, batch: Batch, features: np.ndarray) -> np.ndarray:
        """[members, n]: the logarithm of the seconds of one run of candidates with these `features` of the encoding."""
        operations, members = self._operations, self._network.members
        storages, contexts = len(operations.storages.all), len(operations.contexts)
        if self._factors.shape[1:3] != (len(operations.entries.all), storages):
            # Few pairs are made anew, and many candidates share them.
            entry, storage, sizes, _ = words_of(operations, self._network.tokens)
            self._factors = np.array([pair_factors(one, entry, storage, sizes) for one in members], np.float32)
            self._role = np.array([ROLES.index(one.role) for one in operations.entries.all])
        if self._by_context.shape[1] != contexts * len(ROLES):
            *_, words = words_of(operations, self._network.tokens, self._also)
            told = [np.exp(np.einsum("kt,trq->krq", words, one["context"])) for one in members]
            self._by_context = np.array(told, np.float32).reshape(len(members), contexts * len(ROLES), -1)
        size = batch.size * self._scales
        pair = batch.entry * storages + batch.storage
        context = batch.context[:, None] * len(ROLES) + self._role[batch.entry]
        found, told = [], features.astype(np.float32)
        for factors, by_context, whole in zip(self._factors, self._by_context, self._whole, strict=True):
            each = np.take(factors.reshape(-1, len(QUANTITIES)), pair, axis=0)
            each *= np.take(by_context, context, axis=0)
            summed = np.log(np.einsum("nsq,nsq->n", each, size) + 1e-12)
            found.append(summed + np.tanh(told @ whole.hidden + whole.bias) @ whole.out)
        return np.array(found)

    def _of_knobs(self, member: Weights) -> "_Whole":
        encoding = self._operations.encoding
        known = dict(zip(self._network.knobs, member["knobs"], strict=True))
        nothing = np.zeros_like(member["knobs_bias"])
        fixed = {**encoding.always, **dict.fromkeys(self._also, 1.0)}
        bias = member["knobs_bias"] + sum((told * known.get(word, nothing) for word, told in fixed.items()), nothing)
        hidden = np.array([known.get(word, nothing) for word in encoding.words], np.float32).reshape(-1, len(nothing))
        return _Whole(hidden, bias.astype(np.float32), member["knobs_out"].astype(np.float32))


@dataclass(frozen=True)
class _Whole:
    """A member's network over all choices, for the features of one encoding."""

    hidden: np.ndarray
    bias: np.ndarray
    out: np.ndarray


def pair_factors(member: Weights, entry: np.ndarray, storage: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The factors [entries, storages, quantities] that a member gives, but for the context."""
    inner = [words @ member["embed"] for words in (entry, storage)]
    outer = [words @ member["direct"] for words in (entry, storage)]
    inner[0] = inner[0] + sizes @ member["size"] + member["bias"]
    hidden = np.tanh(inner[0][:, None] + inner[1][None])
    rates = hidden @ member["out"] + outer[0][:, None] + outer[1][None] + member["base"]
    return np.exp(np.clip(rates, -MOST, MOST))


_ROOFLINE = (0.0, -8.0, 0.0, -8.0)
"""Factors of the roofline: overhead and bytes count once; multiplications and outputs hardly, beside them."""


def rates(platform: str) -> Path:
    """The file of what was learnt on chips of this kind."""
    return SHIPPED / f"rates_{platform}.safetensors"


def scales(target: Target) -> np.ndarray:
    """Seconds of one of each quantity at best."""
    peak = target.peak_flops_per_s.get("float32", max(target.peak_flops_per_s.values()))
    read_s = 1 / target.bandwidth_bytes_per_s
    return np.array([target.overhead_s, 2 / peak, read_s, 4 * read_s], np.float32)


def words_of(
    operations: Operations, tokens: Sequence[str], also: tuple[str, ...] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which of `tokens` each entry and storage has, [kinds, tokens], the sizes of entries, and those of contexts, each
    of which has some words `also`."""
    number = {token: at for at, token in enumerate(tokens)}

    def of(each: Sequence[Sequence[str]]) -> np.ndarray:
        found = np.zeros((len(each), len(tokens)), np.float32)
        for row, words in enumerate(each):
            found[row, [number[word] for word in words if word in number]] = 1
        return found

    entries = [entry.tokens for entry in operations.entries.all]
    storages = [storage.tokens for storage in operations.storages.all]
    sizes = np.array([entry.sizes for entry in operations.entries.all], np.float32)
    return of(entries), of(storages), sizes, of([(*context, *also) for context in operations.contexts])


@functools.cache
def read(path: Path) -> RateNetwork:
    """What `RateNetwork.save` wrote."""
    members: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(path, "numpy") as data:
        for name in data.keys():  # noqa: SIM118 - it is no mapping
            index, _, part = name.partition(".")
            members.setdefault(index, {})[part] = data.get_tensor(name)
        tokens, knobs = (tuple(json.loads(data.metadata()[name])) for name in ("tokens", "knobs"))
        return RateNetwork(tokens, knobs, tuple(members.values()))
