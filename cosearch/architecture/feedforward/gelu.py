"""The Transformer's own feed-forward, down(gelu(up(x))), with GELU in its tanh approximation (Hendrycks and Gimpel
2016, arXiv:1606.08415, section 2)."""

from cosearch.architecture.feedforward import FEEDFORWARD
from cosearch.architecture.feedforward.mlp import MLP

FEEDFORWARD.register("gelu")(MLP(gated=False))
