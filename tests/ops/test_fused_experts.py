# SPDX-License-Identifier: Apache-2.0
"""These tests are fused_experts's own. test_every_op.py holds what every op must do.

T tokens, H hidden size, I intermediate size, U = 2 * I where gated, else I, E experts, K top_k,
R = T * K rows.
"""

import functools
import io
import itertools
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moe_ops._core.library import SCHEMAS
from moe_ops.ops.fused_experts import pytorch
from testing import boundaries, checks, oracle
from testing.moe_block import (
    Weights,
    compiled_graphs,
    composed_experts,
    experts_block,
    loss_and_gradients,
    make_tokens,
    make_weights,
    swiglu,
    unfused_block,
)
from testing.recorders import CountAten, MoeOps
from testing.strategies import PRESENT, Sample, seeded_sample

moe = torch.ops.moe
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)
both_orders = pytest.mark.parametrize("weights_before", [False, True])
ACTIVATIONS = SCHEMAS["fused_experts"].argument("activation").choices
RECOMPUTE = SCHEMAS["fused_experts"].argument("recompute").choices
GRADS = ["hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias"]


def experts(
    routing: str = "uniform",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    biased: bool = True,
    **fixed: Any,
) -> Sample:
    top_k = 4 if routing == "every_expert" else 2
    chosen = {"T": 9, "H": 7, "I": 5, "E": 4, "K": top_k, "layout": "contiguous"}
    chosen |= {"activation": "silu", "gated": True, "interleaved": False, "activation_limit": None}
    chosen |= {"weights_before": False, "recompute": "none"}
    chosen |= dict.fromkeys(("gate_up_bias", "down_bias"), PRESENT if biased else None)
    return seeded_sample(
        SCHEMAS["fused_experts"], seed, **{**chosen, **fixed}, routing=routing, dtype=dtype
    )


def output_and_gradients(sample: Sample, tangent: Tensor | None = None) -> dict[str, Tensor]:
    arguments = sample.requiring_grad()
    names = sample.differentiable()
    output = sample(**arguments)
    tangent = torch.ones_like(output) if tangent is None else tangent
    found = torch.autograd.grad(output, [arguments[n] for n in names], tangent)
    return {"output": output, **dict(zip(names, found, strict=True))}


def assert_right(sample: Sample) -> None:
    """Check that output and gradients are the oracle's, and that everything was written."""
    tangent = torch.randn(sample.arguments["hidden_states"].shape).to(
        sample.arguments["hidden_states"].dtype
    )
    with checks.poisoned_memory():
        found = output_and_gradients(sample, tangent)
    checks.assert_matches_oracle(sample, found["output"])
    scales = checks.gradient_scales(sample, tangent)
    for name, expected in checks.oracle_gradients(sample, tangent).items():
        dtype = checks.coarser(found[name].dtype, tangent.dtype)
        what = f"{sample}: gradient of {name}"
        checks.assert_close(found[name], expected, dtype=dtype, scale=scales[name], what=what)


# swiglu_oai without up is refused.
FORMS = [
    (activation, form)
    for activation, form in itertools.product(ACTIVATIONS, ("gate, up", "interleaved", "ungated"))
    if (activation, form) != ("swiglu_oai", "ungated")
]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@both_orders
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize(("activation", "form"), FORMS)
def test_every_combination_of_flags(activation, form, limit, weights_before, recompute):
    for routing, biased in (("dropped", False), ("dropped", True), ("empty", True)):
        sample = experts(
            routing, torch.float64, biased=biased, activation=activation, recompute=recompute,
            activation_limit=limit, weights_before=weights_before, gated=form != "ungated",
            interleaved=form == "interleaved",
        )  # fmt: skip
        assert_right(sample)


@both_orders
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("routing", oracle.ROUTINGS)
@dtypes
def test_every_dtype_and_routing(dtype, routing, recompute, weights_before):
    flags = {"recompute": recompute, "weights_before": weights_before}
    assert_right(experts(routing, dtype, **flags))
    flags |= {"activation": "swiglu_oai", "interleaved": True, "layout": "transposed"}
    assert_right(experts(routing, dtype, **flags))


@both_orders
@dtypes
def test_more_rows_than_are_worked_on_at_a_time(dtype, weights_before):
    """The PyTorch implementation takes z and the hidden states in parts of 2**19 elements."""
    num_tokens, top_k = 40, 2
    sizes = {"H": 8191} if weights_before else {"I": 4099}
    sample = experts(
        "dropped", dtype, T=num_tokens, E=3, biased=False, weights_before=weights_before, **sizes
    )
    width = 8191 if weights_before else sample.arguments["gate_up_proj"].shape[1]
    assert num_tokens * top_k * width > 2**19
    # In fp16 a sum of so many large terms overflows.
    for name in ("gate_up_proj", "down_proj"):
        sample.arguments[name].mul_(2**-6)
    assert_right(sample)


@both_orders
@pytest.mark.parametrize("recompute", RECOMPUTE)
@dtypes
def test_no_tokens(dtype, recompute, weights_before):
    sample = experts(dtype=dtype, T=0, recompute=recompute, weights_before=weights_before)
    with checks.poisoned_memory():
        found = output_and_gradients(sample)
    assert found["output"].shape == (0, 7)
    for name in GRADS:
        assert found[name].shape == sample.arguments[name].shape
        assert (found[name] == 0).all()


@both_orders
@pytest.mark.parametrize("recompute", RECOMPUTE)
@dtypes
def test_dropped_slots_are_exactly_zero_and_never_read(dtype, recompute, weights_before):
    sample = experts("dropped", dtype, weights_before=weights_before, recompute=recompute, T=12)
    dropped = oracle.dropped_slots(sample.arguments["topk_ids"], 4)
    unused = dropped.all(1)
    assert unused.any()
    assert (dropped & ~unused[:, None]).any()
    clean = output_and_gradients(sample)
    poisoned = dict(sample.arguments)
    poisoned["topk_weights"] = poisoned["topk_weights"].masked_fill(dropped, float("nan"))
    poisoned["hidden_states"] = poisoned["hidden_states"].masked_fill(unused[:, None], float("nan"))
    tangent = torch.ones_like(clean["output"]).masked_fill(unused[:, None], float("nan"))
    with checks.poisoned_memory():
        found = output_and_gradients(
            Sample(sample.schema, poisoned, sample.layouts, sample.routing), tangent
        )
    for name, want in clean.items():
        assert torch.equal(found[name], want), name
    assert (found["output"][unused] == 0).all()
    assert (found["hidden_states"][unused] == 0).all()
    assert (found["topk_weights"][dropped] == 0).all()
    assert (found["topk_weights"][~dropped] != 0).all()


@both_orders
@dtypes
def test_experts_without_rows_have_exactly_zero_gradients(dtype, weights_before):
    sample = experts("hot", dtype, weights_before=weights_before)
    with checks.poisoned_memory():
        found = output_and_gradients(sample)
    used = torch.zeros(4, dtype=torch.bool)
    used[sample.arguments["topk_ids"].long().flatten()] = True
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert (found[name][~used] == 0).all(), name
        assert (found[name][used] != 0).any(), name


@pytest.mark.parametrize("flags", boundaries.LIMITED)
@dtypes
def test_gradients_pass_at_the_limit_and_not_beyond(dtype, flags):
    given = boundaries.limit_problem(dtype, device=torch.device("cpu"), **boundaries.LIMITED[flags])
    boundaries.check_limit(given)


def gpt_oss(z: Tensor) -> Tensor:
    gate, up = z[:, ::2].clamp(max=7.0), z[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    "Qwen3": ({}, swiglu),
    "gpt-oss": (
        {"activation": "swiglu_oai", "interleaved": True, "activation_limit": 7.0}, gpt_oss,
    ),
    "Nemotron-H": ({"activation": "relu_squared", "gated": False}, lambda z: F.relu(z) ** 2),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_composition_of_the_separate_ops(family, dtype):
    flags, act = FAMILIES[family]
    sample = experts("dropped", dtype, **flags, T=20, H=16, I=24)
    arguments = {key: sample.arguments[key] for key in (*GRADS, "topk_ids")}
    leaves = {key: arguments[key].detach().requires_grad_() for key in GRADS}
    output = composed_experts(**{**arguments, **leaves}, activation=act)
    tangent = torch.randn(output.shape).to(dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), tangent)
    found = output_and_gradients(sample, tangent)
    checks.assert_close(found["output"], output)
    for name, want in zip(GRADS, grads, strict=True):
        checks.assert_close(found[name], want, what=name)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputing_changes_no_bit(recompute):
    expected = output_and_gradients(experts("dropped", torch.bfloat16))
    found = output_and_gradients(experts("dropped", torch.bfloat16, recompute=recompute))
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


# The tests of what is saved.


def saved_by(sample: Sample, wanted: list[str]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what autograd keeps for the gradients of `wanted`, and the call's arguments."""
    arguments = sample.requiring_grad()
    for name in sample.differentiable():
        arguments[name].requires_grad_(name in wanted)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sample(**arguments)
    return saved, arguments


SAVED_ALWAYS = ["gate_up_proj", "down_proj", "topk_weights"]
# By gradients and weights_before: the arguments that are kept, and whether z is. What z depends on
# and needs a gradient is kept too, so that a second derivative is seen.
SAVED = [
    (["hidden_states"], False, ["hidden_states"], True),
    (["hidden_states"], True, ["hidden_states"], True),
    (["gate_up_proj"], False, ["hidden_states"], True),
    (["down_proj"], False, [], True),
    (["topk_weights"], False, ["down_bias"], True),
    (["topk_weights"], True, ["hidden_states"], True),
    (["gate_up_bias"], False, ["gate_up_bias"], True),
    (["down_bias"], False, [], False),
    (["down_bias"], True, [], False),
    (GRADS, False, ["hidden_states", "gate_up_bias", "down_bias"], True),
    (GRADS, True, ["hidden_states", "gate_up_bias"], True),
]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("wanted", "weights_before", "names", "keeps_z"), SAVED, ids=str)
def test_saves_what_the_needed_gradients_need_alone(
    wanted, weights_before, names, keeps_z, recompute
):
    sample = experts(weights_before=weights_before, recompute=recompute)
    saved, arguments = saved_by(sample, wanted)
    recomputes = keeps_z and recompute == "pre_activation"
    if recomputes:
        names = {*names, "hidden_states", "gate_up_bias"}
    kept = {name for name in GRADS if any(tensor is arguments[name] for tensor in saved)}
    assert kept == {*SAVED_ALWAYS, *names}

    num_experts, num_rows, width = 4, 9 * 2, 2 * 5
    made = [tensor for tensor in saved if not any(tensor is a for a in arguments.values())]
    indices: list[tuple[int, ...]] = [(num_experts,), (num_rows,), (num_rows,)]
    z: list[tuple[int, ...]] = [(num_rows, width)] if keeps_z and not recomputes else []
    assert sorted(tuple(tensor.shape) for tensor in made) == sorted(z + indices)
    index_bytes = 4 * (num_experts + 2 * num_rows)
    total = sum(tensor.untyped_storage().nbytes() for tensor in made)
    assert total == index_bytes + (4 * num_rows * width if z else 0)


def needs_of(wanted: list[bool], weights_before: bool) -> tuple[list[bool], list[bool]]:
    """Return what the backward ops are asked for, where these gradients, in the order of GRADS, are wanted."""
    x, up, down, weights, up_bias, down_bias = wanted
    of_up = [x, up, weights and weights_before, up_bias]
    return [any(of_up), down, weights and not weights_before, down_bias], of_up


class Kernels(NamedTuple):
    """The two backward ops, or functions that take the same arguments."""

    down: Any = moe.fused_experts_down_backward
    up: Any = moe.fused_experts_up_backward

    def gradients(
        self,
        grad_output: Tensor,
        inputs: list[Tensor],
        z: Tensor | None,
        routing: list[Tensor],
        wanted: list[bool],
        weights_before: bool,
    ) -> list[Tensor | None]:
        """Return the gradients in the order of GRADS, as fused_experts' own backward makes them."""
        x, gate_up, _, weights, *_ = inputs
        of_down, of_up = needs_of(wanted, weights_before)
        flags = ("silu", True, False, None, weights_before, of_down, False)
        dz, grad_down, grad_weights, grad_down_bias = self.down(
            grad_output, *inputs, z, *routing, *flags
        )
        grad_x = grad_up = grad_up_bias = None
        if any(of_up):
            before, top_k = weights if weights_before else None, weights.shape[1]
            grad_x, grad_up, grad_before, grad_up_bias = self.up(
                dz, x, gate_up, before, *routing, top_k, of_up, False
            )
            grad_weights = grad_before if weights_before else grad_weights
        return [grad_x, grad_up, grad_down, grad_weights, grad_up_bias, grad_down_bias]


@both_orders
def test_frozen_arguments_cost_nothing(weights_before):
    sample = experts(weights_before=weights_before)
    leaves = [sample.arguments[name] for name in GRADS]
    output, z, *routing = moe.fused_experts_forward(*sample.arguments.values())
    for wanted in itertools.product([False, True], repeat=6):
        found = Kernels().gradients(
            torch.ones_like(output), leaves, z, routing, list(wanted), weights_before
        )
        for needed, grad, leaf in zip(wanted, found, leaves, strict=True):
            assert (grad is not None and grad.untyped_storage().nbytes() > 0) == needed
            if grad is not None and needed:
                assert grad.shape == leaf.shape


# By single gradient and weights_before: how many products of all rows with all experts it takes,
# whether it needs the derivative of the activation, and whether rows are summed by token.
PRODUCTS = [
    ("hidden_states", False, 2, True, True),
    ("hidden_states", True, 2, True, True),
    ("gate_up_proj", False, 2, True, False),
    ("gate_up_proj", True, 2, True, False),
    ("down_proj", False, 1, False, False),
    ("topk_weights", False, 1, False, False),
    ("topk_weights", True, 2, True, False),
    ("gate_up_bias", False, 1, True, False),
    ("gate_up_bias", True, 1, True, False),
    ("down_bias", False, 0, False, False),
    ("down_bias", True, 0, False, False),
]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("name", "weights_before", "products", "derives", "sums"), PRODUCTS)
def test_each_gradient_takes_its_own_products_alone(
    name, weights_before, products, derives, sums, recompute
):
    """The PyTorch implementation calls one aten op for each product, and these are counted."""
    sample = experts(H=8, I=8, weights_before=weights_before, recompute=recompute, biased=False)
    output, z, *routing = moe.fused_experts_forward(*sample.arguments.values())
    leaves = [sample.arguments[n] for n in GRADS]
    wanted = [other == name for other in GRADS]
    kept = z if recompute == "none" else None
    kernels = Kernels(pytorch.fused_experts_down_backward, pytorch.fused_experts_up_backward)
    with CountAten() as aten:
        kernels.gradients(torch.ones_like(output), leaves, kept, routing, wanted, weights_before)
    again = recompute != "none" and name != "down_bias"
    assert aten.calls["_grouped_mm"] == products + again
    assert bool(aten.calls["silu_backward"]) == derives
    assert bool(aten.calls["_embedding_bag_forward_only"] + aten.calls["_embedding_bag"]) == sums
    assert not aten.calls["mm"] + aten.calls["bmm"]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_inference_keeps_no_pre_activation(recompute):
    """Inference frees it before the down projection. With a gradient it stays."""
    sample = experts(H=8, I=8, recompute=recompute)
    width = 2 * 8
    arguments = list(sample.arguments.values())
    for for_backward in (False, True):
        alive: list[int] = []
        made: list[weakref.ref[Tensor]] = []

        class Watch(TorchDispatchMode):
            """Counts the tensors of z's shape that are alive when the slots are summed."""

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if "embedding_bag" in func.name():
                    alive.append(sum(made_one() is not None for made_one in made))  # noqa: B023
                found = func(*args, **(kwargs or {}))
                if isinstance(found, Tensor) and found.shape == (9 * 2, width):
                    made.append(weakref.ref(found))  # noqa: B023
                return found

        with Watch():
            outputs = pytorch.fused_experts(*arguments, for_backward=for_backward)
        assert isinstance(outputs, tuple) == for_backward
        assert made
        assert len(alive) == 1
        assert bool(alive[0]) == (for_backward and recompute == "none")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@dtypes
def test_inference_equals_the_forward_that_a_gradient_is_recorded_of(dtype, recompute):
    arguments = experts("dropped", dtype, recompute=recompute).arguments.values()
    expected, *_ = moe.fused_experts_forward(*arguments)
    assert torch.equal(moe.fused_experts(*arguments), expected)


@both_orders
def test_frozen_arguments_are_not_read(weights_before):
    """NaN in what a gradient is not taken from does not show, for each gradient alone."""
    sample = experts(weights_before=weights_before)
    output, z, *routing = moe.fused_experts_forward(*sample.arguments.values())
    inputs = {name: sample.arguments[name] for name in GRADS} | {"z": z}
    reads = {
        "hidden_states": ["gate_up_proj", "down_proj", "z", "topk_weights"],
        "gate_up_proj": ["hidden_states", "down_proj", "z", "topk_weights"],
        "down_proj": ["z"] if weights_before else ["z", "topk_weights"],
        "topk_weights": ["hidden_states", "gate_up_proj", "down_proj", "z"]
        if weights_before
        else ["down_proj", "down_bias", "z"],
        "gate_up_bias": ["down_proj", "z"]
        if weights_before
        else ["down_proj", "z", "topk_weights"],
        "down_bias": [] if weights_before else ["topk_weights"],
    }
    for needed, name in enumerate(GRADS):

        def gradient(inputs: dict[str, Tensor], needed: int = needed) -> Tensor:
            wanted = [i == needed for i in range(6)]
            *leaves, z = inputs.values()
            found = Kernels().gradients(
                torch.ones_like(output), leaves, z, routing, wanted, weights_before
            )[needed]
            assert found is not None
            return found

        expected = gradient(inputs)
        for other in inputs:
            nan = {**inputs, other: torch.full_like(inputs[other], float("nan"))}
            unread = torch.equal(gradient(nan), expected)
            assert unread == (other not in reads[name]), f"{other} for the gradient of {name}"


@pytest.mark.parametrize("stored", [(False, False), (True, False), (False, True), (True, True)])
def test_weight_gradients_have_the_strides_of_the_weights(stored):
    """With others AccumulateGrad would copy them."""
    sample = experts()
    weights: dict[str, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, is_transposed in zip(("gate_up_proj", "down_proj"), stored, strict=True):
        parameter = sample.arguments[name]
        parameter = parameter.mT.contiguous() if is_transposed else parameter
        parameters[name] = parameter.detach().requires_grad_()
        weights[name] = parameters[name].mT if is_transposed else parameters[name] * 1
        weights[name].register_hook(functools.partial(kept.__setitem__, name))
    sample(**weights).sum().backward()
    expected = output_and_gradients(sample)
    for name, weight in weights.items():
        assert kept[name].stride() == weight.stride()
        grad = parameters[name].grad
        assert grad is not None
        assert grad.is_contiguous()
        checks.assert_close(kept[name], expected[name])


def test_bitwise_repeatable_at_a_size_that_uses_threads():
    sample = experts("dropped", T=400, H=128, I=96)
    first = output_and_gradients(sample)
    for _ in range(3):
        for name, got in output_and_gradients(sample).items():
            assert torch.equal(got, first[name]), name


# The tests of a block around the op: compiled, checkpointed and exported.


recomputing_block = functools.partial(experts_block, recompute="pre_activation")
BLOCKS = {"saving": experts_block, "recomputing": recomputing_block}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for position, (actual, expected) in enumerate(zip(got, want, strict=True)):
        checks.assert_close(actual, expected, what=f"output or gradient {position}")


@blocks
@dtypes
def test_block_equals_the_unfused_one(block, dtype):
    hidden, weights = make_tokens(40, dtype), make_weights(dtype)
    got = loss_and_gradients(block, hidden, weights)
    assert_same(got, loss_and_gradients(unfused_block, hidden, weights))


@pytest.mark.slow
@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_equals_eager(block, dtype):
    hidden, weights = make_tokens(7, dtype), make_weights(dtype)
    eager = loss_and_gradients(block, hidden, weights)
    compiled = loss_and_gradients(torch.compile(block, fullgraph=True), hidden, weights)
    assert all(got.norm() > 0 for got in compiled)
    assert_same(compiled, eager)


@blocks
def test_token_counts_share_compilations(block):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    weights = make_weights()
    for num_tokens in (2, 3, 5, 8, 13):
        got = loss_and_gradients(compiled, make_tokens(num_tokens), weights)
        assert_same(got, loss_and_gradients(block, make_tokens(num_tokens), weights))
    assert counter.frame_count <= 2
    for num_tokens in (0, 1):
        before = counter.frame_count
        got = loss_and_gradients(compiled, make_tokens(num_tokens), weights)
        assert_same(got, loss_and_gradients(block, make_tokens(num_tokens), weights))
        assert counter.frame_count <= before + 1


def test_unbacked_token_count():
    weights = make_weights()

    def chosen_tokens(hidden, wanted):
        return experts_block(hidden[wanted], weights)

    hidden, wanted = make_tokens(9), torch.arange(9) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen_tokens, fullgraph=True, backend="aot_eager")
        got = compiled(hidden, wanted)
    checks.assert_close(got, experts_block(hidden[wanted], weights))


def test_graphs():
    """The forward is one node, the backward two. No tensor that is recomputed goes between them."""
    routing = ["moe.topk_routing.default: float32[3, 2], int32[3, 2]"]
    down = "float32[6, 12], float32[4, 8, 6], float32[3, 2], float32[0]"
    up = "float32[3, 8], float32[4, 12, 8], float32[0], float32[0]"
    backward = [
        f"moe.fused_experts_down_backward.default: {down}",
        f"moe.fused_experts_up_backward.default: {up}",
        "moe.topk_routing_backward.default: float32[3, 4]",
    ]
    for block, z in ((experts_block, "6, 12"), (recomputing_block, "0")):
        forward = (
            f"moe.fused_experts_forward.default: float32[3, 8], float32[{z}], int32[4], int32[6], "
            "int32[6]"
        )
        assert compiled_graphs(block) == {"forward": [*routing, forward], "backward": backward}


def test_transposed_weights_under_compile():
    """The strides of the gradient are known when it is traced."""
    weights = make_weights()
    stored = [weights.gate_up_proj.detach().mT.contiguous(), weights.down_proj.detach().mT.clone()]
    leaves = [tensor.requires_grad_() for tensor in stored]

    def block(hidden, up, down):
        return experts_block(hidden, Weights(weights.router, up.mT, down.mT))

    hidden = make_tokens(6)
    expected = torch.autograd.grad(block(hidden, *leaves).sum(), leaves)
    compiled = torch.compile(block, fullgraph=True)
    assert_same(list(torch.autograd.grad(compiled(hidden, *leaves).sum(), leaves)), list(expected))


def save_experts(ctx, func, *args, **kwargs):
    if func is moe.fused_experts_forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_RECOMPUTE


def checkpointed(**options: Any) -> Any:
    def block(hidden, weights):
        def on_tensors(hidden, *tensors):
            return experts_block(hidden, Weights(*tensors))

        return checkpoint(
            on_tensors, hidden, *weights.tensors(), use_reentrant=False, **options
        )  # fmt: skip

    return block


SELECTIVE = {
    "context_fn": functools.partial(create_selective_checkpoint_contexts, save_experts)
}  # fmt: skip


@pytest.mark.parametrize(("options", "runs"), [({}, 2), (SELECTIVE, 1)], ids=["full", "selective"])
def test_checkpointing(options, runs):
    block, hidden, weights = checkpointed(**options), make_tokens(7), make_weights()
    expected = loss_and_gradients(experts_block, hidden, weights)
    with MoeOps() as counted:
        loss_and_gradients(block, make_tokens(7), make_weights())
    assert counted.counts["fused_experts_forward"] == runs
    assert counted.counts["topk_routing"] == 2
    assert counted.counts["fused_experts"] == 0
    assert_same(loss_and_gradients(block, hidden, weights), expected)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, hidden, weights), expected)
    graphs = compiled_graphs(block)
    recomputed = sum(op.startswith("moe.fused_experts_forward") for op in graphs["backward"])
    assert recomputed == runs - 1


def test_compiled_autograd_equals_eager():
    hidden, weights = make_tokens(6), make_weights()
    expected = loss_and_gradients(experts_block, hidden, weights)
    with torch._dynamo.config.patch(compiled_autograd=True):
        output = torch.compile(experts_block, backend="aot_eager")(hidden, weights)
        tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
        torch.compile(lambda: output.backward(tangent), backend="aot_eager")()
    grads = [tensor.grad for tensor in (hidden, *weights.tensors())]
    assert_same([output, *(grad for grad in grads if grad is not None)], expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context):
    hidden, weights = make_tokens(6), make_weights()
    expected = experts_block(hidden, weights)
    with context(), MoeOps() as counted:
        output = experts_block(hidden, weights)
    assert counted.counts == {"topk_routing": 1, "fused_experts": 1}
    assert torch.equal(output, expected)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weights = make_weights()
        self.router, self.gate_up_proj, self.down_proj = map(torch.nn.Parameter, weights.tensors())

    def forward(self, hidden):
        return experts_block(hidden, Weights(self.router, self.gate_up_proj, self.down_proj))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_holds_the_op_and_any_token_count(strict):
    block = Block()
    num_tokens = torch.export.Dim("num_tokens", min=2, max=4096)
    program = torch.export.export(
        block, (make_tokens(5).detach(),), dynamic_shapes=({0: num_tokens},), strict=strict
    )
    assert [str(n.target) for n in program.graph.nodes].count("moe.fused_experts.default") == 1
    buffer = io.BytesIO()
    torch.export.save(program.run_decompositions(), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert [str(n.target) for n in loaded.graph.nodes].count("moe.fused_experts.default") == 1
    for tokens in (2, 5, 19):
        hidden = make_tokens(tokens).detach()
        checks.assert_close(program.module()(hidden), block(hidden))
        checks.assert_close(loaded.module()(hidden), block(hidden))
