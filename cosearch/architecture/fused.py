"""Whole layers as one native call: softmax attention over a cache, the gated delta rule, feed-forward by two halves.

What lies between products (norms, RoPE, the cache's formats, the residual stream) is computed in float32, whatever the
activations are: that is no less exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cosearch.architecture.attention import AttentionShape
from cosearch.architecture.attention.gated_delta import GatedDelta, GatedDeltaShape
from cosearch.architecture.attention.softmax import SoftmaxAttention, SoftmaxShape, angles
from cosearch.architecture.cache import KVCache
from cosearch.architecture.feedforward import FeedForwardShape
from cosearch.architecture.feedforward.mlp import MLPShape
from cosearch.architecture.linear import Linear, MatrixStorage
from cosearch.architecture.shape import LayerShape
from cosearch.kernels.cpu import Attention, operations
from cosearch.kernels.cpu.operations import GATED, GELU, NONE, RESIDUAL, Factor
from cosearch.kernels.cpu.program import Buffer, Program


def why_not(shape: LayerShape, storages: Mapping[str, MatrixStorage], cache: KVCache, width: int) -> str | None:
    """Why a layer is not run as one call; `storages` are its matrices', by name ("attention.query")."""
    for block, one in shape.blocks():
        if not isinstance(one, SoftmaxShape | GatedDeltaShape | MLPShape):
            return f"its {block} is no softmax attention, no gated delta rule and no feed-forward by two halves"
        for name, (*stack, rows, columns) in one.linears(width).items():
            storage = storages[f"{block}.{name}"]
            product = storage.product(1, (rows, columns), cache.dtype)
            why = "it is a stack of matrices" if stack else operations.why_no_product(product)
            if why:
                return f"{block}.{name}: {why}"
        for names in multiplied_together(one):
            if len({storages[f"{block}.{name}"] for name in names}) > 1:
                return f"{', '.join(names)} are not stored alike"
    attention = shape.attention
    if isinstance(attention, SoftmaxShape):
        if attention.blocks is not None:
            return "it attends to blocks of keys"
        if attention.borrows and attention.window is not None:
            return "it attends to keys of a layer below whose window moves on"
        return Attention().why_not(attention.over(cache, 1, 1))
    return None


def multiplied_together(shape: AttentionShape | FeedForwardShape) -> list[tuple[str, ...]]:
    """The matrices of a block that are multiplied with its normalised input, by product."""
    names = shape.reads_norm
    return [names[:-2], names[-2:]] if isinstance(shape, GatedDeltaShape) else [names]


def runs(shape: LayerShape, method: str) -> bool:
    """Whether a layer that is run as one call is so by this method, too."""
    return method == "decode_step" or (method == "prefill" and not isinstance(shape.attention, GatedDeltaShape))


def run_layers(
    layers: Sequence[Any], method: str, x: jax.Array, caches: Sequence[Any], *positions: jax.Array
) -> tuple[jax.Array, list[Any]]:
    """`x` [B, T, W] through `layers` (`architecture.decoder.Layer`) by "prefill" or "decode_step", and their caches."""
    call = _Call(Program(), method, x.shape, str(x.dtype), positions)
    here = call.program.argument(x.astype(jnp.float32).reshape(call.tokens, -1))
    out = call.program.result((call.tokens, x.shape[-1]))
    turns = [call.program.temporary(4 * x.size) for _ in range(2)]
    blocks = [
        (layer, block, cache) for layer, cache in zip(layers, caches, strict=True) for block, _ in layer.shape.blocks()
    ]
    written = dict(enumerate(caches))
    held: _Held | None = None
    for index, (layer, block, cache) in enumerate(blocks):
        to = out if index == len(blocks) - 1 else turns[index % 2]
        with call.program.scope():
            if block == "feedforward":
                call.feedforward(layer, here, to)
            elif isinstance(layer.attention, GatedDelta):
                written[list(layers).index(layer)] = call.recurrence(layer, here, to, cache)
            else:
                if not layer.attention.shape.borrows:
                    held = call.open(layer.attention, cache)
                    written[list(layers).index(layer)] = held.cache
                assert held is not None, "the lowest layer that attends has keys of its own"
                call.attention(layer, here, to, held)
        here = to
    results = call.program.call()
    arrays = [
        jax.tree.map(lambda one: results[one.at] if isinstance(one, Buffer) else one, written[index])
        for index in range(len(layers))
    ]
    return results[0].reshape(x.shape).astype(x.dtype), arrays


@dataclass(frozen=True)
class _Held:
    """A layer's cache as the program updates it."""

    module: SoftmaxAttention
    slots: int
    cache: Mapping[str, Mapping[str, Buffer]]

    @property
    def tensors(self) -> tuple[Mapping[str, Buffer], Mapping[str, Buffer]]:
        return self.cache["key"], self.cache["value"]


@dataclass(frozen=True)
class _Call:
    """Adds blocks of layers to a program, for tokens `shape` [B, T, W] at `positions` as `method` takes them."""

    program: Program
    method: str
    shape: tuple[int, ...]
    dtype: str
    positions: Sequence[jax.Array]

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    def open(self, module: SoftmaxAttention, cache: Mapping[str, Mapping[str, jax.Array]]) -> _Held:
        """A layer's cache in the program."""
        buffers = {
            name: {part: self.program.updated(array) for part, array in cache[name].items()}
            for name in ("key", "value")
        }
        return _Held(module, module.cache.slots(cache, "key"), buffers)

    def feedforward(self, layer: Any, x: Buffer, out: Buffer) -> None:
        """Add a block's output for `x` to it: `out`."""
        shape, linears = layer.shape.feedforward, layer.feedforward
        epilogue = GATED if shape.gated else GELU
        hidden = self._multiply(
            x, [linears[name] for name in shape.reads_norm], None, layer.feedforward_norm(), epilogue
        )
        self._multiply(hidden, [linears["down"]], out, None, RESIDUAL, x)

    def recurrence(self, layer: Any, x: Buffer, out: Buffer, cache: Any) -> dict[str, dict[str, Buffer]]:
        """Add a block's output for `x` to it: `out`. Returns the states, which it updates."""
        module, program = layer.attention, self.program
        shape, parts, norm = module.shape, module.parts, layer.attention_norm()
        wide, narrow = multiplied_together(shape)
        projections = self._multiply(x, [parts[name] for name in wide], None, norm, NONE)
        gates = self._multiply(x, [parts[name] for name in narrow], None, norm, NONE)
        states = {name: {"values": program.updated(cache[name]["values"])} for name in ("conv", "state")}
        vectors = [parts[name]() for name in ("conv", "decay_rate", "decay_bias", "output_norm")]
        held = (states["conv"]["values"], states["state"]["values"])
        sizes = (self.shape[0], shape.heads, shape.head_dim)
        answered = operations.delta(program, projections, gates, vectors, held, sizes)
        self._multiply(answered, [parts["output"]], out, None, RESIDUAL, x)
        return states

    def attention(self, layer: Any, x: Buffer, out: Buffer, held: _Held) -> None:
        """Add a block's output for `x` to it: `out`. Its keys and values are `held`, its own or borrowed ones."""
        module, program = layer.attention, self.program
        shape, lender, (batch, tokens, _) = module.shape, held.module, self.shape
        sizes = shape.over(lender.cache, batch, held.slots)
        parts = module.parts
        norms = (
            (parts["query_norm"](), parts["query_norm" if shape.borrows else "key_norm"]()) if shape.qk_norm else None
        )
        projections = self._multiply(x, [parts[name] for name in shape.reads_norm], None, layer.attention_norm(), NONE)
        start = self.positions[0]
        at = start + jnp.arange(tokens)
        turns = angles(at, shape.head_dim)
        turned = (program.argument(turns[0]), program.argument(turns[1]))

        def heads(slots: jax.Array, kept: bool) -> tuple[Buffer, Buffer, Buffer]:
            where = program.argument(slots.astype(jnp.int32))
            return operations.heads(
                program, projections, sizes, tokens, turned, norms, where, held.tensors, shape.borrows, kept
            )

        if self.method == "decode_step":
            query, *_ = heads(lender.slot(at, held.slots), False)
            length = program.argument(jnp.minimum(start + 1, held.slots).astype(jnp.int32))
            attended = operations.attend(program, query, sizes, held.tensors, length)
        else:
            # In a ring, writing first would overwrite tokens that the chunk's own first tokens still see.
            targets = lender.targets(start, tokens, self.positions[1], held.slots)
            first = program.argument(start.astype(jnp.int32))
            if shape.window is None:
                query, *own = heads(targets, False)
                now = start + self.positions[1] - 1
            else:
                query, *own = heads(jnp.full_like(targets, -1), True)
                now = start - 1
            there = program.argument(lender.held(now, held.slots).astype(jnp.int32))
            attended = operations.prefill(
                program, query, (own[0], own[1]), sizes, tokens, held.tensors, there, first, shape.window, shape.sinks
            )
            if shape.window is not None:
                heads(targets, False)
        self._multiply(attended, [parts["output"]], out, None, RESIDUAL, x)

    def _multiply(
        self,
        x: Buffer,
        linears: Sequence[Linear],
        out: Buffer | None,
        norm: jax.Array | None,
        epilogue: int,
        residual: Buffer | None = None,
    ) -> Buffer:
        """`x`, normalised, times matrices that are stored alike."""
        rows, columns = linears[0].sizes[0], sum(linear.sizes[1] for linear in linears)
        product = linears[0].storage.product(self.tokens, (rows, columns), self.dtype)
        factors = [Factor(linear.arrays(), linear.sizes[1]) for linear in linears]
        return operations.matmul(self.program, x, factors, product, out, norm, epilogue, residual)
