"""The precision axis: which format each matrix and each layer's cache has, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from cosearch import axes
from cosearch.architecture.decoder import Decoder, pack, params_spec, random_weights
from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.space import Space
from cosearch.precision import KNOBS, Precision
from cosearch.schedule import Schedule
from cosearch.testing import small_space


@pytest.fixture(scope="module")
def space() -> Space:
    return small_space({"architecture.width": [64], "architecture.head_dim": [16], "architecture.depth": [3]})


def why_invalid(space: Space, choices: dict[str, Value]) -> str | None:
    defaults = {name: knob.default for name, knob in axes.declared_knobs().items()}
    return space.why_invalid(space.canonical({**defaults, **space.reference.point, **choices}))


@pytest.mark.parametrize(
    ("rules", "formats"),
    [
        ((), ["int8", "int8", "int8"]),
        (("embedding=bfloat16",), ["int8", "int8", "bfloat16"]),
        (("layers.0.*=bfloat16",), ["bfloat16", "int8", "int8"]),
        (("*.feedforward.*=mxfp4",), ["int8", "mxfp4", "int8"]),
        (("layers.[01].*.[qd]*=float32",), ["float32", "float32", "int8"]),
        (("*=float32", "layers.*=bfloat16", "*.down=mxfp4"), ["bfloat16", "mxfp4", "float32"]),
        (("*.down=mxfp4", "layers.*=bfloat16", "*=float32"), ["float32", "float32", "float32"]),
        (("Embedding=float32", "layers.0=float32", "down=float32"), ["int8", "int8", "int8"]),
    ],
    ids=str,
)
def test_the_last_rule_that_matches_a_whole_path_holds(rules: tuple[str, ...], formats: list[str]):
    paths = ("layers.0.attention.query", "layers.1.feedforward.down", "embedding")
    precision = Precision("int8", rules=rules)
    assert [precision.weight_format(path) for path in paths] == formats


def test_cache_formats_by_layer_are_repeated_over_the_depth():
    assert [Precision(kv_cache="int8").cache_format(layer) for layer in range(3)] == ["int8"] * 3
    mixed = Precision(kv_cache=("int8", "int4"))
    assert [mixed.cache_format(layer) for layer in range(5)] == ["int8", "int4", "int8", "int4", "int8"]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("rules", (), None),
        ("rules", ("embedding=int8", "layers.*=float32"), None),
        ("rules", "embedding=int8", "'embedding=int8' is not a list of rules 'MATRICES=FORMAT'"),
        ("rules", ("embedding",), "'embedding' must read 'MATRICES=FORMAT', for example 'layers.*.feedforward.*=int8'"),
        ("rules", ("=int8",), "'=int8' must read 'MATRICES=FORMAT'"),
        ("rules", (8,), "8 must read 'MATRICES=FORMAT'"),
        ("rules", (("embedding", "int8"),), "('embedding', 'int8') must read 'MATRICES=FORMAT'"),
        ("rules", ("embedding=int9",), "'embedding=int9': unknown format 'int9'; did you mean 'int8'? Allowed: "),
        ("rules", ("embedding=",), "'embedding=': unknown format ''. Allowed: "),
        ("rules", ("embedding=int4",), "unknown format 'int4'; did you mean 'int8'? Allowed: bfloat16, float32, "),
        ("rules", ("layers.*=int8", "embedding=float64"), "'embedding=float64': unknown format 'float64'"),
        ("rules", ("a=b=int8",), "'a=b=int8': unknown format 'b=int8'"),
        ("weights", "int4", "unknown value 'int4'; did you mean "),
        ("kv_cache", ("int8", "int4"), None),
        ("kv_cache", ("int8", "mxfp4"), "unknown value 'mxfp4'"),
        ("kv_cache", (), "a list by layer must not be empty"),
        ("activations", "int8", "unknown value 'int8'. Allowed: bfloat16, float32"),
        ("matmul_inputs", "int7", "unknown value 'int7'; did you mean 'int8'? Allowed: as_is, float8_e4m3, int8"),
        ("calibration", "gtpq", "unknown value 'gtpq'; did you mean 'gptq'? Allowed: absmax, mse, gptq, awq"),
    ],
    ids=str,
)
def test_a_knob_takes_formats_for_what_they_can_hold(name: str, value: Value, why: str | None):
    refusal = KNOBS[name].refusal(value)
    assert (refusal is None) if why is None else (refusal is not None and why in refusal), refusal


_FORMATS = "rule 'formats hold the matrices': "
_SCAN = "rule 'scan needs equal layers': schedule.layers='scan' runs one loop over equal layers"


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        (
            {"precision.rules": ("layers.3.*=int8",)},
            f"{_FORMATS}the precision rule 'layers.3.*=int8' matches no matrix; there are layers.0.attention.query, ",
        ),
        (
            {"precision.rules": ("embedding=int8", "*.latent=int8")},
            f"{_FORMATS}the precision rule '*.latent=int8' matches no matrix",
        ),
        (
            {"precision.calibration": "mse"},
            f"{_FORMATS}calibration 'mse' has nothing to choose in weights in float32",
        ),
        (
            {"precision.weights": "mxfp4", "precision.rules": ("embedding=bfloat16",), "precision.calibration": "gptq"},
            f"{_FORMATS}calibration 'gptq' has nothing to choose in weights in bfloat16, mxfp4",
        ),
        (
            {"precision.weights": "mxfp4", "precision.matmul_inputs": "int8"},
            f"{_FORMATS}no weights in mxfp4 are multiplied with inputs in int8",
        ),
        (
            {"precision.weights": "int4_g128"},
            f"{_FORMATS}layers.0.attention.query: int4_g128 does not hold it: groups of 128 do not divide 64 rows",
        ),
        (
            {"precision.weights": "int4_g128", "precision.rules": ("*.attention.*=int8",), "architecture.ffn_ratio": 2},
            f"{_FORMATS}layers.0.feedforward.gate: int4_g128 does not hold it: groups of 128 do not divide 64 rows",
        ),
        (
            {"precision.weights": "int4_g64", "sparsity.pattern": "n_m"},
            f"{_FORMATS}layers.0.attention.query: int4_g64 does not hold it: groups of 64 do not divide 32 rows",
        ),
        (
            {"precision.weights": "int8", "precision.calibration": "gptq", "sparsity.pattern": "n_m"},
            f"{_FORMATS}calibration 'gptq' knows whole matrices only; the criterion 'sparsegpt' does",
        ),
        (
            {"precision.weights": "int8", "precision.matmul_inputs": "int8", "sparsity.pattern": "block"},
            f"{_FORMATS}layers.0.attention.query: inputs in int8 are not multiplied with compressed weights",
        ),
        ({"precision.rules": ("layers.0.*=int8",)}, _SCAN),
        ({"precision.rules": ("layers.1.*.down=int8",)}, _SCAN),
        ({"precision.kv_cache": ("int8", "int4")}, _SCAN),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_formats_that_do_not_fit_are_refused(space: Space, choices: dict[str, Value], why: str):
    told = why_invalid(space, choices)
    assert told is not None and told.startswith(why), told


@pytest.mark.parametrize(
    "choices",
    [
        {"precision.weights": "mxfp4", "precision.rules": ("embedding=int8",), "precision.calibration": "gptq"},
        {"precision.weights": "int8", "precision.calibration": "mse", "sparsity.pattern": "n_m"},
        {"precision.weights": "int4_g64", "precision.rules": ("embedding=int8",), "precision.matmul_inputs": "int8"},
        {"precision.weights": "int8", "precision.rules": ("embedding=bfloat16",), "precision.matmul_inputs": "int8"},
        {"precision.rules": ("layers.0.*=int8",), "schedule.layers": "unroll"},
        {"precision.rules": ("layers.*=int8", "embedding=bfloat16")},
        {"precision.kv_cache": ("int8", "int4"), "schedule.layers": "unroll"},
        {"precision.kv_cache": ("int8", "int8")},
    ],
    ids=lambda value: " ".join(map(str, value.values())),
)
def test_formats_that_fit_are_legal(space: Space, choices: dict[str, Value]):
    assert why_invalid(space, choices) is None


def test_each_layer_is_stored_in_its_own_formats():
    shape = DecoderShape.of(Choices({"width": 64, "depth": 3, "head_dim": 16, "ffn_ratio": 1}))
    rules = ("layers.0.*=bfloat16", "layers.*.feedforward.down=int8", "embedding=nvfp4")
    precision = Precision("float8_e4m3", kv_cache=("int8", "bfloat16"), rules=rules)
    model = Decoder(shape, precision, Schedule(layers="unroll"))
    params = pack(model, random_weights(shape, 0))
    assert {path: (array.shape, array.dtype) for path, array in params.items()} == {
        path: (spec.shape, spec.dtype) for path, spec in params_spec(model).items()
    }
    dtypes = {path.removesuffix(".values"): array.dtype for path, array in params.items() if path.endswith(".values")}
    assert dtypes.keys() == shape.linears().keys()
    for path, dtype in dtypes.items():
        if path == "embedding":
            assert dtype == np.uint8
        elif path.endswith(".down"):
            assert dtype == np.int8
        else:
            assert dtype == (ml_dtypes.bfloat16 if path.startswith("layers.0.") else ml_dtypes.float8_e4m3fn)
    cached = [{tensor["values"].dtype.name for tensor in layer.values()} for layer in model.cache_spec(1, 8)]
    assert cached == [{"int8"}, {"bfloat16"}, {"int8"}]
