# SPDX-License-Identifier: Apache-2.0
"""The Llama 4 block equals transformers' and a plain loop, with any number of experts."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

import moe_ops
from moe_ops.compat.kernels.tuning import KernelConfigForward
from moe_ops.compat.reference.layers import llama4_moe
from moe_ops.compat.reference.layers.llama4_moe import Llama4GroupedGemmTextMoe
from testing.checks import assert_close
from testing.compat_blocks import (
    HIDDEN_SIZE,
    RecordOps,
    gradients,
    llama4_block,
    llama4_config,
    our_llama4_block,
    tangents_of,
    tokens,
)

options = pytest.mark.parametrize(
    "options",
    [{}, {"permute_x": False}, {"permute_y": False}, {"permute_x": False, "permute_y": False}],
    ids=str,
)
top_ks = pytest.mark.parametrize("top_k", [1, 2, 4])


def plain_loop(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the layer token by token and expert by expert."""
    router_logits = block.router.weight @ hidden_states.reshape(-1, HIDDEN_SIZE).mT
    rows = []
    for token, logits in zip(hidden_states.reshape(-1, HIDDEN_SIZE), router_logits.mT, strict=True):
        row = block.shared_expert(token)
        for e in logits.argsort(descending=True)[: block.top_k].tolist():
            gate_up = (torch.sigmoid(logits[e]) * token) @ block.experts.gate_up_proj[e]
            gate, up = gate_up.chunk(2)
            row = row + (F.silu(gate) * up) @ block.experts.down_proj[e]
        rows.append(row)
    return torch.stack(rows), router_logits.mT


def assert_same(got_block: Any, want_block: Any, got, want, x, dtype=None) -> None:
    """Compare outputs, and the gradients of input and every parameter for random tangents."""
    tangents = tangents_of(*want)
    inputs = [[x, *block.parameters()] for block in (got_block, want_block)]
    names = ["input", *(name for name, _ in want_block.named_parameters())]
    assert_close(got[0], want[0], dtype=dtype, what="output")
    assert_close(got[1], want[1], dtype=dtype, what="router_logits")
    got_grads = gradients(got, inputs[0], tangents)
    want_grads = gradients(want, inputs[1], tangents)
    for name, actual, expected in zip(names, got_grads, want_grads, strict=True):
        assert_close(actual, expected, dtype=dtype, what=f"gradient of {name}")


@options
@top_ks
def test_equals_transformers(top_k, options):
    hf, x = llama4_block(top_k), tokens(2, 7)
    block = our_llama4_block(hf, **options)
    got, want = block(x), hf(x)
    assert got[0].shape == want[0].shape
    assert_same(block, hf, got, want, x)


@options
@top_ks
def test_equals_a_plain_loop(top_k, options):
    hf, x = llama4_block(top_k), tokens(2, 7)
    block = our_llama4_block(hf, **options)
    assert_same(block, hf, block(x), plain_loop(hf, x), x)


@pytest.mark.parametrize("top_k", [1, 2])
def test_hardly_any_token(top_k):
    hf = llama4_block(top_k)
    block = our_llama4_block(hf)
    for shape in ((1, 1), (0, 3), (5,)):
        x = tokens(*shape)
        assert_close(block(x)[0], hf(x)[0])


def test_experts_compute_routed_rows_alone():
    hf, x = llama4_block(2), tokens(2, 7)
    with RecordOps() as recorded:
        our_llama4_block(hf)(x)
    gemms = [call for call in recorded.calls if call.startswith("grouped_gemm")]
    assert gemms == ["grouped_gemm up", "grouped_gemm down"]


@pytest.mark.parametrize("top_k", [1, 2])
def test_compiled_equals_eager(top_k):
    hf, x = llama4_block(top_k), tokens(2, 7)
    block = our_llama4_block(hf)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(block, block, compiled(x), block(x), x)


# By option, what it leaves without a gradient.
PARTIAL = {"dW_only": {"input"}, "dX_only": {n for n, _ in llama4_block().named_parameters()}}


def gradients_by_name(block: Any, call: Any, x: Any, tangents: Any) -> dict[str, Any]:
    leaf = x.detach().requires_grad_()
    block.zero_grad()
    torch.autograd.backward(call(leaf), tangents)
    return {"input": leaf.grad, **{name: p.grad for name, p in block.named_parameters()}}


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("option", PARTIAL)
def test_partial_gradients_equal_the_full_ones(option, compiles):
    hf, x = llama4_block(2), tokens(2, 7)
    tangents = tangents_of(*hf(x))
    block = our_llama4_block(hf, **{option: True})
    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    want = gradients_by_name(hf, hf, x, tangents)
    got = gradients_by_name(block, compiled if compiles else block, x, tangents)
    assert {name for name, grad in got.items() if grad is None} == PARTIAL[option]
    for name in got.keys() - PARTIAL[option]:
        assert want[name].norm() > 0, name
        assert_close(got[name], want[name], what=name)


def test_backward_does_only_what_is_asked_for():
    hf, x = llama4_block(2), tokens(2, 7)
    tangents: Any = tangents_of(*hf(x))

    def ops(**options: Any) -> list[str]:
        outputs = our_llama4_block(hf, **options)(x)
        with RecordOps() as recorded:
            torch.autograd.backward(outputs, tangents)
        return sorted(recorded.calls)

    dX = ["grouped_gemm_dx down", "grouped_gemm_dx up"]
    dW = ["grouped_gemm_dw down", "grouped_gemm_dw up"]
    # The router and the three projections of the shared expert take two products each.
    assert ops() == sorted([*dX, *dW, *["mm"] * 8])
    assert ops(dX_only=True) == sorted([*dX, *["mm"] * 4])
    # The router's weight is in the rows of the first GEMM, so its dX is needed. The router and the
    # shared expert's first two projections have no input gradient.
    assert ops(dW_only=True) == sorted([*dX, *dW, *["mm"] * 5])


def test_rejects_both_partial_gradients():
    expected = "Llama4GroupedGemmTextMoe: expected dW_only or dX_only or neither, got both"
    with pytest.raises(ValueError, match=expected):
        Llama4GroupedGemmTextMoe(llama4_config(), dW_only=True, dX_only=True)


def test_autocast_equals_transformers():
    hf, x = llama4_block(2).bfloat16().float(), tokens(4, 16).detach().bfloat16().float()
    x.requires_grad_()
    block = our_llama4_block(hf)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = block(x), hf(x)
    assert [output.dtype for output in got] == [output.dtype for output in want]
    assert_same(block, hf, got, want, x, torch.bfloat16)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant):
    hf, x = llama4_block(2), tokens(2, 7)
    block = our_llama4_block(hf)
    tangents: Any = tangents_of(*block(x))
    leaves: list[Any] = [x, *block.parameters()]
    want = gradients(block(x), leaves, tangents)
    # Reentrant checkpointing works only with .backward().
    torch.autograd.backward(checkpoint(block, x, use_reentrant=use_reentrant), tangents)
    for leaf, expected in zip(leaves, want, strict=True):
        assert_close(leaf.grad, expected)


def test_configuration_reaches_the_op(monkeypatch):
    hf, x = llama4_block(), tokens(1, 3)
    config = KernelConfigForward(BLOCK_M=32)
    block = our_llama4_block(hf, autotune=False, kernel_config_fwd=config)
    given = []
    grouped_gemm = moe_ops.grouped_gemm

    def record(*args, **kwargs):
        given.append(kwargs["kernel_config"])
        return grouped_gemm(*args, **kwargs)

    monkeypatch.setattr(moe_ops, "grouped_gemm", record)
    block(x)
    assert given == [moe_ops.kernel_config(config)] * 2
    with pytest.raises(ValueError, match="expected kernel_config_fwd=None with autotune=True"):
        Llama4GroupedGemmTextMoe(llama4_config(), kernel_config_fwd=config)


def test_constructor_leaves_no_weight_uninitialised():
    config = llama4_config()
    for _, weight in Llama4GroupedGemmTextMoe(config).experts.named_parameters():
        assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)


def test_state_dicts_go_both_ways():
    hf, x = llama4_block(), tokens(1, 5)
    block = Llama4GroupedGemmTextMoe(llama4_config())
    block.load_state_dict(hf.state_dict())
    block.check_weights(hf)
    other = llama4_block()
    other.load_state_dict(block.state_dict())
    assert_close(other(x)[0], hf(x)[0])
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        twin.check_weights(block)


def test_copy_weights_and_check_weights():
    hf = llama4_block()
    block = our_llama4_block(hf)
    block.check_weights(hf)
    with torch.no_grad():
        hf.shared_expert.up_proj.weight[3, 5] = 4.0
        block.shared_expert.up_proj.weight[3, 5] = 2.0
    total = hf.shared_expert.up_proj.weight.numel()
    with pytest.raises(ValueError, match="differs") as error:
        block.check_weights(hf)
    assert str(error.value) == (
        "Llama4GroupedGemmTextMoe.check_weights: shared_expert.up_proj.weight differs in 1 of "
        f"{total} numbers, first in shared_expert.up_proj.weight[3, 5]: expected 4.0, got 2.0"
    )
    block.copy_weights(hf)
    block.check_weights(hf)


def test_copy_weights_rejects_others_and_copies_nothing():
    hf = llama4_block()
    block = our_llama4_block(hf)
    with pytest.raises(ValueError, match=r"copy_weights: expected experts\.gate_up_proj of shape"):
        block.copy_weights(llama4_block(num_experts=3))
    block.check_weights(hf)
    with pytest.raises(TypeError, match="copy_weights: expected other to be a Llama4TextMoe"):
        block.copy_weights(nn.Linear(2, 2))  # type: ignore[arg-type]


class FakeStream:
    """Stands for a stream, and writes down who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_side_stream_waits_and_is_waited_for(monkeypatch):
    # There is no GPU here: the steps come in the right order and compute the same.
    hf, x = llama4_block(2), tokens(2, 7)
    block, log = our_llama4_block(hf), list[str]()
    streams = {name: FakeStream(name, log) for name in ("caller", "side")}

    @contextlib.contextmanager
    def on_stream(stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    def record_stream(tensor, stream):
        what = "tokens" if torch.equal(tensor, x.view(-1, HIDDEN_SIZE)) else "shared"
        log.append(f"{what} used on {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["caller"])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(llama4_moe, "_side_stream", lambda device: streams["side"])
    shared = block.shared_expert
    monkeypatch.setattr(shared, "forward", logged(shared.forward, "shared_expert", log))
    monkeypatch.setattr(block, "run_router", logged(block.run_router, "run_router", log))
    got, want = block._overlapped(x.view(-1, HIDDEN_SIZE)), hf(x)
    assert_same(block, hf, got, want, x)
    assert log == [
        "side waits for caller",
        "on side",
        "shared_expert",
        "off side",
        "tokens used on side",
        "run_router",
        "caller waits for side",
        "shared used on caller",
    ]


def logged(function, name, log):
    def call(*args):
        log.append(name)
        return function(*args)

    return call
