# SPDX-License-Identifier: Apache-2.0
"""Hold what the ops' triton.py files share: plans, launches, descriptors and kernels."""
