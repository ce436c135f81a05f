# SPDX-License-Identifier: Apache-2.0
"""A GPU with tensor descriptors, for launchers whose kernels are interpreted."""

import pytest

from moe_ops.configs.choose import Device

HOPPER = Device("H", (9, 0), 232448, 4)


@pytest.fixture
def descriptors(monkeypatch):
    """The launchers take the CPU for a Hopper GPU; lists the descriptors made: kind, dimensions.

    But not hopper_launching, whose kernels Triton's interpreter does not take.
    """
    gemm_launching = pytest.importorskip("moe_ops.ops.gemm_launching")
    tma_launching = pytest.importorskip("moe_ops.ops.tma_launching")
    made: list[tuple[str, int]] = []
    describe = tma_launching.describe

    def describe_and_list(tensor, block, ragged=False):
        descriptor = describe(tensor, block, ragged)
        if descriptor is not None:
            made.append(("ragged" if ragged else "plain", len(block)))
        return descriptor

    monkeypatch.setattr(gemm_launching, "describe", describe_and_list)
    for module in (gemm_launching, tma_launching):
        monkeypatch.setattr(module, "device_of", lambda device: HOPPER)
    return made
