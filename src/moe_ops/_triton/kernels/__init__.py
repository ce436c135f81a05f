# SPDX-License-Identifier: Apache-2.0
"""Hold the Triton kernels that several ops share."""
