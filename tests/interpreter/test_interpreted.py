# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, on tiny shapes, against the oracle.

Run by `make test-interpreter`, which sets TRITON_INTERPRET=1 before anything imports Triton.
"""

import os

import pytest
import torch

from moe_ops._core.library import OPS, SCHEMAS
from tests import checks, strategies
from tests.strategies import seeded_sample

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles for a GPU unless TRITON_INTERPRET=1 is set before its import",
)

# bf16 products are wrong in the interpreter, fp64 is the CPU implementation's alone.
DTYPES = (torch.float32, torch.float16)
CASES = [
    pytest.param(name, seed, variant, id=f"{name}-{seed}")
    for name, schema in sorted(SCHEMAS.items())
    for seed, variant in enumerate(strategies.variants(schema))
]


def test_every_op_is_served_by_triton():
    assert {op.choose("cpu").name for op in OPS.values()} == {"triton"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "seed", "variant"), CASES)
def test_matches_reference(name, seed, variant, dtype):
    sample = seeded_sample(SCHEMAS[name], seed, dtype=dtype, **variant)
    with checks.poisoned_memory():
        outputs = sample()
    checks.assert_matches_oracle(sample, outputs)
