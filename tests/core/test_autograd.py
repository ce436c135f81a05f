# SPDX-License-Identifier: Apache-2.0
"""The Autograd kernel computes the gradients that are needed, and refuses what it cannot do."""

import contextlib
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_ops._core import library
from moe_ops._core.library import OPS, SCHEMAS, Op
from moe_ops._core.torch_private import AFTER_AUTOGRAD
from testing import checks, oracle
from testing.moe_block import BLOCKS, loss_and_gradients, make_tokens, make_weights
from testing.recorders import MoeOps
from testing.strategies import PRESENT, Sample, seeded_sample, variants

moe = torch.ops.moe
DIFFERENTIABLE = sorted(name for name, s in SCHEMAS.items() if any(a.grad for a in s.tensors))
differentiable_schemas = pytest.mark.parametrize("name", DIFFERENTIABLE)
blocks = pytest.mark.parametrize("name", sorted(BLOCKS))


# The arguments that fused_experts is differentiable in.
EXPERTS = [
    "hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias",
]  # fmt: skip


def experts_needs(down: list[bool], up: list[bool] | None = None) -> dict[str, list[bool]]:
    """Return what the backward ops of fused_experts are asked for; without `up` only one runs."""
    asked = {"fused_experts_down_backward": down}
    return asked if up is None else {**asked, "fused_experts_up_backward": up}


# By the one argument of fused_experts that needs its gradient. Outputs of the first op: gradients of
# z, down_proj, topk_weights and down_bias; of the second: of hidden_states, gate_up_proj, topk_weights
# (with weights_before) and gate_up_bias.
DZ = [True, False, False, False]
EXPERTS_NEEDS = {
    "hidden_states": experts_needs(DZ, [True, False, False, False]),
    "gate_up_proj": experts_needs(DZ, [False, True, False, False]),
    "down_proj": experts_needs([False, True, False, False]),
    "topk_weights": experts_needs([False, False, True, False]),
    "gate_up_bias": experts_needs(DZ, [False, False, False, True]),
    "down_bias": experts_needs([False, False, False, True]),
}


def floating(output):
    return output[0] if isinstance(output, tuple) else output


def every_argument(name: str, seed: int = 0, **chosen: Any) -> Sample:
    """Return a sample of several rows in fp64, with every optional tensor given."""
    optional = {a.name: PRESENT for a in SCHEMAS[name].tensors if a.is_optional}
    sizes = {"T": 5, "H": 3, "I": 4, "D": 3, "N": 8, "G": 4}
    fixed: dict[str, Any] = {k: v for k, v in sizes.items() if k in SCHEMAS[name].dims}
    fixed |= {"dtype": torch.float64, "layout": "contiguous", "routing": "uniform"}
    return seeded_sample(SCHEMAS[name], seed, **optional, **fixed, **chosen)


def selects_firmly(sample: Sample) -> bool:
    """Return whether topk_routing chooses the same after a step of finite differences."""
    logits = sample.arguments.get("logits")
    if logits is None:
        return True
    gaps = [row.sort().values.diff().min() for row in logits if row.numel() > 1]
    return all(gap > 1e-2 for gap in gaps) and sample.arguments["num_groups"] == 1


@differentiable_schemas
def test_gradcheck(name):
    """Gradients equal finite differences in fp64, for every combination of flags."""
    checked = 0
    for variant in variants(SCHEMAS[name]):
        for seed in range(20):
            fixed = {**variant, "T": 3, "dtype": torch.float64, "layout": "contiguous"}
            if "logits" in {a.name for a in SCHEMAS[name].tensors}:
                fixed |= {"num_groups": 1, "G": 4}
            if name == "ep_combine":
                # Each row holds a token. The gradient of one that holds none is unspecified.
                fixed |= {"capacity": 3, "routing": "uniform"}
            sample = seeded_sample(SCHEMAS[name], seed, **fixed)
            if selects_firmly(sample):
                break
        else:
            pytest.fail(f"no sample of {variant} keeps its selection")
        arguments = sample.requiring_grad()
        names = sample.differentiable()

        def function(*tensors, arguments=arguments, names=names, sample=sample):
            return floating(sample(**{**arguments, **dict(zip(names, tensors, strict=True))}))

        leaves = tuple(arguments[n] for n in names)
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True), sample
        checked += 1
    assert checked


@differentiable_schemas
def test_forward_ad_is_refused(name):
    sample = every_argument(name)
    for differentiable in sample.differentiable():
        value = sample.arguments[differentiable]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(NotImplementedError, match=f"moe::{name}: forward-mode AD"):
                sample(**{differentiable: dual})
            # Inside a dual level, but without a tangent, the op runs.
            sample()
        with pytest.raises(NotImplementedError, match=f"moe::{name}: forward-mode AD"):
            torch.func.jvp(
                lambda x, key=differentiable: floating(sample(**{key: x})),
                (value,),
                (torch.ones_like(value),),
            )


def first_and_second_gradients(function, arguments, names):
    """Return a function from (index of a first gradient, leaf) to the second, and the leaves."""
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    output = floating(function(**{**arguments, **leaves}))
    leaves["grad_output"] = torch.ones_like(output).requires_grad_()
    grads = torch.autograd.grad(
        output, [leaves[n] for n in names], leaves["grad_output"], create_graph=True
    )

    def second(index, leaf):
        return torch.autograd.grad(
            grads[index].sum(), leaves[leaf], retain_graph=True, allow_unused=True
        )[0]

    return second, list(leaves)


@pytest.mark.parametrize("name", ["grouped_gemm", "unpermute", "topk_routing", "fused_experts"])
def test_double_backward_is_refused_where_the_backward_is_opaque(name):
    sample = every_argument(name)
    names = sample.differentiable()
    second, leaves = first_and_second_gradients(sample, sample.arguments, names)
    reference, _ = first_and_second_gradients(getattr(oracle, name), sample.arguments, names)
    refused = 0
    for index, leaf in itertools.product(range(len(names)), leaves):
        expected = reference(index, leaf)
        if expected is None or not expected.any():
            continue
        with pytest.raises(
            NotImplementedError, match=f"moe::{name}_(dx|dw|(down_|up_)?backward): "
        ):
            second(index, leaf)
        refused += 1
    assert refused >= len(names)


@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
@pytest.mark.parametrize("name", ["hidden_states", "gate_up_bias"])
def test_double_backward_of_frozen_experts_is_refused(name, recompute):
    """No weight requires grad here, and the gradient of the output does not either."""
    arguments = {
        "hidden_states": torch.randn(5, 8),
        "gate_up_proj": torch.randn(4, 12, 8),
        "down_proj": torch.randn(4, 8, 6),
        "topk_ids": torch.randint(4, (5, 2)),
        "topk_weights": torch.rand(5, 2),
        "gate_up_bias": torch.randn(4, 12),
    }
    leaf = arguments[name].requires_grad_()
    output = torch.ops.moe.fused_experts(**arguments, recompute=recompute)
    (first,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="moe::fused_experts_up_backward: has no gradient"
    ):
        torch.autograd.grad(first.square().sum(), leaf)


def test_double_backward_works_where_the_backward_is_an_op_with_a_gradient():
    for name in ("permute", "unpermute"):
        sample = seeded_sample(
            SCHEMAS[name], 1, T=3, topk_weights=None, dtype=torch.float64, layout="contiguous"
        )
        value = sample.arguments["input"].detach().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, s=sample: s(input=x), (value,))


@differentiable_schemas
def test_second_backward_through_a_retained_graph(name):
    sample = every_argument(name)
    arguments = sample.requiring_grad()
    leaves = [arguments[n] for n in sample.differentiable()]
    output = floating(sample(**arguments))
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(output.sum(), leaves)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@differentiable_schemas
def test_gradients_not_needed_are_none(name):
    """One argument requires grad at a time. The others get no gradient."""
    sample = every_argument(name)
    for wanted in sample.differentiable():
        arguments = sample.requiring_grad()
        for other in sample.differentiable():
            arguments[other].requires_grad_(other == wanted)
        floating(sample(**arguments)).sum().backward()
        for other in sample.differentiable():
            assert (arguments[other].grad is not None) == (other == wanted)


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("grouped_gemm", ["input"], {"grouped_gemm_dx": [True, False]}),
        ("grouped_gemm", ["topk_weights"], {"grouped_gemm_dx": [False, True]}),
        ("grouped_gemm", ["weight"], {"grouped_gemm_dw": [True, False]}),
        ("grouped_gemm", ["bias"], {"grouped_gemm_dw": [False, True]}),
        (
            "grouped_gemm",
            ["input", "weight", "topk_weights", "bias"],
            {"grouped_gemm_dx": [True, True], "grouped_gemm_dw": [True, True]},
        ),
        ("grouped_gemm_quantized", ["input"], {"grouped_gemm_quantized_dx": [True, False]}),
        ("grouped_gemm_quantized", ["topk_weights"], {"grouped_gemm_quantized_dx": [False, True]}),
        (
            "grouped_gemm_quantized",
            ["input", "topk_weights", "bias"],
            {"grouped_gemm_quantized_dx": [True, True], "grouped_gemm_dw": [False, True]},
        ),
        *(("fused_experts", [name], needs) for name, needs in EXPERTS_NEEDS.items()),
        ("fused_experts", EXPERTS, experts_needs([True] * 4, [True, True, False, True])),
        ("unpermute", ["input"], {"unpermute_backward": [True, False]}),
        ("unpermute", ["topk_weights"], {"unpermute_backward": [False, True]}),
        ("unpermute", ["input", "topk_weights"], {"unpermute_backward": [True, True]}),
    ],
    ids=str,
)
def test_backward_computes_what_is_needed_alone(name, wanted, expected):
    chosen = {"weights_before": False} if name == "fused_experts" else {}
    check_needs(every_argument(name, **chosen), wanted, expected)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["topk_weights"], experts_needs(DZ, [False, False, True, False])),
        (EXPERTS, experts_needs([True, True, False, True], [True] * 4)),
    ],
    ids=str,
)
def test_weights_before_move_their_gradient_to_the_other_op(wanted, expected):
    sample = every_argument("fused_experts", weights_before=True)
    check_needs(sample, wanted, expected)


def check_needs(sample: Sample, wanted: list[str], expected: dict[str, list[bool]]) -> None:
    arguments = sample.requiring_grad()
    for argument in sample.differentiable():
        arguments[argument].requires_grad_(argument in wanted)
    output = sample(**arguments)
    with MoeOps() as counted:
        output.sum().backward()
    assert counted.needs == expected
    assert counted.counts == dict.fromkeys(expected, 1)


def test_saves_nothing_that_the_needed_gradients_do_not_read():
    sample = every_argument("grouped_gemm")
    for wanted, unread in (("input", ["input", "bias"]), ("weight", ["weight", "bias"])):
        arguments = sample.requiring_grad()
        for other in sample.differentiable():
            arguments[other].requires_grad_(other == wanted)
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sample(**arguments)
        for name in unread:
            pointers = {tensor.data_ptr() for tensor in saved}
            assert arguments[name].data_ptr() not in pointers, f"{name} kept for {wanted}"


def test_another_op_may_run_where_a_gradient_is_recorded():
    """fused_experts_forward runs in place of fused_experts. Without a gradient it does not."""
    sample = every_argument("fused_experts")
    with MoeOps() as without:
        expected = sample()
    assert without.counts == {"fused_experts": 1}
    with MoeOps() as counted:
        output = sample(**sample.requiring_grad())
    assert counted.counts == {"fused_experts_forward": 1}
    assert torch.equal(output, expected)
    with MoeOps() as counted:
        output.sum().backward()
    assert counted.names == ["fused_experts_down_backward", "fused_experts_up_backward"]


def test_an_op_that_runs_in_place_of_another_says_so_and_takes_its_arguments():
    found = {}
    for op in OPS.values():
        if op._autograd is not None and op._autograd.forward is not op:
            found[op._autograd.forward.name] = op.name
            theirs, own = (o.schema.schema.partition(" -> ")[0] for o in (op, op._autograd.forward))
            assert own == theirs
    assert found == {name: s.runs_for for name, s in SCHEMAS.items() if s.runs_for}
    assert found == {
        "fused_experts_forward": "fused_experts",
        "fused_experts_lora_forward": "fused_experts_lora",
        "fused_experts_lora_quantized_forward": "fused_experts_lora_quantized",
        "fused_experts_quantized_forward": "fused_experts_quantized",
    }


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_visits_autograd_for_a_second_derivative_alone(create_graph):
    overload, visits = torch.ops.moe.grouped_gemm_dx.default, []

    def noted(keyset, *args):
        visits.append(args)
        return overload.redispatch(keyset & AFTER_AUTOGRAD, *args)

    sample = every_argument("grouped_gemm")
    arguments = sample.requiring_grad()
    over = torch.library.Library("moe", "IMPL")
    over.impl("grouped_gemm_dx", noted, "AutogradCPU", with_keyset=True)
    try:
        output = sample(**arguments)
        torch.autograd.grad(output.sum(), arguments["input"], create_graph=create_graph)
    finally:
        over._destroy()
    assert len(visits) == create_graph


def test_a_tangent_of_an_output_is_refused():
    sample = every_argument("fused_experts")
    arguments = sample.requiring_grad()
    output = sample(**arguments)
    with forward_ad.dual_level():
        gradient = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
        with pytest.raises(NotImplementedError, match="fused_experts_down_backward: forward-mode"):
            torch.autograd.grad(output, arguments["hidden_states"], gradient)


# The forwards that run in place of an op where a gradient is recorded.
FORWARDS = sorted(name for name, op in OPS.items() if op._outer_autograd is not None)


def looks(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return value


def samples_with_other_needs(forward: str) -> Iterator[Sample]:
    """Yield calls of the op that the forward stands for; each needs other gradients."""
    recorded = OPS[forward]._outer_autograd
    (called,) = (name for name, op in OPS.items() if op._autograd is recorded)
    for seed in range(12):
        sample = seeded_sample(SCHEMAS[called], seed, T=5, dtype=torch.float32)
        for i, argument in enumerate(sample.differentiable()):
            value = sample.arguments[argument].detach()
            sample.arguments[argument] = value.requires_grad_((seed + i) % 3 > 0)
        yield sample


@contextlib.contextmanager
def formula_calls() -> Iterator[list[tuple[str, list[object]]]]:
    """Yield the calls of ops in gradients' formulas: their names, and what their arguments look like."""
    found: list[tuple[str, list[object]]] = []
    own = Op.in_backward

    def noted(op, *args):
        found.append((op.name, [looks(value) for value in args]))
        return own(op, *args)

    with mock.patch.object(Op, "in_backward", noted):
        yield found


def rehearse(name: str, args: tuple[Any, ...], forward: Callable[..., Any] | None = None) -> None:
    """Go through a forward and its backward, as a forward's first call on a GPU does."""
    recorded = OPS[name]._outer_autograd
    assert recorded is not None
    needs = [isinstance(a, Tensor) and a.requires_grad for a in args]
    with torch.no_grad(), mock.patch.object(library._thread, "needs", needs):
        recorded.go_through_backward(args, forward or OPS[name].overload)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_rehearsal_makes_the_calls_of_a_backward(name):
    """It compiles the kernels of a backward, so it has to ask for the same gradients."""
    lengths = set()
    for sample in samples_with_other_needs(name):
        output = sample()
        with formula_calls() as real:
            if output.requires_grad:
                output.backward(torch.ones_like(output))
        with formula_calls() as rehearsed:
            if output.requires_grad:
                rehearse(name, tuple(sample.arguments.values()))
        assert rehearsed == real, sample
        lengths.add(len(real))
    assert lengths - {0}


def test_a_rehearsal_calls_our_own_implementations_alone():
    """What somebody registered over a backward gets no values that mean nothing."""
    calls: list[str] = []

    def foreign(*args):
        calls.append("foreign")
        raise AssertionError

    sample = every_argument("fused_experts", recompute="none")
    foreign_library = torch.library.Library("moe", "IMPL")
    foreign_library.impl("fused_experts_down_backward", foreign, "CPU", allow_override=True)
    try:
        with formula_calls() as found:
            rehearse("fused_experts_forward", tuple(sample.requiring_grad().values()))
    finally:
        foreign_library._destroy()
    assert len(found) == 2
    assert not calls


def test_a_rehearsal_frees_the_pre_activation_between_the_two_ops():
    sample = every_argument("fused_experts", recompute="none", weights_before=False)
    args = tuple(sample.requiring_grad().values())
    freed: list[tuple[str, bool]] = []
    own = Op.in_backward

    def noted(op, *given):
        freed.append((op.name, kept[0]() is None))
        return own(op, *given)

    kept: list[weakref.ref[Tensor]] = []

    def forward(*given):
        outputs = OPS["fused_experts_forward"].overload(*given)
        kept.append(weakref.ref(outputs[1]))
        return outputs

    with mock.patch.object(Op, "in_backward", noted):
        rehearse("fused_experts_forward", args, forward)
    assert freed == [("fused_experts_down_backward", False), ("fused_experts_up_backward", True)]


def test_a_call_that_autograd_does_not_record_rehearses_nothing():
    recorded = OPS["fused_experts_forward"]._outer_autograd
    assert recorded is not None
    sample = every_argument("fused_experts")
    args = tuple(sample.requiring_grad().values())
    with torch.no_grad(), formula_calls() as found:
        recorded.go_through_backward(args, OPS["fused_experts_forward"].overload)
    assert found == []
    needs: list[object] = []

    def noted(*args):
        needs.append(library._thread.needs)
        return own(*args)

    # Inside a forward that is recorded, the needs are autograd's own, and gone after it.
    own = OPS["fused_experts_forward"].device_kernels["CPU"]
    over = torch.library.Library("moe", "IMPL")
    over.impl("fused_experts_forward", noted, "CPU", allow_override=True)
    try:
        sample(**{**sample.requiring_grad(), "down_proj": sample.arguments["down_proj"]})
    finally:
        over._destroy()
    (found_needs,) = needs
    assert isinstance(found_needs, tuple)
    assert found_needs[:5] == (True, True, False, False, True)
    assert library._thread.needs is None


def test_integer_outputs_have_no_gradient():
    logits = torch.randn(5, 4, requires_grad=True)
    topk_weights, topk_ids = moe.topk_routing(logits, 2)
    assert topk_weights.requires_grad
    assert not topk_ids.requires_grad


WITHOUT_GRADIENT = [(name, a) for name, s in SCHEMAS.items() for a in s.without_gradient]


def test_the_arguments_without_a_gradient():
    """A differentiable op refuses that they require grad, or it ignores it."""
    found = {(name, a.name): a.ignores_grad for name, a in WITHOUT_GRADIENT}
    frozen = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    assert found == {
        **{("fused_experts_lora", name): False for name in frozen},
        **{("fused_experts_lora_quantized", name): False for name in frozen[2:]},
        ("topk_routing", "selection_bias"): True,
    }


@pytest.mark.parametrize(
    ("name", "argument"), WITHOUT_GRADIENT, ids=[f"{name}-{a.name}" for name, a in WITHOUT_GRADIENT]
)
def test_an_argument_without_a_gradient_is_refused_or_ignored(name, argument):
    """First it alone requires grad, then the others do too."""
    sample = every_argument(name)
    value = sample.arguments[argument.name].detach().requires_grad_()
    for others in (sample.arguments, sample.requiring_grad()):
        arguments = {**others, argument.name: value}
        if argument.ignores_grad:
            output = floating(sample(**arguments))
            output.sum().backward()
            assert value.grad is None
            assert all(arguments[n].grad is not None for n in sample.differentiable()) == (
                others is not sample.arguments
            )
            continue
        text = (
            f"moe::{name}: expected {argument.name}.requires_grad == False ({argument.name} has no "
            f"gradient), got True; call {argument.name}.requires_grad_(False) or pass "
            f"{argument.name}.detach()"
        )
        assert checks.assert_rejects(ValueError, (text,), sample.overload, arguments) == text
        compiled = torch.compile(lambda a=arguments: sample(**a), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=re.escape(text)):
            compiled()
        with torch.no_grad():
            assert torch.equal(sample(**arguments), sample())


def test_unused_output_gives_no_gradient():
    logits = torch.randn(5, 4, requires_grad=True)
    topk_weights, _ = moe.topk_routing(logits, 2)
    (grad,) = torch.autograd.grad((topk_weights * 0).sum(), logits)
    assert torch.equal(grad, torch.zeros_like(logits))


def test_trailing_defaults_left_out():
    """The dispatcher drops them. Every gradient arrives all the same, by keyword too."""
    sample = every_argument("grouped_gemm")
    rows, weight, counts = (sample.arguments[n] for n in ("input", "weight", "token_counts"))
    rows = torch.randn(int(counts.sum()), weight.shape[2], dtype=torch.float64)
    short = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    full = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    named = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    moe.grouped_gemm(*short, counts).sum().backward()
    moe.grouped_gemm(*full, counts, None, None, None, 1, False, False, None).sum().backward()
    moe.grouped_gemm(token_counts=counts, weight=named[1], input=named[0]).sum().backward()
    for one, two, three in zip(short, full, named, strict=True):
        assert torch.equal(one.grad, two.grad)
        assert torch.equal(one.grad, three.grad)


@blocks
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(name, context):
    hidden, weights = make_tokens(6), make_weights()
    expected = BLOCKS[name](hidden, weights)
    with context():
        output = BLOCKS[name](hidden, weights)
    assert not output.requires_grad
    assert torch.equal(output, expected)
    if context is torch.inference_mode:
        assert output.is_inference()


@differentiable_schemas
def test_functional_gradients_are_right_or_refused(name):
    """torch.func must never give silently wrong numbers."""
    sample = every_argument(name)
    differentiable = sample.differentiable()[0]
    value = sample.arguments[differentiable]
    leaf = value.detach().requires_grad_()
    (expected,) = torch.autograd.grad(floating(sample(**{differentiable: leaf})).sum(), leaf)
    try:
        got = torch.func.grad(lambda x: floating(sample(**{differentiable: x})).sum())(value)
    except (RuntimeError, NotImplementedError):
        return
    checks.assert_close(got, expected)


@blocks
def test_compiled_autograd_equals_eager(name):
    hidden, weights = make_tokens(6), make_weights()
    expected = loss_and_gradients(BLOCKS[name], hidden, weights)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):
        output = torch.compile(BLOCKS[name], backend="aot_eager")(hidden, weights)
        tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
        torch.compile(lambda: output.backward(tangent), backend="aot_eager")()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    got: list[Any] = [output, hidden.grad, *(w.grad for w in weights.tensors())]
    for position, (actual, want) in enumerate(zip(got, expected, strict=True)):
        checks.assert_close(actual, want, what=f"output or gradient {position}")
