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
    steps, last = manifest["steps"], np.asarray(logits)[0]
    for position in range(len(data), len(data) + tokens, steps):
        given = np.full((batch, steps), -1, np.int32)
        given[:, 0] = (last + _noise(temperature, rng)).argmax()
        inputs = [jnp.asarray(given), jnp.int32(position)]
        if steps > 1:
            noise = [_noise(temperature, rng) for _ in range(steps - 1)]
            inputs.append(jnp.asarray(np.broadcast_to(np.array(noise)[:, None], (steps - 1, batch, 256)), jnp.float32))
        logits, chosen, *cache = artifact.run["decode"](*artifact.params, *cache, *inputs)
        last = np.asarray(logits)[0, -1]
        out += bytes(np.asarray(chosen)[0].tolist())
    del out[tokens:]
    return Generation(out.decode(errors="replace"), tokens, prefilled - start, time.perf_counter() - prefilled)


def _noise(temperature: float, rng: np.random.Generator) -> np.ndarray:
    """What makes the largest of 256 logits a draw at this temperature (Gumbel 1954)."""
    return temperature * rng.gumbel(size=256) if temperature > 0 else np.zeros(256)
