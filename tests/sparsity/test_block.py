import numpy as np
import pytest

from cosearch.architecture.shape import DecoderShape
from cosearch.core.candidate import Choices, Value
from cosearch.core.errors import Rejected
from cosearch.sparsity import PATTERNS
from cosearch.sparsity.block import BlockCompression

BLOCK = PATTERNS["block"]
SHAPE = DecoderShape.of(Choices({"width": 32, "depth": 1, "head_dim": 16, "ffn_ratio": 1}))


def test_every_block_of_outputs_keeps_its_own_blocks_of_inputs():
    weights = np.zeros((6, 4), np.float32)
    weights[2:4, :2] = [[1, 2], [3, 4]]  # the first outputs keep the second block of inputs
    weights[4:, 2:] = [[5, 6], [7, 8]]  # the others the third
    compression = BlockCompression(2, 1 / 3)
    values, indices = compression.compress(weights, "in_out")
    np.testing.assert_array_equal(values, [[1, 2, 5, 6], [3, 4, 7, 8]])
    np.testing.assert_array_equal(indices, [[1, 2]])
    assert indices.dtype == np.uint16
    assert compression.compress(weights, "out_in")[1].tolist() == [[1], [2]]
    np.testing.assert_array_equal(compression.expand(values, indices, 6, "in_out"), weights)


def test_the_blocks_that_lose_most_stay():
    weights = {path: np.ones(sizes, np.float32) for path, sizes in SHAPE.linears().items()}
    query = weights["layers.0.attention.query"]
    query[16:, :16] = 2
    moments = {path: np.eye(len(matrix)) for path, matrix in weights.items()}
    moments["layers.0.attention.query"][:16] *= 100
    choices = {"block": 16, "blocks_kept": 0.5, "criterion": "magnitude"}
    pruned = BLOCK.prune(weights, SHAPE, choices, {})["layers.0.attention.query"]
    np.testing.assert_array_equal(pruned[:16, :16], 0)
    np.testing.assert_array_equal(pruned[16:, :16], 2)
    np.testing.assert_array_equal(pruned[:, 16], [1] * 16 + [0] * 16)  # a tie: the first
    pruned = BLOCK.prune(weights, SHAPE, choices | {"criterion": "wanda"}, moments)["layers.0.attention.query"]
    np.testing.assert_array_equal(pruned, [[1] * 32] * 16 + [[0] * 32] * 16)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"block": 12}, r"attention.query \[32, 32\] .*: blocks of 12 do not divide 32 inputs and 32 outputs"),
        ({"blocks_kept": 0.3}, "0.3 of 2 blocks of 16 inputs is no whole number"),
        ({"blocks_kept": 0.1, "block": 32}, "0.1 of 1 blocks of 32 inputs is no whole number"),
        ({"criterion": "sparsegpt"}, "takes single weights away, not blocks"),
    ],
)
def test_what_cannot_be_taken_is_refused(choices: dict[str, Value], words: str):
    with pytest.raises(Rejected, match=words):
        BLOCK.shape(SHAPE, {"block": 16, "blocks_kept": 0.5, "criterion": "magnitude", **choices})


def test_blocks_must_fit_outputs_too():
    assert BlockCompression(4, 0.5).why_not(8, 6) == "blocks of 4 do not divide 8 inputs and 6 outputs"
