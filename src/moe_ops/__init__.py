# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts ops for PyTorch, registered through torch.library."""

__version__ = "0.1.0.dev0"
