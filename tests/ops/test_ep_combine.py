# SPDX-License-Identifier: Apache-2.0
"""These tests are ep_combine's own, in a world of one. tests/distributed has several ranks.

test_every_op.py holds what every op must do.
"""

import torch

import moe_ops
from testing import checks

SLOTS = torch.tensor([[2, 3], [-1, -1], [0, -1]], dtype=torch.int32)
IDS = torch.tensor([[3, -1], [0, 2], [-1, -1]], dtype=torch.int32)


def test_rows_go_back_to_their_tokens():
    rows = torch.tensor([[1.0], [2.0]])
    assert moe_ops.ep_combine(rows, IDS[:2], SLOTS, 4, 1, 2, "").tolist() == [[2.0], [0.0], [1.0]]


def test_gradient_goes_to_the_rows_of_the_tokens():
    rows = torch.tensor([[1.0], [2.0], [float("nan")]], requires_grad=True)
    output = moe_ops.ep_combine(rows, IDS, SLOTS, 4, 1, 3, "")
    (grad,) = torch.autograd.grad(output, rows, torch.tensor([[5.0], [6.0], [7.0]]))
    assert grad[:2].tolist() == [[7.0], [5.0]]


def test_refuses_rows_of_another_capacity():
    checks.assert_rejects(
        ValueError,
        ("moe::ep_combine: expected input.shape[0] == world_size * capacity (3), got 2",),
        torch.ops.moe.ep_combine,
        {
            "input": torch.ones(2, 1), "local_ids": IDS, "sent_slots": SLOTS, "num_experts": 4,
            "world_size": 1, "capacity": 3, "group": "",
        },
    )  # fmt: skip
