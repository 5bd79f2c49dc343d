"""vLLM 0.33.0 loads Hugging Face folders of any sizes: what its Marlin kernels multiply it pads to the whole tiles that
they need, since June 2026 (https://github.com/vllm-project/vllm/pull/45295)."""

from cosearch.export import STACKS
from cosearch.export.hugging_face import HuggingFace

STACKS.register("vllm")(HuggingFace())
