# SPDX-License-Identifier: Apache-2.0
"""Make Triton's interpreter quick, and show launchers a GPU with tensor descriptors."""

import os

import pytest

from moe_ops.configs.device import Device

if os.environ.get("TRITON_INTERPRET") == "1":
    from testing import fast_interpreter

    fast_interpreter.install()

HOPPER = Device("H", (9, 0), 232448, 4, is_interpreted=True)


@pytest.fixture
def descriptors(monkeypatch):
    """Make launchers take the CPU for a Hopper GPU, and list (kind, dimensions) of descriptors.

    Triton's interpreter does not run the kernels in Gluon.
    """
    pytest.importorskip("triton")
    from moe_ops._triton import descriptors as described
    from moe_ops._triton import experts, gemm, weight_gradient
    from testing.compiled import taken_for

    made: list[tuple[str, int]] = []
    describe = described.describe

    def describe_and_list(tensor, block, ragged=False):
        made.append(("ragged" if ragged else "plain", len(block)))
        return describe(tensor, block, ragged)

    for module in (experts, gemm, weight_gradient):
        monkeypatch.setattr(module, "describe", describe_and_list)
    with taken_for(HOPPER):
        yield made
