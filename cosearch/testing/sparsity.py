"""The contract of sparsity patterns: what is left is what they say, and compressed matrices are multiplied rightly."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosearch.architecture.decoder import pack, params_spec, plain_decoder, random_weights, unpack
from cosearch.architecture.linear import INDICES, Linear, MatrixStorage
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.schedule.matmul import LAYOUTS, MATMULS
from cosearch.sparsity import PATTERNS
from cosearch.testing.architecture import CASES, SMALL, check_decoding
from cosearch.testing.common import NONE, close, difference, require, same_arrays


def check_pattern(name: str, choices: Mapping[str, Value] = NONE) -> None:
    """Check the sparsity pattern `name` on small decoders: what it says is left is what it leaves, and that runs.

    `choices` replace defaults of its knobs. It may reject some architectures, but not all of the plain ones. What it
    leaves out of a matrix that it compresses must be zero in what `prune` gives, and only that must be lost.
    """
    pattern = PATTERNS[name]
    defaults = {knob: declared.default for knob, declared in pattern.knobs.items()}
    chosen = {**defaults, **choices, "pattern": name}
    last, reasons = None, []
    for attention in ("mha", "gqa", "mqa"):
        dense = DecoderShape.of(Choices({**SMALL, "attention": attention}))
        try:
            shape = pattern.shape(dense, chosen)
        except Rejected as rejection:
            reasons.append(str(rejection))
            continue
        weights, moments = random_weights(dense, 5), random_moments(dense)
        before, observed = _copied(weights), _copied(moments)
        pruned, again = (pattern.prune(weights, dense, chosen, moments) for _ in range(2))
        _equal_weights(weights, before, "prune leaves the weights that it is given as they were")
        _equal_weights(moments, observed, "prune leaves the moments that it is given as they were")
        _equal_weights(pruned, again, "prune gives the same twice")
        if not pattern.needs_moments(chosen):
            blind = pattern.prune(weights, dense, chosen, {})
            _equal_weights(pruned, blind, "prune reads no moments where it says that it needs none")
        sizes = {**shape.linears(), **{path: array.shape for path, array in shape.vectors().items()}}
        made = {path: array.shape for path, array in pruned.items()}
        require(made == sizes, f"prune leaves what shape says, {attention}: {difference(sizes, made)}")
        require(
            shape.parameters <= dense.parameters, f"not more is left than there was, {attention}: {shape.parameters}"
        )
        model = plain_decoder(shape)
        params = pack(model, pruned)
        same_arrays("a parameter of the pruned decoder", params_spec(model), params)
        stored = sum(array.size for path, array in params.items() if not path.endswith(INDICES))
        require(stored == shape.parameters, f"parameters are what is stored, {shape.parameters}, not {stored}")
        for path, array in unpack(model, params).items():
            require(np.array_equal(array, pruned[path]), f"what is stored of {path} is what prune leaves of it")
        last = shape, pruned
    if last is None:
        raise AssertionError(f"one of mha, gqa and mqa must be prunable with {chosen}: {reasons}")
    shape, pruned = last
    for path in {sizes: path for path, sizes in shape.linears().items() if shape.compression_of(path)}.values():
        for layout in LAYOUTS:
            _check_compressed(pruned[path], MatrixStorage(layout=layout, compression=shape.compression_of(path)))
    check_decoding(shape, CASES[1])


def random_moments(shape: DecoderShape) -> dict[str, np.ndarray]:
    """What might be the second moments of all matrices' inputs: those of inputs that correlate."""
    rng, found = np.random.default_rng(7), {}
    for path, (*stack, rows, _) in shape.linears().items():
        inputs = rng.standard_normal((*stack, 2 * rows, rows)) @ rng.standard_normal((rows, rows))
        found[path] = inputs.swapaxes(-1, -2) @ inputs / (2 * rows)
    return found


def _check_compressed(matrix: np.ndarray, storage: MatrixStorage) -> None:
    """Check a pruned matrix [in, out] in float32, alone and in a stack: what is stored of it, and its products."""
    at = f"of {matrix.shape} in {storage.layout}"
    why = storage.why_not(matrix.shape)
    require(why is None, f"a matrix {at} that is pruned for it can be compressed, and not so: {why}")
    stored = storage.pack(matrix)
    same_arrays(f"a part {at}", storage.spec(matrix.shape), stored)
    require(np.array_equal(storage.unpack(stored, matrix.shape), matrix), f"compressing loses nothing {at}")
    dense = jax.jit(_linear(matrix, storage).matrix, static_argnums=0)("float32")
    require(np.array_equal(dense, matrix), f"dense is what expand is {at}")
    rng = np.random.default_rng(8)
    xs = [
        rng.standard_normal((rows, len(matrix))).astype(dtype)
        for rows in (1, 40)
        for dtype in (np.float32, jnp.bfloat16)
    ]
    for lowering in MATMULS:
        storage = replace(storage, lowering=lowering)
        one, stack = _linear(matrix, storage), _linear(np.stack([matrix, -2 * matrix]), storage)
        # All in one program, for compiling is what takes the time here.
        outs = jax.jit(lambda *xs, one=one, stack=stack: [(one(x), stack.select(jnp.int32(1), x)) for x in xs])(*xs)
        for x, pair in zip(xs, outs, strict=True):
            by = f"{at} by {lowering}, for {len(x)} rows of {x.dtype}"
            for out, factor in zip(pair, (1, -2), strict=True):
                require(out.dtype == x.dtype, f"a product keeps the dtype of x {by}, not {out.dtype}")
                tolerance, expected = 1e-5 if x.dtype == np.float32 else 2e-2, factor * (x.astype(np.float64) @ matrix)
                close(out, expected, tolerance, f"a product from the compressed form is that with the matrix {by}")


def _linear(matrix: np.ndarray, storage: MatrixStorage) -> Linear:
    linear = Linear(matrix.shape, storage)
    for part, array in storage.pack(matrix).items():
        linear.stored[part] = nnx.Param(jnp.asarray(array))
    return linear


def _copied(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: array.copy() for path, array in arrays.items()}


def _equal_weights(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], rule: str) -> None:
    same = a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)
    require(same, rule)
