"""The gated delta rule, one token at a time and in chunks: a state of fixed size that is read like a dictionary.

The state S [D, E] answers a query q with S^T q. Each token first lets all of it fade by a, then moves what it answers
to the token's key k towards the token's value v by a part b of the difference:

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T = a_t S_{t-1} + k_t u_t^T
    u_t = b_t (v_t - a_t S_{t-1}^T k_t)

Shape suffixes: B batch, T tokens, H heads, D key size, E value size, N chunks, C tokens of a chunk. `fade` is log a,
at most 0; `rate` is b. A token of fade 0 and rate 0 leaves the state as it is.
"""

import jax
import jax.numpy as jnp

from cosearch.schedule.matmul import multiply_reduce

CHUNK = 32


def step(
    query_BHD: jax.Array,
    key_BHD: jax.Array,
    value_BHE: jax.Array,
    fade_BH: jax.Array,
    rate_BH: jax.Array,
    state_BHDE: jax.Array,
    lowering: str = "dot",
) -> tuple[jax.Array, jax.Array]:
    """One token: what its query reads [B, H, E], and the state after it."""

    def read(state: jax.Array, at: jax.Array) -> jax.Array:
        product = multiply_reduce if lowering == "multiply_reduce" else jnp.einsum
        return product("bhd,bhde->bhe", at, state)

    state = state_BHDE * jnp.exp(fade_BH)[..., None, None]
    written = rate_BH[..., None] * (value_BHE - read(state, key_BHD))
    state += key_BHD[..., :, None] * written[..., None, :]
    return read(state, query_BHD), state


def chunked(
    query_BTHD: jax.Array,
    key_BTHD: jax.Array,
    value_BTHE: jax.Array,
    fade_BTH: jax.Array,
    rate_BTH: jax.Array,
    state_BHDE: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Many tokens: what their queries read [B, T, H, E], and the state after them.

    Within a chunk the u of all tokens solve one triangular system (the WY representation: Yang et al. 2024,
    arXiv:2406.06484, with gates arXiv:2412.06464), so that only chunks follow each other one by one.
    """
    tokens = query_BTHD.shape[1]
    query, key, value, fade, rate = (_chunks(x) for x in (query_BTHD, key_BTHD, value_BTHE, fade_BTH, rate_BTH))
    fade_NBHC = jnp.cumsum(fade, axis=-1)  # from the chunk's start to after each token
    at, earlier = jnp.arange(CHUNK)[:, None], jnp.arange(CHUNK)[None, :]
    # Masked before the exponential: what lies above the diagonal might overflow, and spoil the gradient.
    between = jnp.exp(jnp.where(earlier <= at, fade_NBHC[..., :, None] - fade_NBHC[..., None, :], -jnp.inf))
    faded, left = jnp.exp(fade_NBHC)[..., None], jnp.exp(fade_NBHC[..., -1:] - fade_NBHC)[..., None]
    overlap = rate[..., None] * between * _product("...id,...jd->...ij", key, key)
    solve = _inverse(jnp.where(earlier < at, overlap, 0))
    # u = own - seen S, with S the state before the chunk
    own = _product("...ij,...je->...ie", solve, rate[..., None] * value)
    seen = _product("...ij,...jd->...id", solve, rate[..., None] * faded * key)
    scores = between * _product("...id,...jd->...ij", query, key)

    def body(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, own, seen, scores, end = chunk
        written = own - _product("...cd,...de->...ce", seen, state)
        out = _product("...cd,...de->...ce", query, state) + _product("...ij,...je->...ie", scores, written)
        return state * end[..., None] + _product("...cd,...ce->...de", key, written), out

    each = (query * faded, key * left, own, seen, scores, faded[..., -1, :])
    state, out_NBHCE = jax.lax.scan(body, state_BHDE, each)
    out = out_NBHCE.transpose(1, 0, 3, 2, 4)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :tokens], state


def _chunks(x_BTH: jax.Array) -> jax.Array:
    """[B, T, H, …] to [N, B, H, C, …]; the last chunk is filled up with zeros."""
    batch, tokens, *rest = x_BTH.shape
    x = jnp.pad(x_BTH, [(0, 0), (0, -tokens % CHUNK)] + [(0, 0)] * len(rest)).reshape(batch, -1, CHUNK, *rest)
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _inverse(lower: jax.Array) -> jax.Array:
    """The inverse of I + `lower` [..., C, C], which is strictly lower triangular; C is a power of two.

    The inverses of the blocks on the diagonal are joined in pairs, to blocks twice as large: ((A, 0), (B, D)) has the
    inverse ((A', 0), (-D' B A', D')). These are products alone, where a triangular solve is a library's call on CPUs
    and GPUs, and as stable as forward substitution, which a series of powers of `lower` is not.
    """
    at = jnp.arange(lower.shape[-1])
    inverse, size = jnp.eye(len(at), dtype=lower.dtype), 1
    while size < len(at):
        beside = (at[:, None] // size == at[None, :] // size + 1) & (at[None, :] // size % 2 == 0)
        inverse -= _product("...ij,...jk,...kl->...il", inverse, jnp.where(beside, lower, 0), inverse)
        size *= 2
    return inverse


def _product(subscripts: str, *factors: jax.Array) -> jax.Array:
    """By `einsum`, in full precision also where the chip's default for float32 is less."""
    return jnp.einsum(subscripts, *factors, precision="highest")
