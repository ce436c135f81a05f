# SPDX-License-Identifier: Apache-2.0
"""What a problem says of its operands: which of them TMA can describe."""

import pytest

from moe_ops.configs.problem import Operands, dense_operands
from testing.problem_keys import make_problem

# (pass, dtype, N, D, words) -> x, b, y. The rule is 16 bytes: 8 elements of 16 bits.
TABLE = [
    ("forward", "bfloat16", 1000, 344, "", (True, True, True)),
    ("forward", "float16", 1001, 344, "", (True, True, False)),
    ("forward", "bfloat16", 344, 1001, "", (False, False, True)),
    ("forward", "bfloat16", 1001, 344, "transposed", (True, False, False)),
    ("forward", "float32", 100, 36, "", (True, True, True)),
    ("forward", "bfloat16", 100, 36, "", (False, False, False)),
    # Gate and up are described apart: 344 columns each, and 4 * 43.
    ("forward", "bfloat16", 688, 1000, "gather gated", (True, True, True)),
    ("forward", "bfloat16", 344, 1000, "gather gated", (True, True, False)),
    ("forward", "bfloat16", 344, 1000, "gather transposed gated", (True, False, False)),
    ("backward_dX", "bfloat16", 1000, 344, "", (True, True, True)),
    ("backward_dX", "bfloat16", 1001, 344, "", (False, True, True)),
    ("backward_dX", "bfloat16", 1000, 345, "", (True, False, False)),
    ("backward_dX", "bfloat16", 1000, 345, "transposed", (True, True, False)),
    ("backward_dX", "bfloat16", 1000, 344, "gated", (True, True, True)),
    ("backward_dW", "bfloat16", 1000, 344, "", (True, True, True)),
    ("backward_dW", "bfloat16", 1001, 344, "", (False, True, True)),
    # dW is then stored (D, N): the operands change places.
    ("backward_dW", "bfloat16", 1001, 344, "transposed", (True, False, False)),
]


@pytest.mark.parametrize(("kind", "dtype", "out", "inner", "words", "expected"), TABLE)
def test_dense_operands(kind, dtype, out, inner, words, expected):
    problem = make_problem(kind, dtype, 8, out, inner, 64, words.split())
    assert dense_operands(problem) == Operands(*expected)
