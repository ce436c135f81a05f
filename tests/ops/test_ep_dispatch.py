# SPDX-License-Identifier: Apache-2.0
"""These tests are ep_dispatch's own, in a world of one. tests/distributed has several ranks.

test_every_op.py holds what every op must do.
"""

import pytest
import torch

import moe_ops
from testing import checks

IDS = torch.tensor([[0, 5], [-1, 9], [5, 0], [3, 3]])
WEIGHTS = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])


def arguments(**replaced):
    call = {
        "input": torch.arange(8.0).reshape(4, 2),
        "topk_ids": IDS,
        "topk_weights": WEIGHTS,
        "num_experts": 6,
        "world_size": 1,
        "capacity": 4,
        "group": "",
    }
    return {**call, **replaced}


def test_tokens_with_a_slot_are_sent_once_in_order():
    rows, ids, weights, slots, dropped = moe_ops.ep_dispatch(**arguments())
    assert rows[:3].tolist() == [[0, 1], [4, 5], [6, 7]]
    assert ids.tolist() == [[0, 5], [5, 0], [3, 3], [-1, -1]]
    assert torch.equal(weights, torch.cat([WEIGHTS[[0, 2, 3]], torch.zeros(1, 2)]))
    assert slots.tolist() == [[0, 1], [-1, -1], [2, 3], [4, 5]]
    assert dropped.tolist() == [0]


def test_what_does_not_fit_is_counted():
    rows, ids, _, slots, dropped = moe_ops.ep_dispatch(**arguments(capacity=2))
    assert rows.tolist() == [[0, 1], [4, 5]]
    assert ids.tolist() == [[0, 5], [5, 0]]
    assert slots.tolist() == [[0, 1], [-1, -1], [2, 3], [-1, -1]]
    assert dropped.tolist() == [2]
    output = moe_ops.ep_combine(rows, ids, slots, 6, 1, 2, "")
    assert output.tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]


def test_slots_that_repeat_an_expert_beyond_the_columns_are_counted():
    """A rank with two experts has two columns: the third slot for it has no room."""
    ids, weights = torch.tensor([[1, 1, 1]]), torch.tensor([[1.0, 2.0, 3.0]])
    call = arguments(
        input=torch.ones(1, 2), topk_ids=ids, topk_weights=weights, num_experts=2, capacity=1
    )
    _, local_ids, local_weights, slots, dropped = moe_ops.ep_dispatch(**call)
    assert local_ids.tolist() == [[1, 1]]
    assert local_weights.tolist() == [[1.0, 2.0]]
    assert slots.tolist() == [[0, 1, -1]]
    assert dropped.tolist() == [1]


def test_rows_without_a_token_are_not_read():
    rows, ids, weights, slots, _ = moe_ops.ep_dispatch(**arguments())
    rows[3] = float("nan")
    output = moe_ops.ep_combine(rows, ids, slots, 6, 1, 4, "")
    assert output.tolist() == [[0, 1], [0, 0], [4, 5], [6, 7]]
    grads = torch.ops.moe.ep_dispatch_backward(rows, weights, ids, slots, 6, 1, 4, "", [True, True])
    assert torch.equal(grads[0], output)


def test_tokens_and_ids_are_all_that_is_kept():
    """The received rows are not kept: the backward needs ids, and where the slots went."""
    call = arguments()
    leaf = call["input"].requires_grad_()
    rows, *_ = moe_ops.ep_dispatch(**call)
    local_ids, sent_slots = rows.grad_fn.saved_tensors
    assert local_ids.shape == (4, 2)
    assert sent_slots.shape == IDS.shape
    assert torch.autograd.grad(rows[:3].sum(), leaf)[0].tolist() == [[1, 1], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("replaced", "text"),
    [
        ({"world_size": 4}, "every rank holds equally many experts"),
        ({"num_experts": 0}, "num_experts >= 1"),
        ({"topk_weights": WEIGHTS[:, :1]}, "topk_weights.shape[1] == topk_ids.shape[1] (2)"),
        ({"topk_ids": IDS[:3]}, "topk_ids.shape[0] == input.shape[0] (4)"),
        ({"capacity": 2**31}, "numbered in int32"),
        ({"topk_ids": IDS[:, :0], "topk_weights": WEIGHTS[:, :0]}, "each token has a slot"),
    ],
)
def test_refuses(replaced, text):
    checks.assert_rejects(
        ValueError, ("moe::ep_dispatch: ", text), torch.ops.moe.ep_dispatch, arguments(**replaced)
    )
