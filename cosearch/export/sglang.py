"""SGLang 0.5.23 loads Hugging Face folders whose sizes its kernels take: it pads only nvfp4.

Its Marlin kernels multiply whole tiles of 128 x 64 or 64 x 128 (`kernels/jit/csrc/gemm/marlin/gptq_marlin.cuh`), and
`int8_scaled_mm` rows of 16 and columns of 8 (`sgl-kernel/csrc/gemm/int8_gemm_kernel.cu`). Others of its kernels for
float8 by float8 take the sizes that the fastest does not.
"""

from cosearch.export import STACKS
from cosearch.export.hugging_face import HuggingFace

_MARLIN = ((128, 64), (64, 128))


STACKS.register("sglang")(
    HuggingFace(
        {
            ("int8", "as_is"): _MARLIN,
            ("int8", "int8"): ((16, 8),),
            ("float8_e4m3", "as_is"): _MARLIN,
            ("int4_g32", "as_is"): _MARLIN,
            ("int4_g64", "as_is"): _MARLIN,
            ("int4_g128", "as_is"): _MARLIN,
        }
    )
)
