# SPDX-License-Identifier: Apache-2.0
"""What the pytorch.py of several ops share; nothing here imports Triton."""
