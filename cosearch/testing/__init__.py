"""The contracts: what everything that is registered by name must keep, as checks that anybody can call.

`check_format("int8")` is silent where the contract is kept, and raises an AssertionError that names the rule and the
numbers where it is not. This project's own tests run each check over every registered name; a package that brings a
format or a proposer of its own calls the same check in its tests. Needs `hypothesis`, which `cosearch[dev]` installs.

One file for each kind of thing that is registered.
"""

from cosearch.testing.architecture import check_attention, check_feedforward
from cosearch.testing.kernels import check_attention_kernel, check_matmul_kernel
from cosearch.testing.precision import check_format
from cosearch.testing.proposers import check_proposer, small_problem, small_space
from cosearch.testing.sparsity import check_pattern, random_moments
from cosearch.testing.stacks import check_stack
from cosearch.testing.targets import check_target
from cosearch.testing.trackers import check_tracker

__all__ = [
    "check_attention",
    "check_attention_kernel",
    "check_feedforward",
    "check_format",
    "check_matmul_kernel",
    "check_pattern",
    "check_proposer",
    "check_stack",
    "check_target",
    "check_tracker",
    "random_moments",
    "small_problem",
    "small_space",
]
