# SPDX-License-Identifier: Apache-2.0
"""For people who test their own systems by properties: Hypothesis strategies, and comparators with derived bounds.

    @given(hisac.testing.problems(max_history=64))
    def test_mine(p):
        assert_tokens_close(mine(**p.route_args()), p.reference(), p)

`problems()` has absent rows, biases and every option; `problems(hostile=True)` values that break careless kernels;
`problems(plain=True)` ordinary batches only. Strategies draw the sizes and options, and one seed for the arrays:
examples are quick to make and shrink to small sizes. Codes, votes and agents are integers and are compared exactly;
floats within `hisac.reference.bounds`. Needs hypothesis.

A user's state is compared with `hisac.reference.UserState`, operation by operation: votes, ring and revision are equal,
sums within its `bound()`. tests/python/parity/test_state.py does so by a RuleBasedStateMachine.

The bounds are those of kernels that take distances from differences, or from an origin among the prototypes, and divide
by the sum of their own weights. One that computes |x|^2 - 2 x . p + |p|^2 from zero loses more digits. Its bound is
that of CUDA's kernels: `assert_tokens_close(mine, expected, bounds.route_bound(p.route_args(), p.dtype, cuda=True))`.
"""


def _register() -> None:
    """The `hypothesis` entry point: `st.from_type` learns Codebook. It stands above the imports because
    importing this module first makes hypothesis call it while the module is still half loaded."""
    from hypothesis import strategies

    from .. import Codebook

    strategies.register_type_strategy(Codebook, lambda _: codebooks())


# ruff: noqa: E402
from .compare import (
    assert_agents_equal,
    assert_attended_close,
    assert_close,
    assert_codes_equal,
    assert_gradients_close,
    assert_leaf_sums_close,
    assert_match_close,
    assert_tokens_close,
)
from .matchings import Matching, matchings
from .problems import (
    DTYPES,
    SPECIAL,
    Attention,
    Problem,
    attentions,
    codebooks,
    codes,
    embeddings,
    generators,
    offsets,
    problems,
    rounded,
    shuffled,
    spans,
    sprinkle,
    to_torch,
)

__all__ = [
    "DTYPES",
    "SPECIAL",
    "Attention",
    "Matching",
    "Problem",
    "assert_agents_equal",
    "assert_attended_close",
    "assert_close",
    "assert_codes_equal",
    "assert_gradients_close",
    "assert_leaf_sums_close",
    "assert_match_close",
    "assert_tokens_close",
    "attentions",
    "codebooks",
    "codes",
    "embeddings",
    "generators",
    "matchings",
    "offsets",
    "problems",
    "rounded",
    "shuffled",
    "spans",
    "sprinkle",
    "to_torch",
]
