# SPDX-License-Identifier: Apache-2.0
"""The kernels that push rows into other ranks' pools, interpreted, with pools of one process.

testing/fake_pools.py lets the ranks go on in every order that the barrier allows.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from moe_ops._triton.expert_parallel import Sizes
from moe_ops.ops.ep_combine.triton import push_combine, push_combine_backward
from moe_ops.ops.ep_dispatch.triton import push_dispatch, push_dispatch_backward
from testing import checks, oracle
from testing.ep_ops import calls, filled
from testing.fake_pools import FakeRanks
from testing.interpreted import pytestmark  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
HALF_BYTES = 1 << 14
NEEDS = ([True, True], [True, False], [False, True], [False, False])


def gradient_of_weights(places, grads, me, capacity, columns):
    """Return, slot by slot, what the ranks' gradients of local weights hold for this rank."""
    found = torch.zeros(places.shape, dtype=torch.float64)
    for token, slots in enumerate(places.tolist()):
        for k, place in enumerate(slots):
            if place >= 0:
                row, column = divmod(place, columns)
                grad = grads[row // capacity].double()
                found[token, k] = grad[me * capacity + row % capacity, column]
    return found


class Round:
    """One pass of all four ops with new numbers on all ranks."""

    def __init__(self, world_size, seed):
        self.world_size, self.seed = world_size, seed
        self.inputs, self.ids, self.weights, num_experts, self.capacity = calls(world_size, seed)
        self.sizes = Sizes(num_experts, world_size, self.capacity, self.ids[0].shape[1])
        self.needs = NEEDS[seed % len(NEEDS)]
        generator = torch.Generator().manual_seed(seed)
        shape = (self.sizes.num_rows, self.inputs[0].shape[1])

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        kinds = self.inputs[0].dtype, self.weights[0].dtype
        self.outputs = [draw(*shape).to(kinds[0]) for _ in range(world_size)]
        self.grad_weights = [
            draw(self.sizes.num_rows, self.sizes.columns).to(kinds[1]) for _ in range(world_size)
        ]

    def of_rank(self, rank, pool):
        sent = push_dispatch(
            pool, self.inputs[rank], self.ids[rank], self.weights[rank], self.sizes
        )
        _, local_ids, _, sent_slots, _ = sent
        # Rows that no token fills would show.
        rows = self.outputs[rank].masked_fill(~filled(local_ids), float("nan"))
        combined = push_combine(pool, rows, local_ids, sent_slots, self.sizes)
        back = push_combine_backward(pool, self.inputs[rank], sent_slots, self.sizes)
        grads = push_dispatch_backward(
            pool, rows, self.grad_weights[rank], local_ids, sent_slots, self.sizes, self.needs
        )
        return sent, combined, back, grads

    def check(self, results):
        num_experts, capacity, columns = self.sizes.num_experts, self.capacity, self.sizes.columns
        every = oracle.expert_parallel.dispatch(
            self.inputs, self.ids, self.weights, num_experts, capacity
        )
        places = [each[3] for each in every]
        sums = oracle.expert_parallel.combine(self.outputs, places, num_experts, capacity)
        scale = torch.stack([each.double().norm() for each in self.outputs]).sum()
        for me, (sent, combined, back, grads) in enumerate(results):
            what, want = f"seed {self.seed}, rank {me}", every[me]
            gap = ~filled(want[1])
            for got in (sent[0], back):
                checks.assert_close(got.masked_fill(gap, 0), want[0].masked_fill(gap, 0), what=what)
            for one, two in zip((sent[1], *sent[3:]), (want[1], *want[3:]), strict=True):
                assert torch.equal(one, two), what
            checks.assert_close(sent[2], want[2], what=what)
            checks.assert_close(combined, sums[me], scale=scale, what=what)
            if self.needs[0]:
                checks.assert_close(grads[0], sums[me], scale=scale, what=what)
            if self.needs[1]:
                wanted = gradient_of_weights(places[me], self.grad_weights, me, capacity, columns)
                checks.assert_close(grads[1], wanted, what=what)
            for grad, is_needed in zip(grads, self.needs, strict=True):
                assert is_needed or grad.numel() == 0, what


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("first", [0, 8])
def test_against_the_oracle(world_size, first):
    """Rounds follow each other in the same pools, some with an odd number of exchanges."""
    ranks = FakeRanks(world_size, HALF_BYTES)
    rounds = [Round(world_size, seed) for seed in range(first, first + 8)]

    def work(rank, pool):
        return [each.of_rank(rank, pool) for each in rounds]

    found = ranks.run(work, seed=first)
    for index, each in enumerate(rounds):
        each.check([of_rank[index] for of_rank in found])
    ranks.check_unwritten()
    # A round in which nobody needs a gradient has three exchanges.
    assert {pool.num_exchanges for pool in ranks.pools} == {8 * 4 - 2}


def test_one_half_would_not_be_enough():
    """A rank would push into rows that a peer has not read: the checks above see that."""
    rounds = [Round(4, seed) for seed in range(8)]
    ranks = FakeRanks(4, HALF_BYTES, num_halves=1)
    found = ranks.run(lambda rank, pool: [each.of_rank(rank, pool) for each in rounds])
    wrong = []
    for index, each in enumerate(rounds):
        with contextlib.suppress(AssertionError):
            each.check([of_rank[index] for of_rank in found])
            continue
        wrong.append(index)
    assert wrong


# The last sizes take the same bytes: a pool's parts are multiples of 256.
@pytest.mark.parametrize(("first", "second", "width"), [(48, 32, 64), (32, 48, 64), (3, 4, 2)])
def test_ranks_that_exchange_different_sizes_are_stopped(first, second, width, monkeypatch):
    """Else they would read rows and ids at wrong places. The dispatch's result stays in its layer."""
    # What @triton.jit(debug=True) asks for, the interpreter has as an option of all kernels.
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    ranks = FakeRanks(2, HALF_BYTES * 4)
    combined = []

    def work(rank, pool):
        for num_tokens in (64, 64, (first, second)[rank]):
            ids = torch.tensor([[0, 2]] * num_tokens, dtype=torch.int32)
            sizes = Sizes(4, 2, num_tokens, 2)
            tokens = torch.full((num_tokens, width), 1.0 + rank)
            sent = push_dispatch(pool, tokens, ids, torch.full((num_tokens, 2), 0.5), sizes)
            combined.append(push_combine(pool, sent[0], sent[1], sent[3], sizes))

    with pytest.raises(
        InterpreterError, match="moe_ops: ranks exchanged different numbers of tokens"
    ):
        ranks.run(work)
    # Those of the batches before.
    assert len(combined) == 4


@pytest.mark.parametrize("side", ["end", "start"])
def test_corrupt_indices_stay_in_bounds(side):
    """Every tensor, and every pool, lies next to a page that may not be touched."""
    done = subprocess.run(
        [sys.executable, "-m", "testing.guarded_calls", side, "push"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    name, count = done.stdout.splitlines()[0].split()
    assert name == "push"
    assert int(count) > 0
