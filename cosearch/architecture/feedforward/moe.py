"""Mixture of experts: every token passes k of E SwiGLU experts, which a router chooses, and one that all tokens share
(DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066).

No token is dropped and no expert computes for a token that did not choose it (MegaBlocks, Gale et al. 2022,
arXiv:2211.15841): what tokens chose is laid out in blocks of rows, each of one expert, so that
work grows with T * k and not with T * E, and a decode step reads the chosen experts only.

Shape suffixes: T tokens, W width, E experts, K experts that a token chooses, A = T * K choices, F channels of an
expert, N blocks, R rows of a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.architecture.linear import Linear
from cosearch.core.candidate import Value
from cosearch.core.errors import Rejected
from cosearch.core.space import Knob, integer

MOST_ROWS = 32
"""On a CPU of 2 cores, 1536 tokens of width 128 took 5.2 ms in blocks of 16 rows, 5.7 of 32 and 6.4 of 64; with their
gradient 16.7, 14.6 and 13.5."""

_BALANCE = 0.01
"""How much the balance of experts counts in training beside the loss (`balanced`)."""


@dataclass(frozen=True)
class MoEShape:
    """`chosen` of `experts` with `hidden` channels each, and one with `shared_hidden` for all tokens; 0 for none."""

    experts: int
    chosen: int
    hidden: int
    shared_hidden: int

    def __post_init__(self) -> None:
        if self.chosen > self.experts:
            raise Rejected(f"a token cannot choose {self.chosen} of {self.experts} experts")

    @property
    def reads_norm(self) -> tuple[str, ...]:
        return ("router", "gate", "up") + (("shared_gate", "shared_up") if self.shared_hidden else ())

    def linears(self, width: int) -> Mapping[str, tuple[int, ...]]:
        inward, outward = (width, self.hidden), (self.hidden, width)
        routed = {"gate": (self.experts, *inward), "up": (self.experts, *inward), "down": (self.experts, *outward)}
        inward, outward = (width, self.shared_hidden), (self.shared_hidden, width)
        shared = {"shared_gate": inward, "shared_up": inward, "shared_down": outward}
        return {"router": (width, self.experts)} | routed | (shared if self.shared_hidden else {})

    def read_fraction(self, name: str, tokens: int) -> float:
        return min(1.0, tokens * self.chosen / self.experts) if name in ("gate", "up", "down") else 1.0

    def __call__(self, x: jax.Array, linears: Mapping[str, Linear]) -> jax.Array:
        x_TW = x.reshape(-1, x.shape[-1])
        expert_TK, weight_TK = self._route(x_TW, linears["router"])
        out_TKW = self._run(x_TW, expert_TK, linears)
        if linears["gate"].storage.observed:
            self._observe(x_TW, expert_TK, linears)
        out = jnp.einsum("tkw,tk->tw", out_TKW, weight_TK).astype(x.dtype).reshape(x.shape)
        if not self.shared_hidden:
            return out
        hidden = jax.nn.silu(linears["shared_gate"](x)) * linears["shared_up"](x)
        return out + linears["shared_down"](hidden)

    def _route(self, x_TW: jax.Array, router: Linear) -> tuple[jax.Array, jax.Array]:
        """The experts that each token chooses, and what their outputs count, both [T, K].

        The weights sum to 1 (Mixtral, Jiang et al. 2024, arXiv:2401.04088). Of one expert alone that would be 1
        whatever the router says, which could not learn then; it counts as likely as it was (Switch Transformer,
        Fedus et al. 2021, arXiv:2101.03961).
        """
        # A score that is rounded chooses other experts than verification's, so routing is in float32 at least.
        chance_TE = jax.nn.softmax(router(x_TW.astype(jnp.promote_types(x_TW.dtype, jnp.float32))))
        expert_TK = jax.lax.top_k(chance_TE, self.chosen)[1]
        share_E = jax.nn.one_hot(expert_TK, self.experts, dtype=chance_TE.dtype).mean(axis=(0, 1))
        weight_TK = jnp.take_along_axis(balanced(chance_TE, share_E), expert_TK, axis=-1)
        if self.chosen > 1:
            weight_TK = weight_TK / weight_TK.sum(axis=-1, keepdims=True)
        return expert_TK, weight_TK

    def _run(self, x_TW: jax.Array, expert_TK: jax.Array, linears: Mapping[str, Linear]) -> jax.Array:
        """[T, K, W]: what the chosen experts make of each token."""
        graph, stacks = nnx.split(nnx.Dict({name: linears[name] for name in ("gate", "up", "down")}))

        def expert(stacks: Any, index: jax.Array, x_RW: jax.Array) -> jax.Array:
            parts = nnx.merge(graph, stacks)
            hidden_RF = jax.nn.silu(parts["gate"].select(index, x_RW)) * parts["up"].select(index, x_RW)
            return parts["down"].select(index, hidden_RF)

        # Blocks as high as an expert has choices on average, so that few tokens are not computed among many empty
        # rows, nor an expert read for each of its tokens: 8 tokens of width 768 that choose 2 of 4 experts took 4.4 ms
        # in blocks of 1 row, 1.8 of 4 and 3.7 of 16.
        rows = min(MOST_ROWS, max(1, expert_TK.size // self.experts))
        blocks = lay_out(expert_TK.reshape(-1), self.experts, rows)
        x_NRW = x_TW[blocks.choice_NR // self.chosen]
        out_NRW = map_blocks(expert, stacks, blocks.expert_N, blocks.needed_N, x_NRW)
        return out_NRW.reshape(-1, x_TW.shape[-1])[blocks.place_A].reshape(*expert_TK.shape, -1)

    def _observe(self, x_TW: jax.Array, expert_TK: jax.Array, linears: Mapping[str, Linear]) -> None:
        """Keep the statistics of each expert's own tokens; every expert computes every token, for calibration only."""
        gate, up, down = (linears[name] for name in ("gate", "up", "down"))
        chosen_TE = jax.nn.one_hot(expert_TK, self.experts).sum(axis=1)
        gate.observe(x_TW, chosen_TE)
        up.observe(x_TW, chosen_TE)
        indices = [jnp.int32(index) for index in range(self.experts)]
        hidden = [jax.nn.silu(gate.select(index, x_TW)) * up.select(index, x_TW) for index in indices]
        down.observe_each(jnp.stack(hidden, axis=1), chosen_TE)


@jax.custom_vjp
def balanced(chance_TE: jax.Array, share_E: jax.Array) -> jax.Array:
    """`chance`, with a gradient as if the loss had `_BALANCE` * E * sum(share * mean chance) added to it.

    That is the balance loss of the Switch Transformer (arXiv:2101.03961, section 2.2), least where all experts have
    equal `share` of the choices. Only what is trained differs by it, not what is computed, so a token's result does
    not depend on others.

    Without it routing collapses: after 160 steps (width 64, depth 2, Muon) 2 of 16 experts had 91 and 89 % of the
    choices in the two layers, and 3.279 bits a byte were left of held-out text; with 0.01 no expert had more than 15 %
    and 3.235 were left; with 0.1 the most was 10 % and 3.298 were left. One seed each.
    """
    return chance_TE


def _balanced_backward(share_E: jax.Array, gradient_TE: jax.Array) -> tuple[jax.Array, None]:
    tokens, experts = gradient_TE.shape
    return gradient_TE + _BALANCE * experts / tokens * share_E, None


balanced.defvjp(lambda chance_TE, share_E: (chance_TE, share_E), _balanced_backward)


class ExpertBlocks(NamedTuple):
    """Choices of experts in blocks of one expert each."""

    expert_N: jax.Array
    choice_NR: jax.Array
    """Which choice is in each row; where an expert has no more of them, the first of all."""
    needed_N: jax.Array
    """Whether there is any choice in the block; those without come last."""
    place_A: jax.Array
    """Which of the N * R rows each choice is in."""


def lay_out(expert_A: jax.Array, experts: int, rows: int) -> ExpertBlocks:
    """Blocks of so many `rows` for the choices `expert` of so many `experts`."""
    choices = len(expert_A)
    if rows == 1:
        # Nothing to sort: one token of width 128 took 94 us with what follows, and 58 without, on a busy machine.
        choice_A = jnp.arange(choices)
        return ExpertBlocks(expert_A, choice_A[:, None], jnp.ones(choices, bool), choice_A)
    # Counted, not sorted: XLA cannot serialize a program for CPUs that sorts.
    is_AE = (expert_A[:, None] == jnp.arange(experts)).astype(jnp.int32)
    before_A = jnp.take_along_axis(jnp.cumsum(is_AE, axis=0), expert_A[:, None], axis=1)[:, 0] - 1
    blocks_E = -(-is_AE.sum(axis=0) // rows)
    end_block_E = jnp.cumsum(blocks_E)

    # All that sizes known only when run can need: each expert's last block may hold one choice only.
    block_N = jnp.arange((choices + min(experts, choices) * (rows - 1)) // rows)
    needed_N = block_N < end_block_E[-1]
    expert_N = (block_N[:, None] >= end_block_E).sum(axis=1).clip(0, experts - 1)
    place_A = (end_block_E - blocks_E)[expert_A] * rows + before_A
    choice_NR = jnp.zeros(len(block_N) * rows, jnp.int32).at[place_A].set(jnp.arange(choices, dtype=jnp.int32))
    return ExpertBlocks(expert_N, choice_NR.reshape(-1, rows), needed_N, place_A)


def _map_blocks(
    run: Callable[[Any, jax.Array, jax.Array], jax.Array],
    stacks: Any,
    expert_N: jax.Array,
    needed_N: jax.Array,
    x_NRW: jax.Array,
) -> jax.Array:
    """[N, R, W]: `run(stacks, expert, x)` of each block that is needed, zeros for the others.

    A loop also where there are few blocks: unrolled, 2 of them took 26 us and not 28, but 4 of them 79 and not 41.
    """

    def one(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        expert, needed, x_RW = block
        return jax.lax.cond(needed, lambda x_RW: run(stacks, expert, x_RW), jnp.zeros_like, x_RW)

    return jax.lax.map(one, (expert_N, needed_N, x_NRW))


map_blocks = jax.custom_vjp(_map_blocks, nondiff_argnums=(0,))


def _map_forward(run: Any, stacks: Any, expert_N: jax.Array, needed_N: jax.Array, x_NRW: jax.Array) -> tuple:
    return _map_blocks(run, stacks, expert_N, needed_N, x_NRW), (stacks, expert_N, x_NRW)


def _map_backward(run: Any, kept: tuple, gradient_NRW: jax.Array) -> tuple:
    """Each block adds to the gradient of its own expert. JAX's own transposition adds to those of all experts in each
    block: 1536 tokens took 25 ms so, and 15 ms here, where a dense SwiGLU of as much work takes 9."""
    stacks, expert_N, x_NRW = kept
    arrays, tree = jax.tree.flatten(stacks)
    trained = [jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays]

    def step(sums: list[jax.Array], block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[list, jax.Array]:
        expert, x_RW, gradient_RW = block
        own = [jax.lax.dynamic_slice_in_dim(array, expert, 1) for array in arrays]
        _, pull = jax.vjp(lambda own, x_RW: run(jax.tree.unflatten(tree, own), jnp.int32(0), x_RW), own, x_RW)
        added, gradient_x_RW = pull(gradient_RW)
        added = [one for one, real in zip(added, trained, strict=True) if real]
        before = [jax.lax.dynamic_slice_in_dim(total, expert, 1) for total in sums]
        sums = [
            jax.lax.dynamic_update_slice_in_dim(total, old + new, expert, 0)
            for total, old, new in zip(sums, before, added, strict=True)
        ]
        return sums, gradient_x_RW

    zeros = [jnp.zeros_like(array) for array, real in zip(arrays, trained, strict=True) if real]
    sums, gradient_x_NRW = jax.lax.scan(step, zeros, (expert_N, x_NRW, gradient_NRW))
    rest = iter(sums)
    gradients = [next(rest) if real else None for real in trained]
    return jax.tree.unflatten(tree, gradients), None, None, gradient_x_NRW


map_blocks.defvjp(_map_forward, _map_backward)


class MoE:
    """`experts` of `expert_ratio` times the model's width hidden channels, `experts_per_token` of which a token
    passes, and a shared one of `shared_ratio` times the width."""

    knobs: Mapping[str, Knob] = {
        "experts": integer(4, per_layer=True),
        "experts_per_token": integer(2, per_layer=True),
        "expert_ratio": integer(1, per_layer=True),
        "shared_ratio": integer(1, at_least=0, per_layer=True),
    }

    def shape(self, width: int, choices: Mapping[str, Value]) -> MoEShape:
        experts, chosen = choices["experts"], choices["experts_per_token"]
        ratio, shared_ratio = choices["expert_ratio"], choices["shared_ratio"]
        assert isinstance(experts, int) and isinstance(chosen, int)
        assert isinstance(ratio, int) and isinstance(shared_ratio, int)
        return MoEShape(experts, chosen, ratio * width, shared_ratio * width)


FEEDFORWARD.register("moe")(MoE())
