"""Programs: what they hold, that they write in place, and that threads leave no trace in what they give."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosearch.core.errors import Rejected
from cosearch.kernels import CachedAttention, Product
from cosearch.kernels.cpu import operations
from cosearch.kernels.cpu.operations import Factor
from cosearch.kernels.cpu.program import Kernel, Program, kernels_in, load
from cosearch.latency.hlo import Module
from cosearch.precision import FORMATS
from tests import tiny

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.usefixtures("quick_kernels"),
]

SIZES = CachedAttention(1, 2, 2, 32, 512, "float32", "bshd")


def product_of(x: jax.Array, stored: dict[str, jax.Array], columns: int, form: str = "float32") -> jax.Array:
    program = Program()
    out = program.result((x.shape[0], columns))
    product = Product(x.shape[0], x.shape[1], columns, form, "out_in")
    operations.matmul(program, program.argument(x), [Factor(stored, columns)], product, out, jnp.ones(x.shape[1]))
    return program.call()[0]


def packed(form: str, rows: int, columns: int, seed: int = 0) -> dict[str, jax.Array]:
    weights = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return jax.tree.map(jnp.asarray, FORMATS[form].pack(weights, "out_in"))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel("prepare"),
        Kernel("read", (), ("avx2",)),
        Kernel("matmul", (("FORMAT", "int8"), ("INPUT", "INT8_INPUT"), ("ROWS", 2), ("TOKENS", 8))),
        Kernel("combine", (), ()),
    ],
)
def test_a_kernels_name_says_all_of_it(kernel: Kernel):
    assert Kernel.of_name(kernel.name) == kernel
    assert Kernel.of_name(kernel.name).number == kernel.number
    assert 0 <= kernel.number < 2**63


def test_a_program_that_was_made_from_other_sources_is_refused():
    """Its buffers and parameters may be those of another version."""
    made = replace(Kernel("combine"), state="0123456789abcdef")
    assert Kernel.of_name(made.name) == made and made.number != Kernel("combine").number
    with pytest.raises(Rejected, match="'combine' was made from other sources than are here"):
        load(made)


@pytest.mark.parametrize("name", ["", "matmul", "a:b:c", "../a::avx2", "a:B=1;c:avx2", "a:B=-I/x y:avx2", "a::avx2\n"])
def test_what_names_no_kernel_is_rejected(name: str):
    with pytest.raises(Rejected, match="names no native kernel"):
        Kernel.of_name(name)


def test_temporaries_of_a_scope_are_used_again():
    program = Program()
    first = program.temporary(100)
    with program.scope():
        second, third = program.temporary(1), program.temporary(1000)
        with program.scope():
            inner = program.temporary(64)
    again = program.temporary(65)
    assert (first.at, second.at, third.at, inner.at) == (0, 128, 192, 1216)
    assert again.at == second.at
    assert program._arena == 1216 + 64, "as much as was ever used at once"


def test_an_array_is_one_argument_however_often_it_is_read():
    program, array, other = Program(), jnp.ones(4), jnp.ones(4)
    assert program.argument(array) == program.argument(array) != program.argument(other)


def written(cache: dict[str, jax.Array], x: jax.Array, slot: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """One token's keys and values, written to a cache of both."""
    program = Program()
    out = program.result((1, 2 * 32))
    held = [{"values": program.updated(cache[name])} for name in ("key", "value")]
    turns = [program.argument(one) for one in (jnp.ones((1, 16)), jnp.zeros((1, 16)))]
    query, *_ = operations.heads(
        *(program, program.argument(x), SIZES, 1, (turns[0], turns[1]), None, program.argument(slot)),
        *((held[0], held[1]), False, False),
    )
    length = program.argument(slot[0] + 1)
    operations.attend(program, query, SIZES, (held[0], held[1]), length, out)
    attended, key, value = program.call()
    return [key, value], attended


def copies(compiled: jax.stages.Compiled) -> list[int]:
    """The bytes of each copy of the cache."""
    made = Module(compiled.as_text() or "").copies()
    return [copy.shape.plain_bytes for copy in made if copy.shape.sizes == (1, 512, 2, 32)]


def test_an_updated_array_is_written_where_it_lies():
    cache = {name: jnp.zeros((1, 512, 2, 32)) for name in ("key", "value")}
    x, slot = normal(1, 6 * 32), jnp.array([5], jnp.int32)
    donated = jax.jit(written, donate_argnums=0).lower(cache, x, slot).compile()
    assert copies(donated) == []
    kept = jax.jit(written).lower(cache, x, slot).compile()
    assert copies(kept) == [4 * 512 * 2 * 32] * 2
    (key, value), _ = kept(cache, x, slot)
    assert not np.asarray(cache["key"]).any(), "what is not given away stays as it was"
    places = {array.unsafe_buffer_pointer() for array in cache.values()}
    new, _ = donated(cache, x, slot)
    assert {array.unsafe_buffer_pointer() for array in new} == places
    for one, other, first in ((new[0], key, 64), (new[1], value, 128)):
        assert np.array_equal(one, other)
        assert np.array_equal(np.asarray(one)[0, 5].ravel(), np.asarray(x)[0, first : first + 64])
        assert np.count_nonzero(np.asarray(one).any(axis=(2, 3))) == 1


def test_a_lowered_text_names_the_kernels_that_it_calls():
    def both(x: jax.Array, one: dict[str, jax.Array], other: dict[str, jax.Array]) -> jax.Array:
        return product_of(x, one, 48) + product_of(x, other, 48, "int8")

    text = jax.jit(both).lower(normal(1, 64), packed("float32", 64, 48), packed("int8", 64, 48)).as_text()
    names = kernels_in(text)
    assert names == sorted(set(names))
    kernels = [Kernel.of_name(name) for name in names]
    assert [kernel.source for kernel in kernels] == ["matmul", "matmul", "prepare"]
    assert {dict(kernel.macros).get("FORMAT") for kernel in kernels} == {None, "float32", "int8"}
    assert kernels_in(jax.jit(jnp.sin).lower(1.0).as_text()) == []


RUN = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from cosearch.kernels.cpu import program
folder = Path(sys.argv[1])
program._runtime()
device = jax.devices()[0]
run = device.client.deserialize_executable((folder / "executable").read_bytes(), [device], None)
inputs = [jnp.load(path) for path in sorted(folder.glob("*.npy"))]
for name in sys.argv[2:]:
    program.load(program.Kernel.of_name(name))
    try:
        (out,) = run.execute_sharded(inputs).disassemble_into_single_device_arrays()
        print(float(out[0].sum()))
    except jax.errors.JaxRuntimeError as error:
        print(error)
"""


def test_a_process_runs_what_it_has_loaded_and_says_what_it_has_not(tmp_path: Path):
    x, stored = normal(1, 64), packed("float32", 64, 48)
    lowered = jax.jit(lambda x, values: product_of(x, {"values": values}, 48)).lower(x, stored["values"])
    executable = lowered.compile().runtime_executable()
    assert executable is not None
    (tmp_path / "executable").write_bytes(executable.serialize())
    for name, array in (("0", x), ("1", stored["values"])):
        np.save(tmp_path / f"{name}.npy", array)
    names = kernels_in(lowered.as_text())

    command = [sys.executable, "-c", RUN, str(tmp_path), *names]
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    refused, result = told.stdout.splitlines()
    assert f"a kernel of this program is not loaded in this process: one of {';'.join(names)}" in refused
    assert float(result) == pytest.approx(float(product_of(x, stored, 48).sum()), rel=1e-5)


def test_thousands_of_small_calls_give_the_same_bits():
    # 9 tokens of 96 columns are several chunks, and several operations follow each other.
    x, stored = normal(9, 512), packed("float32", 512, 512)
    run = jax.jit(lambda x: product_of(product_of(product_of(x, stored, 512), stored, 512), stored, 512))
    first = np.asarray(run(x)).tobytes()
    others = [run(x) for _ in range(1500)]
    assert {np.asarray(one).tobytes() for one in others} == {first}


def test_threads_leave_denormals_the_same():
    # Smaller than any normal number: threads that treat them differently would give other bits by who came first.
    x, stored = normal(3, 512) * 1e-30, packed("float32", 512, 256)
    stored = {"values": stored["values"] * jnp.float32(1e-9)}

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        program = Program()
        out = program.result((3, 256))
        product = Product(3, 512, 256, "float32", "out_in")
        operations.matmul(program, program.argument(x), [Factor(stored, 256)], product, out)
        return program.call()[0]

    assert len({np.asarray(run(x)).tobytes() for _ in range(300)}) == 1


def test_threads_of_python_may_call_at_once():
    stored = packed("int8", 256, 320)
    run = jax.jit(lambda x: product_of(x, stored, 320, "int8"))
    inputs = [normal(4, 256, seed=seed) for seed in range(2)]
    right = [np.asarray(run(x)) for x in inputs]
    wrong: list[int] = []

    def call(which: int) -> None:
        for _ in range(400):
            if not np.array_equal(run(inputs[which]), right[which]):
                wrong.append(which)

    threads = [threading.Thread(target=call, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
