"""vLLM's side: a Llama of random bfloat16 weights on the CPU. Needs `vllm` for CPUs (not cosearch).

usage: python peer_vllm.py FOLDER SIZES
SIZES is JSON of width, layers, heads, kv_heads and hidden.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from side import serve

_VOCABULARY = 512


def main() -> None:
    folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "intermediate_size": sizes["hidden"],
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    import vllm

    model = vllm.LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1280,
        max_num_batched_tokens=2048, enforce_eager=False, enable_prefix_caching=True,
    )  # fmt: skip

    def generate(context: int, batch: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [(1 + sequence + index * (3 + sequence)) % 500 for index in range(context)]}
            for sequence in range(batch)
        ]
        sampling = vllm.SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        start = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def decode(context: int, batch: int, tokens: int) -> list[float]:
        """The prompts are cached after the first time; what is left of them and the first token is taken off."""
        generate(context, batch, 1)
        short, whole = generate(context, batch, 1), generate(context, batch, 1 + tokens)
        return [(whole - short) / tokens]

    serve({"decode": decode})


if __name__ == "__main__":
    main()
