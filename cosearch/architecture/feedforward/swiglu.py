"""SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.architecture.feedforward.mlp import MLP

FEEDFORWARD.register("swiglu")(MLP(gated=True))
