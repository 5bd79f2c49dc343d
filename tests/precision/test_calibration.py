import numpy as np
import pytest

from cosearch import testing
from cosearch.architecture.linear import Compression, MatrixStorage
from cosearch.core.errors import Rejected
from cosearch.precision import FORMATS
from cosearch.precision.calibration import awq_scales, error_shares, gptq, mse_scale, output_error
from cosearch.precision.floating import Floating
from cosearch.sparsity.block import BlockCompression
from cosearch.sparsity.n_m import NMCompression

ROWS, COLUMNS = 128, 24
TAKE = {way: [name for name in FORMATS.names() if way in FORMATS[name].calibrations] for way in ("mse", "gptq", "awq")}


def weights_of(seed: int) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).standard_t(4, (ROWS, COLUMNS))).astype(np.float32)


def error_of(name: str, weights: np.ndarray, stored: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    form = FORMATS[name]
    return form.unpack(form.pack(stored, "out_in", scale), "out_in") - weights


def correlated(rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((1000, 20)) @ rng.standard_normal((20, ROWS)) + 0.3 * rng.standard_normal((1000, ROWS))
    return (x.T @ x / 1000).astype(np.float32)


def test_who_takes_what():
    assert TAKE["mse"] == TAKE["gptq"] == ["int4_g128", "int4_g32", "int4_g64", "int8"]
    assert TAKE["awq"] == ["float8_e4m3", *TAKE["gptq"], "mxfp4", "nvfp4"]


@pytest.mark.parametrize("name", TAKE["mse"])
def test_mse_is_never_worse_than_absmax_in_any_group(name: str):
    for seed in range(5):
        weights = weights_of(seed)
        weights[:, 3] = 0
        scale = mse_scale(MatrixStorage(name), weights)
        groups = len(scale)
        squares = [
            np.square(error_of(name, weights, weights, chosen)).reshape(groups, -1, COLUMNS).sum(axis=1)
            for chosen in (scale, None)
        ]
        assert (squares[0] <= squares[1]).all()
        assert name == "int8" or squares[0].sum() < 0.95 * squares[1].sum()


@pytest.mark.parametrize("name", TAKE["gptq"])
def test_gptq_errs_less_in_what_is_computed(name: str):
    weights, moment = weights_of(1), correlated(np.random.default_rng(7))
    weights[:, 3] = 0
    rounded, scale = gptq(MatrixStorage(name), weights, moment)
    error = error_of(name, weights, rounded, scale)
    np.testing.assert_allclose(error, rounded.astype(np.float64) - weights, atol=1e-6)
    assert output_error(error, moment) < 0.7 * output_error(error_of(name, weights, weights), moment)


def test_gptq_stores_the_very_codes_that_it_chose():
    storage = MatrixStorage("int4_g32")
    rounded, scale = gptq(storage, weights_of(2), correlated(np.random.default_rng(3)))
    assert (scale == scale.astype(storage.pack(rounded)["scale"].dtype).astype(np.float32)).all()
    codes = rounded / np.repeat(scale, 32, axis=0)
    assert (codes == np.rint(codes)).all() and abs(codes).max() == 7
    np.testing.assert_array_equal(storage.unpack(storage.pack(rounded, scale), rounded.shape), rounded)


def test_gptq_of_inputs_that_were_never_there_rounds_to_the_nearest():
    storage, weights = MatrixStorage("int8"), weights_of(3)
    rounded, _ = gptq(storage, weights, np.zeros((ROWS, ROWS), np.float32))
    np.testing.assert_allclose(rounded, storage.unpack(storage.pack(weights), weights.shape), rtol=1e-6)


def test_errors_are_made_up_for_by_the_inputs_that_follow():
    moment = np.array([[2.0, 1.0], [1.0, 2.0]])
    upper = error_shares(moment)
    damped = moment + 0.02 * np.eye(2)
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped))
    # By least squares: input 1 is like 1 / 2.02 of input 0, whose error it takes with that and the other sign.
    assert upper[1, 0] == 0 and upper[0, 1] / upper[0, 0] == pytest.approx(-1 / 2.02)
    np.testing.assert_array_equal(error_shares(np.zeros((3, 3))), np.eye(3))


def test_moments_that_overflowed_are_refused():
    with pytest.raises(Rejected, match="moments of a matrix's inputs are not finite"):
        gptq(MatrixStorage("int8"), weights_of(1), np.full((ROWS, ROWS), np.inf))


def test_a_format_that_is_no_codes_and_scales_is_refused():
    for calibrate in (mse_scale, lambda storage, weights: gptq(storage, weights, np.eye(ROWS))):
        with pytest.raises(Rejected, match="bfloat16 has no codes and scales that a calibration knows"):
            calibrate(MatrixStorage("bfloat16"), weights_of(1))


class Claiming(Floating):
    """Names a calibration that it has no scales for."""

    calibrations = ("absmax", "mse")


def test_the_contract_knows_who_can_be_calibrated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FORMATS._entries, "claiming", Claiming(np.float32, activations=False))
    with pytest.raises(AssertionError, match=r"calibration by \['mse'\] is for `Quantized` formats"):
        testing.check_format("claiming")


def error_by(factors: np.ndarray, *readers: tuple[MatrixStorage, np.ndarray, np.ndarray]) -> float:
    """The error of products where rows are stored multiplied by `factors`."""
    found = 0.0
    for storage, weights, moment in readers:
        back = storage.unpack(storage.pack(weights * factors[:, None]), weights.shape) / factors[:, None]
        found += output_error(back - weights, moment)
    return found


def loud(rng: np.random.Generator) -> np.ndarray:
    """The moment of inputs of which four are large."""
    sizes = np.ones(ROWS)
    sizes[rng.choice(ROWS, 4, replace=False)] = 50
    return (correlated(rng) * np.outer(sizes, sizes)).astype(np.float32)


@pytest.mark.parametrize("name", TAKE["awq"])
def test_awq_protects_channels_of_large_inputs(name: str):
    moment = loud(np.random.default_rng(11))
    pair = [(MatrixStorage(name), weights_of(seed), moment) for seed in (4, 5)]
    factors = awq_scales(pair)
    assert factors.shape == (ROWS,) and (factors > 0).all()
    assert error_by(factors, *pair) < 0.9 * error_by(np.ones(ROWS), *pair)


def test_awq_leaves_equal_inputs_alone():
    factors = awq_scales([(MatrixStorage("int4_g32"), weights_of(6), np.eye(ROWS, dtype=np.float32))])
    np.testing.assert_array_equal(factors, np.ones(ROWS))


@pytest.mark.parametrize("compression", [NMCompression(2, 4), BlockCompression(8, 0.5)], ids=str)
def test_awq_rounds_a_compressed_matrix_in_the_groups_that_are_stored(compression: Compression):
    storage = MatrixStorage("int4_g32", compression=compression)
    whole = MatrixStorage("int4_g32")
    better = 0
    for seed in range(8):
        weights = compression.expand(*compression.compress(weights_of(seed), "in_out"), ROWS, "in_out")
        moment = loud(np.random.default_rng(seed))
        reader = (storage, weights, moment)
        by_stored, by_whole = awq_scales([reader]), awq_scales([(whole, weights, moment)])
        assert error_by(by_stored, reader) <= error_by(by_whole, reader)
        better += error_by(by_stored, reader) < error_by(by_whole, reader)
    assert better > 0


def test_awq_counts_each_matrix_by_what_it_sees():
    quiet, heard = np.eye(ROWS, dtype=np.float32), loud(np.random.default_rng(12))
    storage, first, second = MatrixStorage("int4_g32"), weights_of(7), weights_of(8)
    unused = np.zeros((ROWS, ROWS), np.float32)
    alone = awq_scales([(storage, first, heard)])
    np.testing.assert_array_equal(awq_scales([(storage, first, heard), (storage, second, unused)]), alone)
    assert not np.array_equal(awq_scales([(storage, first, heard), (storage, second, 1e6 * quiet)]), alone)
