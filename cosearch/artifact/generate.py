"""Generate text from an artifact."""

import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cosearch.artifact.load import Artifact
from cosearch.core.errors import UserError


@dataclass(frozen=True)
class Generation:
    """The bytes that follow a prompt, and how fast they came."""

    text: str
    tokens: int
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of decoding alone."""
        return self.tokens / self.decode_s


def generate(artifact: Artifact, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> Generation:
    """Continue `prompt` by `tokens` bytes: the likeliest each, or drawn at `temperature`.

    Raises:
        UserError: the prompt is empty, prompt and tokens together do not fit into the cache, or the temperature or
            the seed is out of range.
    """
    manifest = artifact.manifest
    data = prompt.encode()
    batch, capacity, chunk = manifest["batch"], manifest["capacity"], manifest["prefill_chunk"]
    if not data:
        raise UserError("prompt: is empty; give at least one byte to continue")
    if tokens < 1 or len(data) + tokens > capacity:
        raise UserError(
            f"tokens={tokens}: must be at least 1 and, with the {len(data)} bytes of the prompt, at most {capacity}, "
            "which is what the artifact's cache holds"
        )
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: must be a number of at least 0")
    if seed < 0:
        raise UserError(f"seed={seed}: must be at least 0")
    rng = np.random.default_rng(seed)
    cache, logits = artifact.empty_cache(), jnp.zeros((batch, 256))
    start = time.perf_counter()
    for position in range(0, len(data), chunk):
        piece = data[position : position + chunk]
        padded = np.zeros((batch, chunk), np.int32)
        padded[:, : len(piece)] = np.frombuffer(piece, np.uint8)
        inputs = (jnp.asarray(padded), jnp.int32(position), jnp.int32(len(piece)))
        logits, *cache = artifact.run["prefill"](*artifact.params, *cache, *inputs)
    jax.block_until_ready(logits)
    prefilled = time.perf_counter()
    out = bytearray()
    for position in range(len(data), len(data) + tokens):
        out.append(_choose(np.asarray(logits)[0], temperature, rng))
        token = jnp.full((batch,), out[-1], jnp.int32)
        logits, *cache = artifact.run["decode"](*artifact.params, *cache, token, jnp.int32(position))
    jax.block_until_ready(logits)
    return Generation(out.decode(errors="replace"), tokens, prefilled - start, time.perf_counter() - prefilled)


def _choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    odds = np.exp(scaled - scaled.max())
    return int(rng.choice(len(odds), p=odds / odds.sum()))
