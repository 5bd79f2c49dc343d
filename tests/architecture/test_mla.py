import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cosearch.architecture import cache as kv
from cosearch.architecture.decoder import Decoder, bind, pack, plain_decoder, random_weights
from cosearch.architecture.linear import Linear, MatrixStorage
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.schedule import Schedule
from cosearch.sparsity.n_m import NMCompression
from cosearch.testing import check_attention

CAPACITY = 12


def shape_of(**choices: object) -> DecoderShape:
    small = {"width": 64, "depth": 2, "head_dim": 16, "ffn_ratio": 1, "attention": "mla", "latent": 24, "rope_dim": 8}
    return DecoderShape.of(Choices(small | choices))


def decoded(model: Decoder) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the same bytes by `score`, which expands keys and values, and by steps, which do not."""
    params = pack(model, random_weights(model.shape, 0))
    tokens = np.random.default_rng(0).integers(0, 256, (2, CAPACITY), dtype=np.int32)
    score = jax.jit(lambda p, t: bind(model, p).score(t))(params, tokens)
    step = jax.jit(lambda p, c, t, position: bind(model, p).decode_step(c, t, position))
    cache, steps = kv.zeros(model.cache_spec(2, CAPACITY)), []
    for position in range(CAPACITY):
        logits, cache = step(params, cache, tokens[:, position], np.int32(position))
        steps.append(logits)
    return np.asarray(score), np.stack(steps, axis=1)


def test_the_contract_is_kept_also_where_no_size_is_another():
    check_attention("mla", {"latent": 24, "rope_dim": 6, "head_dim": 8, "heads_ratio": 0.5})


@pytest.mark.parametrize("lowering", ["dot", "multiply_reduce"])
def test_absorbed_matrices_give_what_expanded_keys_and_values_give(lowering: str):
    with jax.enable_x64(True):
        model = Decoder(shape_of(), Precision("float64", "float64", "float64"), Schedule(attention=lowering))
        score, steps = decoded(model)
        np.testing.assert_allclose(steps, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weights", ["int8", "int4_g32"])
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_matrices_in_any_format_are_absorbed(weights: str, layout: str):
    score, steps = decoded(Decoder(shape_of(latent=32), Precision(weights), Schedule(weight_layout=layout)))
    np.testing.assert_allclose(steps, score, atol=1e-4)


@pytest.mark.parametrize(("cache", "bytes_per_token"), [("float32", 4 * 32), ("bfloat16", 2 * 32), ("int8", 32 + 4)])
def test_a_token_takes_few_bytes(cache: str, bytes_per_token: int):
    """The latent and the rotary key, and in int8 a bfloat16 scale of each; however many heads there are."""
    model = plain_decoder(shape_of(), Precision(kv_cache=cache))
    arrays = jax.tree.leaves(kv.zeros(model.cache_spec(3, 100)))
    assert sum(array.nbytes for array in arrays) == 2 * 3 * 100 * bytes_per_token
    assert plain_decoder(shape_of(head_dim=8), Precision(kv_cache=cache)).cache_spec(3, 100) == model.cache_spec(3, 100)
    score, steps = decoded(model)
    np.testing.assert_allclose(steps, score, atol=1e-4)


def test_computed_in_bfloat16_steps_are_near_to_score():
    score, steps = decoded(plain_decoder(shape_of(), Precision("bfloat16", "bfloat16", "bfloat16")))
    assert np.abs(steps - score).max() < 0.05 * np.abs(score).max()


def test_no_key_or_value_of_a_past_token_is_made_in_a_step():
    shape = shape_of()
    model = plain_decoder(shape)
    params, spec = pack(model, random_weights(shape, 0)), model.cache_spec(1, 1000)
    step = jax.jit(lambda p, c: bind(model, p).decode_step(c, jnp.zeros(1, jnp.int32), jnp.int32(9)))
    text = step.lower(params, spec).as_text()
    wide = 4 * 16
    assert "1x1000x1x24xf32" in text and f"1000x{wide}xf32" not in text and "1000x4x16xf32" not in text


def test_odd_rotary_parts_are_refused():
    with pytest.raises(Rejected, match="rope_dim must be even"):
        shape_of(rope_dim=7)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("form", ["float32", "int8", "int4_g32"])
@pytest.mark.parametrize("compression", [None, NMCompression(2, 4)])
def test_a_linear_s_matrix_is_what_it_multiplies_with(form: str, layout: str, compression: NMCompression | None):
    storage, sizes = MatrixStorage(form, layout, compression=compression), (64, 8)
    stored = storage.pack(np.random.default_rng(0).standard_normal(sizes).astype(np.float32))
    linear = Linear(sizes, storage)
    nnx.update(linear, {"stored": {part: jnp.asarray(array) for part, array in stored.items()}})
    matrix = linear.matrix(jnp.float32)
    np.testing.assert_allclose(matrix, storage.unpack(stored, sizes), rtol=1e-6)
    np.testing.assert_allclose(matrix, linear(jnp.eye(64)), rtol=1e-6)
