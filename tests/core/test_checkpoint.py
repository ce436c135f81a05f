# SPDX-License-Identifier: Apache-2.0
"""A block works under activation checkpointing, eager and compiled. Policies can name its ops."""

import functools

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from testing import checks
from testing.moe_block import (
    BLOCKS,
    Weights,
    compiled_graphs,
    loss_and_gradients,
    make_tokens,
    make_weights,
)
from testing.recorders import MoeOps

blocks = pytest.mark.parametrize("name", sorted(BLOCKS))
GEMMS_IN_A_BLOCK = 2
# The unfused block's unpermute reads the output of the second GEMM in its backward. The fused block
# does not save that output.
RECOMPUTED = {"fused": 1, "unfused": 2}


def save_gemms(ctx, func, *args, **kwargs):
    if func is torch.ops.moe.grouped_gemm.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_RECOMPUTE


def checkpointed(name: str, **options):
    def block(hidden, weights):
        # Reentrant checkpointing takes tensors as arguments, not a dataclass of them.
        def on_tensors(hidden, *tensors):
            return BLOCKS[name](hidden, Weights(*tensors))

        return checkpoint(on_tensors, hidden, *weights.tensors(), **options)

    return block


def selective(name: str):
    context = functools.partial(create_selective_checkpoint_contexts, save_gemms)
    return checkpointed(name, use_reentrant=False, context_fn=context)


def assert_same_as_plain(name: str, block) -> None:
    hidden, weights = make_tokens(7), make_weights()
    expected = loss_and_gradients(BLOCKS[name], hidden, weights)
    got = loss_and_gradients(block, hidden, weights)
    for position, (actual, want) in enumerate(zip(got, expected, strict=True)):
        checks.assert_close(actual, want, what=f"output or gradient {position}")


def calls_of(block) -> dict[str, int]:
    """Count how often each op runs in a forward and a backward."""
    with MoeOps() as counted:
        loss_and_gradients(block, make_tokens(7), make_weights())
    return dict(counted.counts)


@blocks
def test_non_reentrant(name):
    block = checkpointed(name, use_reentrant=False)
    assert_same_as_plain(name, block)
    calls = calls_of(block)
    assert calls["grouped_gemm"] == 2 * GEMMS_IN_A_BLOCK


@blocks
def test_reentrant(name):
    # Reentrant checkpointing works only with .backward().
    hidden, weights = make_tokens(7), make_weights()
    expected = loss_and_gradients(BLOCKS[name], hidden, weights)
    output = checkpointed(name, use_reentrant=True)(hidden, weights)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
    got = [output, hidden.grad, *(w.grad for w in weights.tensors())]
    for position, (actual, want) in enumerate(zip(got, expected, strict=True)):
        checks.assert_close(actual, want, what=f"output or gradient {position}")


@blocks
def test_selective_policy_saves_the_gemms(name):
    assert_same_as_plain(name, selective(name))
    calls = calls_of(selective(name))
    assert calls["grouped_gemm"] == GEMMS_IN_A_BLOCK
    assert calls["routing_indices"] == 2


def gemms_in_graphs(block) -> dict[str, int]:
    """Count the forward GEMMs of each compiled graph. Those in the backward are recomputed."""
    return {
        direction: sum(op.startswith("moe.grouped_gemm.default") for op in ops)
        for direction, ops in compiled_graphs(block).items()
    }


@blocks
def test_compiled(name):
    block = checkpointed(name, use_reentrant=False)
    assert_same_as_plain(name, torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert gemms_in_graphs(block) == {"forward": 2, "backward": RECOMPUTED[name]}


@blocks
def test_compiled_selective_policy_saves_the_gemms(name):
    block = selective(name)
    assert_same_as_plain(name, torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert gemms_in_graphs(block) == {"forward": 2, "backward": 0}
