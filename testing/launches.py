# SPDX-License-Identifier: Apache-2.0
"""Lists the Triton kernels that run on a GPU, by Triton's own launch hook."""

import contextlib
from collections.abc import Iterator
from typing import Any

import triton

# By product: the kernel for every GPU, and those for Hopper.
PERSISTENT = {
    "gemm": "grouped_gemm_kernel",
    "dw": "grouped_gemm_bwd_dw_kernel",
    "up": "_expert_up_kernel",
    "down": "_expert_activation_bwd_kernel",
}
SPECIALIZED = {
    "gemm": (
        "grouped_gemm_cooperative_kernel",
        "grouped_gemm_tall_kernel",
        "grouped_gemm_pingpong_kernel",
    ),
    "dw": ("grouped_gemm_bwd_dw_cooperative_kernel", "grouped_gemm_bwd_dw_pingpong_kernel"),
    "up": ("expert_up_pingpong_kernel",),
    "down": ("expert_down_bwd_pingpong_kernel",),
}


class Launches:
    """The names of the kernels that were launched, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def specialized(self, product: str) -> int:
        """Return how often a warp-specialised kernel computed the product."""
        return sum(name in SPECIALIZED[product] for name in self.names)

    def persistent(self, product: str) -> int:
        """Return how often the kernel for every GPU computed it."""
        return self.names.count(PERSISTENT[product])


@contextlib.contextmanager
def launches() -> Iterator[Launches]:
    """Yield the launches inside."""
    found = Launches()

    def listed(metadata: Any) -> None:
        found.names.append(metadata.get()["name"])

    hook: Any = triton.knobs.runtime.launch_enter_hook
    hook.add(listed)
    try:
        yield found
    finally:
        hook.remove(listed)
