"""llama.cpp's side: writes a GGUF of random weights, and times it. Needs `xllamacpp` and `gguf` (not cosearch).

usage: python peer_llama_cpp.py FILE.gguf SIZES TYPE
SIZES is JSON of width, layers, heads, kv_heads and hidden; TYPE is F32, BF16, Q8_0 or Q4_0.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from side import serve

_VOCABULARY = 512
_MOST_CONTEXT = 4096 + 256


def write(path: Path, sizes: dict[str, int], kind: str) -> None:
    """A model of the Llama architecture with random weights, its output matrix of its own."""
    width, hidden, head_dim = sizes["width"], sizes["hidden"], sizes["width"] // sizes["heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(_VOCABULARY)
    bytes_ = [f"<0x{value:02X}>".encode() for value in range(256)]
    tokens = [b"<unk>", b"<s>", b"</s>", *bytes_]
    tokens += [f"t{index}".encode() for index in range(_VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * _VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (_VOCABULARY - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            stored = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

    add("token_embd.weight", _VOCABULARY, width)
    add("output_norm.weight", width)
    add("output.weight", _VOCABULARY, width)
    for layer in range(sizes["layers"]):
        block = f"blk.{layer}."
        add(block + "attn_norm.weight", width)
        add(block + "ffn_norm.weight", width)
        add(block + "attn_q.weight", width, width)
        add(block + "attn_k.weight", sizes["kv_heads"] * head_dim, width)
        add(block + "attn_v.weight", sizes["kv_heads"] * head_dim, width)
        add(block + "attn_output.weight", width, width)
        add(block + "ffn_gate.weight", hidden, width)
        add(block + "ffn_up.weight", hidden, width)
        add(block + "ffn_down.weight", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    path, sizes, kind = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    if not path.is_file():
        draft = path.with_suffix(".draft")
        write(draft, sizes, kind)
        draft.rename(path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = _MOST_CONTEXT
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.warmup = True
    server = xllamacpp.Server(params)

    def complete(context: int, tokens: int, reuse: bool) -> dict[str, float]:
        prompt = [1] + [100 + index % 100 for index in range(context - 1)]
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": reuse}
        reply = server.handle_completions(request)
        return (json.loads(reply) if isinstance(reply, str) else reply)["timings"]

    def decode(context: int, tokens: int) -> list[float]:
        timings = complete(context, tokens, True)
        return [1 / timings["predicted_per_second"]]

    def prefill(tokens: int) -> list[float]:
        return [tokens / complete(tokens, 1, False)["prompt_per_second"]]

    serve({"decode": decode, "prefill": prefill})


if __name__ == "__main__":
    main()
