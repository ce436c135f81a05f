# SPDX-License-Identifier: Apache-2.0
import torch

from testing.pages import DOCS, has_only_python_blocks, run_python_blocks


def test_every_code_block_runs():
    """The page's own comparisons are what is asserted."""
    torch.manual_seed(0)
    assert has_only_python_blocks(DOCS / "migration.md")
    run_python_blocks(DOCS / "migration.md")
