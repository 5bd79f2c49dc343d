"""A package of somebody else adds a number format and a proposer by entry points; nothing here knows of it."""

from pathlib import Path

from tests.tiny import install, python

FORMAT = '''
"""int8 with a power of two for its scale, so that reading back needs no product."""
import jax
import jax.numpy as jnp
import numpy as np

from cosearch.precision import FORMATS, refuse_not_finite
from cosearch.schedule.matmul import contract


class Pow2:
    weights, cache, activations = True, False, False
    inputs, calibrations = (), ("absmax",)

    def why_not(self, rows, columns):
        return None

    def spec(self, rows, columns, layout):
        shapes = {"values": (rows, columns), "exponent": (1, columns)}
        order = 1 if layout == "in_out" else -1
        return {part: jax.ShapeDtypeStruct(shape[::order], jnp.int8) for part, shape in shapes.items()}

    def pack(self, weights, layout, scale=None):
        refuse_not_finite(weights)
        xp = weights.__array_namespace__()
        absmax = abs(weights).max(axis=0, keepdims=True) if scale is None else scale * 127
        # The power of two at or above absmax / 127.
        part, exponent = xp.frexp(absmax)
        exponent = (exponent - 7 + (part > 127 / 128)).clip(-127, 127)
        parts = {"values": xp.rint(xp.ldexp(weights, -exponent)), "exponent": exponent}
        return {name: (a if layout == "in_out" else a.T).astype(xp.int8).copy() for name, a in parts.items()}

    def unpack(self, stored, layout):
        values = np.asarray(stored["values"], np.float64) * 2.0 ** np.asarray(stored["exponent"], np.float64)
        return values if layout == "in_out" else values.T

    def bound(self, weights):
        # Half a step, which is the power of two at or above absmax / 127.
        absmax = np.maximum(abs(weights).max(axis=0), 1e-30).astype(np.float64)
        return np.broadcast_to(2.0 ** np.ceil(np.log2(absmax / 127)) / 2, weights.shape)

    def dequantize(self, stored, layout, dtype):
        return jnp.ldexp(stored["values"].astype(jnp.float32), stored["exponent"].astype(jnp.int32)).astype(dtype)

    def matmul(self, x, stored, layout, lowering, inputs):
        product = contract(x, stored["values"], layout, lowering, out_dtype=jnp.float32)
        return jnp.ldexp(product, stored["exponent"].astype(jnp.int32).reshape(-1)).astype(x.dtype)

    def columns(self, stored, indices, layout, dtype):
        whole = self.dequantize(stored, layout, dtype)
        return whole[indices] if layout == "out_in" else jnp.moveaxis(whole[:, indices], 0, -1)


FORMATS.register("int8_pow2")(Pow2())
'''

PROPOSER = '''
"""Walks the space in order."""
from cosearch.proposers import PROPOSERS


@PROPOSERS.register("in_order")
class InOrder:
    def __init__(self, setting):
        self._seen = set()
        self._left = (one for raw in setting.space.points() if (one := setting.space.candidate(raw)))

    def ask(self, n):
        found = []
        while len(found) < n and (candidate := next(self._left, None)):
            if candidate.uid not in self._seen:
                self._seen.add(candidate.uid)
                found.append(candidate)
        return found

    def tell(self, trials):
        self._seen |= {trial.uid for trial in trials}
'''

ENTRY_POINTS = """
[cosearch.format]
int8_pow2 = acme_cosearch.pow2

[cosearch.proposer]
in_order = acme_cosearch.in_order
"""

SPACE = """
knobs:
  architecture.width: [32, 64]
  precision.weights: [float32, int8_pow2]
reference: {architecture.width: 32, precision.weights: int8_pow2}
"""

USE = """
import sys
from cosearch import axes, testing
from cosearch.__main__ import compose
from cosearch.precision import FORMATS
from cosearch.proposers import PROPOSERS
from cosearch.settings import Settings

assert "int8_pow2" in FORMATS.names() and "int8" in FORMATS.names(), FORMATS.names()
assert "in_order" in PROPOSERS.names() and "random" in PROPOSERS.names(), PROPOSERS.names()
testing.check_format("int8_pow2")
testing.check_proposer("in_order")
space = axes.load_space(sys.argv[1])
assert space.reference.precision["weights"] == "int8_pow2"
config = compose(["experiment=llm_decode", "proposer=random", "proposer.name=in_order", f"space={sys.argv[1]}"])
assert Settings.from_config(config).proposer == "in_order"
print("all is well")
"""


def test_a_format_and_a_proposer_of_another_package_are_used_by_name(tmp_path: Path):
    site = tmp_path / "site"
    install(site, {"pow2": FORMAT, "in_order": PROPOSER}, ENTRY_POINTS)
    (tmp_path / "theirs.yaml").write_text(SPACE)
    result = python(site, USE, str(tmp_path / "theirs.yaml"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all is well\n")


def test_a_format_that_breaks_the_contract_is_told_which_rule(tmp_path: Path):
    sloppy = FORMAT.replace("/ 127)) / 2,", "/ 127)) / 3,")
    assert sloppy != FORMAT
    install(tmp_path / "site", {"pow2": sloppy}, "[cosearch.format]\nint8_pow2 = acme_cosearch.pow2\n")
    result = python(tmp_path / "site", "from cosearch import testing; testing.check_format('int8_pow2')")
    assert "AssertionError: unpack is within bound at [" in result.stderr


def test_an_entry_point_that_registers_nothing_is_named(tmp_path: Path):
    install(tmp_path / "site", {"empty": ""}, "[cosearch.format]\nnothing = acme_cosearch.empty\n")
    code = "from cosearch.precision import FORMATS; FORMATS.names()"
    result = python(tmp_path / "site", code)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "cosearch.core.errors.UserError: the entry point 'nothing' in group 'cosearch.format' loads "
        "'acme_cosearch.empty', which registers no format of that name"
    )
