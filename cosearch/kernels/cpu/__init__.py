"""C++ kernels for CPUs, compiled where they run and called on XLA's own threads.

`native/` has the sources, `build.py` compiles and keeps them, `program.py` strings operations together into one call,
`operations.py` says what each operation takes, `tiles.py` what is tuned. Here they are as single kernels;
`cosearch/architecture/fused.py` makes whole layers of them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.kernels import ATTENTION_KERNELS, MATMUL_KERNELS, CachedAttention, Product, Stored
from cosearch.kernels.cpu import build, operations
from cosearch.kernels.cpu.operations import Factor
from cosearch.kernels.cpu.program import Program


class Matmul:
    """One product as a native call."""

    platforms = frozenset({"cpu"})
    layout = "out_in"

    def why_unavailable(self) -> str | None:
        return why_unavailable()

    def why_not(self, product: Product) -> str | None:
        return operations.why_no_product(product)

    def __call__(self, x: jax.Array, stored: Stored, product: Product) -> jax.Array:
        program = Program()
        out = program.result((product.tokens, product.columns))
        factors = [Factor(stored, product.columns)]
        operations.matmul(program, program.argument(x.astype(jnp.float32)), factors, product, out)
        return program.call()[0].astype(x.dtype)


class Attention:
    """Decode attention as a native call."""

    platforms = frozenset({"cpu"})

    def why_unavailable(self) -> str | None:
        return why_unavailable()

    def why_not(self, attention: CachedAttention) -> str | None:
        return operations.why_no_attention(attention)

    def __call__(
        self, query_BHD: jax.Array, key: Stored, value: Stored, length: jax.Array, attention: CachedAttention
    ) -> jax.Array:
        program = Program()
        query = query_BHD.astype(jnp.float32) * np.float32(attention.head_dim**-0.5)
        at = program.argument(query.reshape(attention.batch, -1))
        out = program.result((attention.batch, attention.heads * attention.head_dim))
        cache = tuple({part: program.argument(array) for part, array in tensor.items()} for tensor in (key, value))
        operations.attend(program, at, attention, (cache[0], cache[1]), program.argument(jnp.int32(length)), out)
        return program.call()[0].reshape(query_BHD.shape).astype(query_BHD.dtype)


def why_unavailable() -> str | None:
    """Why no C++ kernel can be compiled and run here; None where they can."""
    return build.why_unavailable()


def read(array: jax.Array) -> jax.Array:
    """Sums of parts of an array of float32: what takes no less time than to read it with all threads."""
    program = Program()
    operations.read(program, array)
    return program.call()[0]


MATMUL_KERNELS.register("cpp")(Matmul())
ATTENTION_KERNELS.register("cpp")(Attention())
