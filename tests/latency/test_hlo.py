"""The parser of optimised HLO, on what XLA makes for this processor and on lines of what it makes for others."""

import jax
import jax.numpy as jnp
import pytest

from cosearch.latency.hlo import HloFeatures, Kernel, Module

F32 = 4


def compiled(function, *shapes: tuple[int, ...], **more) -> jax.stages.Compiled:
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **more).lower(*specs).compile()


def features(function, *shapes: tuple[int, ...], **more) -> HloFeatures:
    return HloFeatures.of(compiled(function, *shapes, **more), [])


def kernels(made: jax.stages.Compiled) -> list[Kernel]:
    return list(Module(made.as_text() or "").kernels())


def module(*lines: str) -> Module:
    body = "\n".join(f"  {line}" for line in lines)
    return Module(f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def test_a_fusion_reads_its_operands_and_writes_its_result():
    made = compiled(lambda x, y: jnp.exp(x * y) + x, (1000, 300), (1000, 300))
    (kernel,), found = kernels(made), HloFeatures.of(made, [])
    assert kernel.opcode == "fusion" and kernel.runs == 1
    assert (kernel.read_bytes, kernel.written_bytes) == (2 * 300_000 * F32, 300_000 * F32)
    assert found.launches == found.fusions == 1 and found.custom_calls == found.estimated_cycles == 0
    assert found.moved_bytes == 3 * 300_000 * F32


def test_what_a_loop_runs_counts_as_often_as_it_does():
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.sort(y), x)

    sorts = [kernel for kernel in kernels(compiled(loop, (4096,))) if kernel.opcode == "sort"]
    assert sum(kernel.runs for kernel in sorts) == 7


def test_a_loop_whose_runs_are_not_told_runs_as_its_condition_says():
    """As the compiler for TPUs leaves it."""
    found = Module("""
%body (t: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %t = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[1000]{0:T(1024)} get-tuple-element(%t), index=1
  %e = f32[1000]{0:T(1024)} exponential(%x)
  ROOT %r = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) tuple(%i, %e)
}

%condition (t: (s32[], f32[1000])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %c = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %c), direction=LT
}

ENTRY %main (p: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %p = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) while(%p), condition=%condition, body=%body
}
""")
    (kernel,) = [kernel for kernel in found.kernels() if kernel.opcode == "exponential"]
    assert kernel.runs == 6


def test_of_stacked_weights_a_step_of_a_loop_reads_its_own():
    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, w: (y * w + 1, None), x, weights)[0]

    found = features(layers, (1 << 16,), (10, 1 << 16))
    once = (1 << 16) * F32
    assert 10 * 3 * once <= found.moved_bytes <= 10 * 6 * once, "not the 10 layers in each of 10 steps"


def test_a_fusion_beside_others_counts_where_it_starts():
    found = Module("""HloModule m

%slice (stacked: bf16[8,64,64], i: s32[]) -> bf16[1,64,64] {
  %stacked = bf16[8,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = bf16[1,64,64]{2,1,0} dynamic-slice(%stacked, %i, %z, %z), dynamic_slice_sizes={1,64,64}
}

ENTRY %main (p: bf16[8,64,64], q: s32[]) -> bf16[1,64,64] {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  %q = s32[] parameter(1)
  %t = ((bf16[8,64,64]{2,1,0}, s32[]), bf16[1,64,64]{2,1,0}, u32[]) fusion-start(%p, %q), kind=kLoop, calls=%slice
  ROOT %d = bf16[1,64,64]{2,1,0} fusion-done(%t)
}
""")
    (kernel,) = found.kernels()
    assert (kernel.opcode, kernel.written_bytes) == ("fusion", 64 * 64 * 2)
    assert kernel.read_bytes <= 64 * 64 * 2 + 3 * F32, "a layer's weights, not those of all"


def test_what_is_written_in_place_is_written_alone():
    def write(cache: jax.Array, x: jax.Array) -> jax.Array:
        return cache.at[3].set(jnp.tanh(x) * 2)

    spec = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    given = compiled(write, (512, 1024), (1024,), donate_argnums=0)
    assert HloFeatures.of(given, [spec]).copied_bytes == 0
    assert HloFeatures.of(given, [spec]).moved_bytes < 10 * 1024 * F32
    kept = HloFeatures.of(compiled(write, (512, 1024), (1024,)), [spec])
    assert kept.copied_bytes == 512 * 1024 * F32
    assert kept.moved_bytes >= 2 * 512 * 1024 * F32


def test_a_transposed_cache_counts_as_copied():
    spec = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    found = module("%p = f32[64,128]{1,0} parameter(0)", "ROOT %t = f32[128,64]{1,0} transpose(%p), dimensions={1,0}")
    assert found.copied_bytes([spec]) == 64 * 128 * F32
    assert found.copied_bytes([jax.ShapeDtypeStruct((64, 127), jnp.float32)]) == 0


def test_copies_are_found_with_their_dtypes():
    found = module(
        "%copy.1 = f32[2,32,4]{2,1,0} copy(%p)",
        "%c = (bf16[3]{0}, s8[4]{0}) fusion(%copy.1), kind=kLoop",
        "%d = bf16[] copy(%p)",
        "%e = f8e4m3fn[5]{0} copy(%p)",
        "ROOT %g = u8[6]{0} copy(%p)",
    )
    assert [(one.shape.dtype, one.shape.sizes, one.shape.plain_bytes) for one in found.copies()] == [
        ("float32", (2, 32, 4), 1024),
        ("bfloat16", (), 2),
        ("float8_e4m3fn", (5,), 5),
        ("uint8", (6,), 6),
    ]
    assert list(Module("").copies()) == []


def test_on_a_tpu_arrays_have_padding_and_memory_spaces():
    """On v5e: what is in S(1) is on the chip, and tiles are of 8 x 128."""
    found = module(
        "%p = f32[256,4,32]{0,2,1:T(8,128)} parameter(0)",
        "%q = f32[100,64]{1,0:T(8,128)} parameter(1)",
        "%s = (f32[100,64]{1,0:T(8,128)S(1)}, f32[100,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%q)",
        "%d = f32[100,64]{1,0:T(8,128)S(1)} copy-done(%s)",
        '%b = f32[256,4,32]{0,2,1:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"',
        '%k = f32[64]{0:T(128)} custom-call(%p, %d), custom_call_target="tpu_custom_call"',
        "ROOT %w = f32[256,4,32]{0,2,1:T(8,128)} copy(%b)",
    )
    start, kernel, copy = found.kernels()
    assert (start.read_bytes, start.written_bytes) == (104 * 128 * F32, 0)
    assert (kernel.read_bytes, kernel.written_bytes) == (256 * 4 * 32 * F32, 128 * F32)
    assert kernel.target == "tpu_custom_call"
    assert (copy.read_bytes, copy.written_bytes) == (0, 256 * 4 * 32 * F32)


def test_the_cycles_that_the_compiler_for_tpus_expects_are_read():
    line = 'ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"2098","x":[]}'
    (kernel,) = module("%p = f32[8]{0} parameter(0)", line).kernels()
    assert kernel.cycles == 2098


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_a_librarys_workspace_is_not_written(target: str):
    found = module(
        "%p = bf16[64,64]{1,0} parameter(0)",
        f'ROOT %c = (bf16[64,64]{{1,0}}, s8[4194304]{{0}}) custom-call(%p, %p), custom_call_target="{target}"',
    )
    (kernel,) = found.kernels()
    assert (kernel.read_bytes, kernel.written_bytes) == (2 * 64 * 64 * 2, 64 * 64 * 2)


def test_features_survive_json():
    found = features(lambda x: jnp.sort(x) + 1, (4096,))
    assert HloFeatures.from_json(found.to_json()) == found
