# SPDX-License-Identifier: Apache-2.0
"""Begin a kernel while the one before it ends (programmatic dependent launch)."""

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow_on():
    """Wait for the kernel before, then let the next one begin.

    What is written before the wait may still be read by the kernel before: a kernel calls this first.
    """
    gdc_wait()
    gdc_launch_dependents()
