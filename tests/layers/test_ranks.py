# SPDX-License-Identifier: Apache-2.0
"""What trains the router counts over the ranks of a process group, as one process would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Rank 0 has 7 tokens, some of them padding, and rank 1 has 3 or none.
RANK = """
import json, sys
import torch
import torch.distributed as dist
from moe_ops.layers import Router, load_balancing_loss, update_selection_bias_

rank, num_tokens, compiles = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "compiled"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
group = dist.group.WORLD
torch.manual_seed(0)
tokens = slice(0, 7) if rank == 0 else slice(7, 7 + num_tokens)
every = [torch.randn(7 + num_tokens, 6, dtype=torch.float64) for _ in range(2)]
mask = torch.tensor([1, 1, 0, 1, 1, 0, 1] + [1] * num_tokens)
layers = [logits.requires_grad_() for logits in every]
own = [logits[tokens] for logits in layers]
router = Router(4, 6, 2, score_function="sigmoid", selection_bias=True)


def loss_of(own, mask):
    return load_balancing_loss(own, 6, 2, mask, group=group)


def update(router, counts):
    router.update_selection_bias_(counts, 1e-3, group)


if compiles:
    loss_of, update = (
        torch.compile(function, fullgraph=True, backend="aot_eager") for function in (loss_of, update)
    )
loss = loss_of(own, mask[tokens])
counts = router.token_counts(own[0], mask[tokens])
update(router, counts)
found = [loss.detach(), router.e_score_correction_bias.clone()]
found += [gradient[tokens] for gradient in torch.autograd.grad(loss, layers)]

router.e_score_correction_bias.zero_()
router.update_selection_bias_(router.token_counts(every[0], mask), 1e-3)
loss = load_balancing_loss(layers, 6, 2, mask)
expected = [loss.detach(), router.e_score_correction_bias]
expected += [gradient[tokens] for gradient in torch.autograd.grad(loss, layers)]
assert router.e_score_correction_bias.any()
assert num_tokens == 0 or counts.tolist() != router.token_counts(every[0], mask).tolist()
print(json.dumps([[value.tolist() for value in values] for values in (found, expected)]))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
@pytest.mark.parametrize(
    ("num_tokens", "how"), [(3, "eager"), (3, "compiled"), (0, "eager")], ids=str
)
def test_two_ranks_are_one_process(tmp_path, num_tokens, how):
    """Value, gradient and new bias are those of the concatenated tokens, on each rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank), str(num_tokens), how],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    for out, _ in outputs:
        found, expected = (
            [torch.tensor(value, dtype=torch.float64) for value in values]
            for values in json.loads(out.splitlines()[-1])
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    bias_0, bias_1 = (json.loads(out.splitlines()[-1])[0][1] for out, _ in outputs)
    assert bias_0 == bias_1
