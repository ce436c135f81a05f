# SPDX-License-Identifier: Apache-2.0
"""What trains the router counts over the ranks of a process group, as one process would."""

import pytest
import torch
from torch import distributed

from moe_ops.layers import Router, load_balancing_loss


def check_equals_one_process(rank, world_size, num_tokens, compiles):
    """Rank 0 has 7 tokens, some of them padding, and rank 1 has num_tokens."""
    group = distributed.group.WORLD
    tokens = slice(0, 7) if rank == 0 else slice(7, 7 + num_tokens)
    layers = [torch.randn(7 + num_tokens, 6, dtype=torch.float64).requires_grad_() for _ in "ab"]
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1] + [1] * num_tokens)
    own = [logits[tokens] for logits in layers]
    router = Router(4, 6, 2, score_function="sigmoid", selection_bias=True)

    def loss_of(own, mask):
        return load_balancing_loss(own, 6, 2, mask, group=group)

    def update(router, counts):
        router.update_selection_bias_(counts, 1e-3, group)

    if compiles:
        loss_of, update = (
            torch.compile(function, fullgraph=True, backend="aot_eager")
            for function in (loss_of, update)
        )
    loss = loss_of(own, mask[tokens])
    counts = router.token_counts(own[0], mask[tokens])
    update(router, counts)
    bias = router.e_score_correction_bias
    assert bias is not None
    found = [loss.detach(), bias.clone()]
    found += [gradient[tokens] for gradient in torch.autograd.grad(loss, layers)]
    biases = [torch.empty_like(found[1]) for _ in range(world_size)]
    distributed.all_gather(biases, found[1])
    assert torch.equal(*biases)

    bias.zero_()
    router.update_selection_bias_(router.token_counts(layers[0], mask), 1e-3)
    loss = load_balancing_loss(layers, 6, 2, mask)
    expected = [loss.detach(), bias]
    expected += [gradient[tokens] for gradient in torch.autograd.grad(loss, layers)]
    assert bias.any()
    # The test can fail: this rank's tokens alone give other counts.
    assert num_tokens == 0 or counts.tolist() != router.token_counts(layers[0], mask).tolist()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "compiles"),
    [(3, False), (3, True), (0, False)],
    ids=["3-eager", "3-compiled", "0-eager"],
)
def test_two_ranks_are_one_process(ranks, num_tokens, compiles):
    """Value, gradient and new bias are those of the concatenated tokens, on each rank."""
    ranks(2).run(check_equals_one_process, num_tokens=num_tokens, compiles=compiles)
