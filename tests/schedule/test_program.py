from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.architecture.decoder import Decoder, bind, pack, random_weights
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices
from cosearch.core.errors import Rejected
from cosearch.precision import Precision
from cosearch.schedule import KNOBS, Schedule
from cosearch.schedule.program import Program

SHAPE = DecoderShape.of(Choices({"width": 32, "depth": 1, "head_dim": 16, "attention": "mqa", "ffn_ratio": 1}))
MODEL = Decoder(SHAPE, Precision(kv_cache="int8"), Schedule())


def test_options_are_read_as_xla_takes_them():
    schedule = Schedule.of(
        Choices({"compiler_options": ("xla_a=true", "xla_b=false", "xla_c=-3", "xla_d=x=y"), "layers": "unroll"})
    )
    assert schedule.options == {"xla_a": True, "xla_b": False, "xla_c": -3, "xla_d": "x=y"}
    assert (schedule.layers, schedule.matmul) == ("unroll", "dot")
    assert Schedule.of(Choices({})) == Schedule()


@pytest.mark.parametrize("value", ["xla_a=true", ("xla_a",), (1,), ("a=1", "b")])
def test_what_is_no_list_of_options_is_refused(value: object):
    why = KNOBS["compiler_options"].refusal(value)  # pyright: ignore[reportArgumentType]
    assert why is not None
    assert "xla_cpu_enable_fast_math=true" in why or "not a list of compiler options" in why


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_program_is_flat_and_writes_its_cache_in_place(phase):
    program = Program(MODEL, phase, batch=2, capacity=12, chunk=4)
    compiled = program.compile({})
    memory = compiled.memory_analysis()
    cache_bytes = sum(spec.size * spec.dtype.itemsize for spec in program.cache)
    assert memory is not None
    assert memory.alias_size_in_bytes >= cache_bytes > 0

    weights = pack(MODEL, random_weights(SHAPE, 0))
    assert list(program.params) == sorted(weights)
    params = [jnp.asarray(weights[path]) for path in program.params]
    cache = [jnp.zeros(spec.shape, spec.dtype) for spec in program.cache]
    tokens = np.array([7, 200], np.int32)
    inputs = [tokens[:, None], np.int32(0)]
    if phase == "prefill":
        inputs = [np.array([[7, 0, 0, 0], [200, 0, 0, 0]], np.int32), np.int32(0), np.int32(1)]
    logits, *written = compiled(*params, *cache, *inputs)
    if phase == "decode":
        logits, chosen, *written = logits[:, 0], *written
        np.testing.assert_array_equal(chosen, tokens[:, None])
    assert [(one.shape, one.dtype) for one in written] == [(spec.shape, spec.dtype) for spec in program.cache]
    assert all(array.is_deleted() for array in cache)
    assert not any(array.is_deleted() for array in params)
    expected = jax.jit(lambda p: bind(MODEL, p).score(jnp.asarray(tokens[:, None])))(weights)[:, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_where_the_compiler_chooses_layouts_arrays_are_placed_as_it_says(phase):
    """The compiler for CPUs chooses the default, so that results are the same to the bit."""
    plain = Program(MODEL, phase, batch=2, capacity=12, chunk=4)
    program = replace(
        plain, model=Decoder(SHAPE, MODEL.precision, Schedule(boundary="compiler", fuse_limit="products"))
    )
    step = replace(program, phase="decode", chunk=1)
    compiled = program.compile({}, step.formats(step.compile({})))
    assert len(program.formats(compiled)) == len(program.params) + len(program.cache)
    (params, cache), (_, own) = weights_and_cache(plain), weights_and_cache(plain)
    placed = [jax.device_put(*one) for one in zip([*params, *cache], program.formats(compiled), strict=True)]
    inputs = [jnp.zeros(spec.shape, spec.dtype) for spec in program.inputs[:-1]] + [jnp.int32(1)]
    expected = plain.compile({})(*params, *own, *inputs)
    for found, wanted in zip(compiled(*placed, *inputs), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_unknown_compiler_option_is_a_rejection():
    with pytest.raises(Rejected, match="does not compile"):
        Program(MODEL, "decode", batch=1, capacity=4).compile({"xla_of_nobody": True})


def weights_and_cache(program: Program) -> tuple[list[jax.Array], list[jax.Array]]:
    weights = pack(MODEL, random_weights(SHAPE, 0))
    return [jnp.asarray(weights[path]) for path in program.params], [
        jnp.zeros(spec.shape, spec.dtype) for spec in program.cache
    ]


def test_several_steps_of_one_call_are_as_many_calls():
    one, many = (Program(MODEL, "decode", batch=2, capacity=12, steps=steps) for steps in (1, 4))
    params, cache = weights_and_cache(one)
    run, expected, chosen = one.compile({}), [], np.array([7, 200], np.int32)
    given = [chosen]
    for position in range(4):
        logits, _, *cache = run(*params, *cache, chosen[:, None], np.int32(position))
        expected.append(np.asarray(logits)[:, 0])
        chosen = expected[-1].argmax(axis=-1).astype(np.int32) if position != 1 else np.array([3, 4], np.int32)
        given.append(chosen)

    params, cache = weights_and_cache(many)
    tokens = np.array([[7, -1, 3, -1], [200, -1, 4, -1]], np.int32)
    silent = np.zeros((3, 2, 256), np.float32)
    logits, taken, *_ = many.compile({})(*params, *cache, tokens, np.int32(0), silent)
    np.testing.assert_array_equal(taken, np.stack(given[:4], axis=1))
    np.testing.assert_allclose(logits, np.stack(expected, axis=1), atol=1e-5 * float(np.abs(expected).max()))


def test_noise_decides_what_is_not_given():
    program = Program(MODEL, "decode", batch=1, capacity=12, steps=3)
    params, cache = weights_and_cache(program)
    noise = np.zeros((2, 1, 256), np.float32)
    noise[0, 0, 17] = noise[1, 0, 99] = 1e6
    _, taken, *_ = program.compile({})(*params, *cache, np.array([[7, -1, -1]], np.int32), np.int32(0), noise)
    assert np.asarray(taken).tolist() == [[7, 17, 99]]
