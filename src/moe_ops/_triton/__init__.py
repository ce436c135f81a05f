# SPDX-License-Identifier: Apache-2.0
"""What the triton.py of several ops share: plans, launches, descriptors, kernels."""
