# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one error text in every mode. It names op, argument, expectation and value."""

import itertools
import re
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops._core.library import OPS, SCHEMAS
from testing import checks
from testing.strategies import PRESENT, Sample, samples, seeded_sample

F32, F64, BF16, I32 = torch.float32, torch.float64, torch.bfloat16, torch.int32
FP8 = torch.float8_e4m3fn


def valid(name: str) -> dict[str, Any]:
    """Return a valid call with T = 6, K = 2, E = 4, D = 8, N = 10, H = 8 and I = 5."""
    token_counts = torch.tensor([5, 0, 4, 3], dtype=I32)
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int()
    calls: dict[str, dict[str, Any]] = {
        "topk_routing": {"logits": torch.randn(6, 4), "top_k": 2},
        "routing_indices": {"topk_ids": torch.zeros(6, 2, dtype=I32), "num_experts": 4},
        "permute": {"input": torch.randn(6, 8), "gather_indices": permutation, "top_k": 2},
        "unpermute": {
            "input": torch.randn(12, 8),
            "gather_indices": permutation,
            "topk_weights": torch.randn(6, 2),
            "top_k": 2,
        },
        "grouped_gemm": {
            "input": torch.randn(12, 8),
            "weight": torch.randn(4, 10, 8),
            "token_counts": token_counts,
            "gather_indices": permutation,
            "topk_weights": torch.randn(6, 2),
            "bias": torch.randn(4, 10),
            "top_k": 2,
        },
        "fused_experts": {
            "hidden_states": torch.randn(6, 8),
            "gate_up_proj": torch.randn(4, 10, 8),
            "down_proj": torch.randn(4, 8, 5),
            "topk_ids": torch.zeros(6, 2, dtype=I32),
            "topk_weights": torch.randn(6, 2),
            "gate_up_bias": torch.randn(4, 10),
            "down_bias": torch.randn(4, 8),
        },
    }
    return calls[name]


# (op, what replaces a valid argument, error, text after "moe::<op>: expected ")
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    # rank
    ("topk_routing", {"logits": torch.randn(4)}, ValueError,
     "logits.dim() == 2 (num_tokens, experts_per_group * num_groups), got 1 (4,)"),
    ("routing_indices", {"topk_ids": torch.zeros(12, dtype=I32)}, ValueError,
     "topk_ids.dim() == 2 (num_tokens, top_k), got 1 (12,)"),
    ("permute", {"input": torch.randn(1, 6, 8)}, ValueError,
     "input.dim() == 2 (num_tokens, hidden_size), got 3 (1, 6, 8)"),
    ("permute", {"gather_indices": torch.zeros(6, 2, dtype=I32)}, ValueError,
     "gather_indices.dim() == 1 (num_tokens * top_k), got 2 (6, 2)"),
    ("grouped_gemm", {"weight": torch.randn(40, 8)}, ValueError,
     "weight.dim() == 3 (num_experts, out_features, in_features), got 2 (40, 8)"),
    ("grouped_gemm", {"bias": torch.randn(10)}, ValueError,
     "bias.dim() == 2 (num_experts, out_features), got 1 (10,)"),
    # sizes
    ("grouped_gemm", {"weight": torch.randn(4, 10, 7)}, ValueError,
     "weight.shape[2] == input.shape[1] (8), got 7"),
    ("grouped_gemm", {"token_counts": torch.zeros(3, dtype=I32)}, ValueError,
     "token_counts.shape[0] == weight.shape[0] (4), got 3"),
    ("grouped_gemm", {"bias": torch.randn(4, 9)}, ValueError,
     "bias.shape[1] == weight.shape[1] (10), got 9"),
    ("grouped_gemm", {"topk_weights": torch.randn(4, 3)}, ValueError,
     "topk_weights.shape[1] == top_k (2), got 3"),
    ("grouped_gemm", {"topk_weights": torch.randn(5, 2)}, ValueError,
     "topk_weights.shape[0] == "),
    ("grouped_gemm", {"gather_indices": torch.zeros(11, dtype=I32)}, ValueError,
     "gather_indices.shape[0] == num_tokens * top_k (12), got 11"),
    ("permute", {"gather_indices": torch.zeros(13, dtype=I32)}, ValueError,
     "gather_indices.shape[0] == num_tokens * top_k (12), got 13"),
    ("permute", {"scatter_indices": torch.zeros(6, dtype=I32)}, ValueError,
     "scatter_indices.shape[0] == num_tokens * top_k (12), got 6"),
    ("topk_routing", {"selection_bias": torch.randn(3)}, ValueError,
     "selection_bias.shape[0] == logits.shape[1] (4), got 3"),
    # sizes that are no multiple of what divides them
    ("grouped_gemm", {"input": torch.randn(13, 8)}, ValueError,
     "input.shape[0] to be a multiple of top_k (2), got 13"),
    ("unpermute", {"input": torch.randn(13, 8)}, ValueError,
     "input.shape[0] to be a multiple of top_k (2), got 13"),
    ("topk_routing", {"num_groups": 3}, ValueError,
     "logits.shape[1] to be a multiple of num_groups (3), got 4"),
    ("fused_experts", {"gate_up_proj": torch.randn(4, 9, 8)}, ValueError,
     "gate_up_proj.shape[1] to be a multiple of 2, got 9"),
    ("fused_experts", {"gated": False}, ValueError,
     "down_proj.shape[2] == intermediate_size (10), got 5"),
    ("fused_experts", {"down_proj": torch.randn(4, 7, 5)}, ValueError,
     "down_proj.shape[1] == hidden_states.shape[1] (8), got 7"),
    ("fused_experts", {"gate_up_bias": torch.randn(4, 5)}, ValueError,
     "gate_up_bias.shape[1] == gate_up_proj.shape[1] (10), got 5"),
    ("fused_experts", {"topk_weights": torch.randn(6, 3)}, ValueError,
     "topk_weights.shape[1] == topk_ids.shape[1] (2), got 3"),
    ("fused_experts", {"topk_ids": torch.zeros(6, 0, dtype=I32), "topk_weights": torch.randn(6, 0)},
     ValueError, ("num_experts >= 1 and top_k >= 1 (each token has a slot, and each slot an expert "
                  "to go to), got num_experts=4, top_k=0")),
    # dtypes
    ("fused_experts", {"down_bias": torch.randn(4, 8, dtype=BF16)}, TypeError,
     "down_bias.dtype == hidden_states.dtype (float32), got bfloat16"),
    ("grouped_gemm", {"weight": torch.randn(4, 10, 8, dtype=BF16)}, TypeError,
     "weight.dtype == input.dtype (float32), got bfloat16"),
    ("grouped_gemm", {"token_counts": torch.zeros(4)}, TypeError,
     "token_counts.dtype in (int32, int64), got float32"),
    ("grouped_gemm", {"topk_weights": torch.zeros(6, 2, dtype=I32)}, TypeError,
     "topk_weights.dtype in (bfloat16, float16, float32, float64), got int32"),
    ("permute", {"input": torch.zeros(6, 8, dtype=I32)}, TypeError,
     "input.dtype in (bfloat16, float16, float32, float64), got int32"),
    ("routing_indices", {"topk_ids": torch.zeros(6, 2)}, TypeError,
     "topk_ids.dtype in (int32, int64), got float32"),
    ("routing_indices", {"topk_ids": torch.zeros(6, 2, dtype=torch.int16)}, TypeError,
     "topk_ids.dtype in (int32, int64), got int16"),
    # quantised weights: the text says what to do
    ("grouped_gemm", {"weight": torch.randn(4, 10, 8).to(FP8)}, TypeError,
     ("weight.dtype == input.dtype (float32), got float8_e4m3fn; "
      "moe_ops.QuantizedWeight.from_fp8_block takes it, with its scales")),
    ("grouped_gemm", {"weight": torch.zeros(4, 10, 4, dtype=torch.uint8)}, TypeError,
     ("weight.dtype == input.dtype (float32), got uint8; dequantise it to the dtype of input, or "
      "make a moe_ops.QuantizedWeight of it")),
    ("fused_experts", {"gate_up_proj": torch.randn(4, 10, 8).to(FP8)}, TypeError,
     ("gate_up_proj.dtype == hidden_states.dtype (float32), got float8_e4m3fn; "
      "moe_ops.QuantizedWeight.from_fp8_block takes it, with its scales")),
    ("fused_experts", {"down_proj": torch.zeros(4, 8, 5, dtype=torch.int8)}, TypeError,
     ("down_proj.dtype == hidden_states.dtype (float32), got int8; dequantise it, or make a "
      "moe_ops.QuantizedWeight of it")),
    # scalars
    ("topk_routing", {"top_k": 0}, ValueError, "top_k >= 1, got 0"),
    ("topk_routing", {"top_k": -1}, ValueError, "top_k >= 1, got -1"),
    ("topk_routing", {"top_k": 5}, ValueError,
     "top_k <= logits.shape[1] (4), got 5"),
    ("topk_routing", {"top_k": 9, "num_groups": 2}, ValueError,
     "top_k <= logits.shape[1] (4), got 9"),
    ("topk_routing", {"top_k": 3, "num_groups": 2}, ValueError,
     ("top_k <= experts_per_group * top_groups (a token chooses from the experts of its top_groups "
      "groups), got top_k=3, top_groups=1, experts_per_group=2")),
    ("topk_routing", {"num_groups": 0}, ValueError, "num_groups >= 1, got 0"),
    ("topk_routing", {"num_groups": 2, "top_groups": 3}, ValueError,
     "top_groups <= num_groups (2), got 3"),
    ("routing_indices", {"num_experts": 0}, ValueError, "num_experts >= 1, got 0"),
    ("permute", {"top_k": 0}, ValueError, "top_k >= 1, got 0"),
    ("unpermute", {"top_k": 0}, ValueError, "top_k >= 1, got 0"),
    ("grouped_gemm", {"top_k": 0}, ValueError, "top_k >= 1, got 0"),
    # strings
    ("topk_routing", {"score_function": "relu"}, ValueError,
     "score_function in ('softmax', 'sigmoid'), got 'relu'"),
    ("topk_routing", {"group_score": "sum"}, ValueError,
     "group_score in ('top2_sum', 'max'), got 'sum'"),
    ("fused_experts", {"activation": "swish"}, ValueError,
     ("activation in ('silu', 'gelu', 'gelu_tanh', 'relu', 'relu_squared', 'swiglu_oai'), "
      "got 'swish'")),
    ("fused_experts", {"recompute": "all"}, ValueError,
     "recompute in ('none', 'pre_activation'), got 'all'"),
    ("fused_experts", {"activation_limit": 0.0}, ValueError,
     ("activation_limit is None or activation_limit > 0 (a limit is a positive number), "
      "got activation_limit=0.0")),
    ("fused_experts", {"activation_limit": float("nan")}, ValueError,
     "activation_limit is None or activation_limit > 0"),
    # flags
    ("fused_experts",
     {"activation": "swiglu_oai", "gated": False, "gate_up_proj": torch.randn(4, 5, 8),
      "gate_up_bias": None},
     ValueError, ("gated or activation != 'swiglu_oai' (swiglu_oai multiplies by up), "
                  "got activation=swiglu_oai, gated=False")),
    ("grouped_gemm", {"permute_x": True, "permute_y": True, "input": torch.randn(6, 8)}, ValueError,
     ("not (permute_x and permute_y) (a GEMM gathers its input or scatters its output, never both), "
      "got permute_x=True, permute_y=True")),
    ("grouped_gemm", {"permute_y": True, "gather_indices": None}, ValueError,
     ("gather_indices is not None or not (permute_x or permute_y) "
      "(a permutation needs gather_indices), got gather_indices=None, permute_x=False, "
      "permute_y=True")),
    ("grouped_gemm", {"permute_x": True, "gather_indices": None, "input": torch.randn(6, 8)},
     ValueError, "gather_indices is not None or not (permute_x or permute_y)"),
]  # fmt: skip
bad = pytest.mark.parametrize(
    ("name", "replaced", "error", "text"),
    BAD,
    ids=[f"{name}-{'-'.join(replaced)}-{i}" for i, (name, replaced, *_) in enumerate(BAD)],
)


@bad
def test_rejects(name, replaced, error, text):
    arguments = {**valid(name), **replaced}
    op = getattr(torch.ops.moe, name)
    got = checks.assert_rejects(error, (f"moe::{name}: expected {text}",), op, arguments)
    assert ", got " in got

    positional = positional_arguments(name, arguments)
    with pytest.raises(error) as by_position:
        op(*positional)
    assert str(by_position.value) == got
    with pytest.raises(error) as by_function:
        getattr(moe_ops, name)(*positional)
    assert str(by_function.value) == got


def positional_arguments(name: str, arguments: dict[str, Any]) -> list[Any]:
    return [arguments.get(a.name, a.default) for a in SCHEMAS[name].arguments]


@bad
def test_rejects_under_compile(name, replaced, error, text):
    arguments = {**valid(name), **replaced}
    op = getattr(torch.ops.moe, name)
    compiled = torch.compile(lambda kwargs: op(**kwargs), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="moe::") as caught:
        compiled(arguments)
    assert f"moe::{name}: expected {text}" in str(caught.value)


@bad
def test_rejects_the_same_where_a_gradient_is_recorded(name, replaced, error, text):
    """The text names fused_experts, though fused_experts_forward then runs in its place."""
    arguments = {
        key: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in {**valid(name), **replaced}.items()
    }
    op = getattr(torch.ops.moe, name)
    checks.assert_rejects(error, (f"moe::{name}: expected {text}",), op, arguments)


def test_rejects_with_grad_and_under_autocast():
    arguments = valid("grouped_gemm")
    arguments["weight"] = torch.randn(4, 10, 7, requires_grad=True)
    text = r"moe::grouped_gemm: expected weight.shape\[2\] == input.shape\[1\] \(8\), got 7"
    with pytest.raises(ValueError, match=text):
        torch.ops.moe.grouped_gemm(**arguments)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=text):
        torch.ops.moe.grouped_gemm(**arguments)


def test_rejects_a_list_of_too_few_flags():
    """For a bool[N] the dispatcher takes a list of any length."""
    sample = seeded_sample(SCHEMAS["fused_experts_down_backward"], 0, T=3)
    checks.assert_rejects(
        ValueError, ("moe::fused_experts_down_backward: expected len(needs) == 4, got 2",),
        sample.overload, {**sample.arguments, "needs": [True, True]},
    )  # fmt: skip


# Of each backward op of fused_experts: what is missing, the outputs that are then refused, and why.
MISSING = [
    (
        "down",
        {"hidden_states": None, "pre_activation": None, "weights_before": False},
        [0, 1, 2],
        "hidden_states is not None or pre_activation is not None or (not (needs[0] or",
    ),
    ("down", {"weights_before": True}, [2], "not (weights_before and needs[2])"),
    ("up", {"hidden_states": None}, [1, 2], "hidden_states is not None or not (needs[1] or"),
    ("up", {"topk_weights": None}, [2], "topk_weights is not None or not needs[2]"),
]


@pytest.mark.parametrize(("projection", "missing", "refused", "text"), MISSING, ids=str)
def test_rejects_gradients_without_what_they_are_taken_from(projection, missing, refused, text):
    name = f"fused_experts_{projection}_backward"
    schema = SCHEMAS[name]
    given = {a.name: PRESENT for a in schema.tensors if a.is_optional}
    sample = seeded_sample(schema, 0, T=3, **given)
    arguments = {**sample.arguments, **missing}
    for needed in range(4):
        arguments["needs"] = [i == needed for i in range(4)]
        if needed in refused:
            expected = f"moe::{name}: expected {text}"
            checks.assert_rejects(ValueError, (expected,), sample.overload, arguments)
        else:
            sample.overload(**arguments)


REQUIRED = [
    (name, argument.name)
    for name, schema in SCHEMAS.items()
    for argument in schema.tensors
    if not argument.is_optional
    and any(other is not argument and not other.is_optional for other in schema.tensors)
]


@pytest.mark.parametrize(("name", "argument"), REQUIRED)
def test_rejects_none_for_a_tensor(name, argument):
    """Another tensor must be given, or torch finds no kernel to call."""
    sample = seeded_sample(SCHEMAS[name], 0)
    text = f"moe::{SCHEMAS[name].called}: expected {argument} to be a tensor, got None"
    with pytest.raises(TypeError, match=re.escape(text)):
        sample(**{argument: None})


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["topk_routing", "permute", "grouped_gemm", "fused_experts"])
def test_rejects_sparse_tensors(name, grad):
    arguments = valid(name)
    matrices = {
        key: value
        for key, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    }
    assert matrices
    for key, value in matrices.items():
        given = {**arguments, key: value.to_sparse().requires_grad_(grad)}
        with pytest.raises(TypeError) as caught:
            getattr(moe_ops, name)(**given)
        assert str(caught.value) == (
            f"moe::{name}: expected {key} to be a dense tensor, got layout torch.sparse_coo"
        )


def test_rejects_mixed_devices():
    arguments = valid("grouped_gemm")
    arguments["weight"] = arguments["weight"].to("meta")
    text = r"^moe::grouped_gemm: expected weight.device == input.device \(cpu\), got meta$"
    with pytest.raises(ValueError, match=text):
        torch.ops.moe.grouped_gemm(**arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_kernel_of_the_cpu_never_gets_a_tensor_of_another_device(name, grad):
    """If one argument is on another device, the dispatcher calls that device's kernel."""
    sample = seeded_sample(SCHEMAS[name], 0)
    first = sample.schema.tensors[0].name
    given = [a.name for a in sample.schema.tensors if sample.arguments[a.name] is not None]
    op, device = f"moe::{SCHEMAS[name].called}", "(cpu|meta)"
    text = rf"^{op}: expected \w+\.device == {first}\.device \({device}\), got {device}$"
    for argument, others in itertools.product(given if len(given) > 1 else (), (False, True)):
        moved = {
            key: value.to("meta").requires_grad_(grad and value.is_floating_point())
            for key, value in sample.arguments.items()
            if key in given and (key != argument) == others
        }
        with pytest.raises(ValueError, match=text):
            sample(**moved)


def test_the_kernel_of_cuda_compares_devices():
    kernel = OPS["permute"].device_kernels["CUDA"]
    rows, indices = torch.randn(6, 8), torch.empty(12, dtype=I32, device="meta")
    text = r"^moe::permute: expected gather_indices.device == input.device \(cpu\), got meta$"
    with pytest.raises(ValueError, match=text):
        kernel(rows, indices, 2)


def test_fake_cuda_tensors():
    """Mixed devices and fp64 are refused on a device that this machine lacks."""
    with FakeTensorMode():
        rows = torch.empty(6, 8, device="cuda")
        indices = torch.empty(12, dtype=I32, device="cuda")
        assert torch.ops.moe.permute(rows, indices, 2).device.type == "cuda"
        with pytest.raises(TypeError, match=r"input.dtype in .*float32.* on cuda, got float64"):
            torch.ops.moe.permute(rows.double(), indices, 2)
        with pytest.raises(ValueError, match=r"expected gather_indices.device == input.device"):
            torch.ops.moe.permute(rows, torch.empty(12, dtype=I32), 2)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=30)
def test_rejects_every_wrong_rank_dtype_and_range(name, data):
    """If one argument of a valid call is wrong, the text names it."""
    sample = data.draw(samples(SCHEMAS[name]))
    arguments = dict(sample.arguments)
    given_tensors = [a for a in sample.schema.tensors if arguments[a.name] is not None]
    bounded = [a for a in sample.schema.scalars if a.minimum or a.maximum or a.choices or a.format]
    wrong = data.draw(st.sampled_from([*given_tensors, *bounded]), "wrong argument")
    value = arguments[wrong.name]
    error: type[Exception] = ValueError
    if wrong.is_tensor:
        how = data.draw(st.sampled_from(["more dimensions", "fewer dimensions", "dtype"]), "how")
        if how == "more dimensions":
            arguments[wrong.name] = value.unsqueeze(0)
        elif how == "fewer dimensions":
            arguments[wrong.name] = value.new_zeros(value.shape[1:])
        else:
            arguments[wrong.name] = value.bool()
            error = TypeError
    elif wrong.type == "ScalarType":
        arguments[wrong.name] = torch.int8
        error = TypeError
    elif wrong.choices:
        arguments[wrong.name] = 1 if wrong.type == "SymInt" else "no such choice"
    elif wrong.format:
        arguments[wrong.name] = data.draw(st.sampled_from(["", "{", "[]", '{"forward": {"a": 1}}']))
    else:
        beyond = [-1] if wrong.minimum else []
        beyond += [0] if wrong.minimum and wrong.minimum.text != "0" else []
        arguments[wrong.name] = data.draw(st.sampled_from([*beyond, *[99] * bool(wrong.maximum)]))
    start = f"moe::{sample.schema.called}: expected "
    text = checks.assert_rejects(error, (start,), sample.overload, arguments)
    # For a wrong num_groups the text says that logits.shape[1] is no multiple of it.
    assert wrong.name in text


def sizes_agree(sample: Sample, arguments: dict[str, Any]) -> bool:
    """Try all sizes for the dimension letters, and return whether some fit every shape and rule."""
    schema = sample.schema
    scalars = {a.name: arguments[a.name] for a in schema.arguments}
    found = {size for a in schema.tensors if a.name and arguments[a.name] is not None
             for size in arguments[a.name].shape}  # fmt: skip
    divisors = {scalars[a.name] for a in schema.scalars if a.type == "SymInt"}
    divided = {size // divisor for size in found for divisor in divisors if divisor}
    candidates = sorted(found | divided)
    equations = [
        (expr, size)
        for a in schema.tensors
        if arguments[a.name] is not None
        for expr, size in zip(a.shape, arguments[a.name].shape, strict=True)
    ]
    names = fitting_sizes(list(schema.dims), candidates, equations, scalars)
    if names is None:
        return False
    bounds = [(a.name, a.minimum, a.maximum) for a in schema.scalars]
    return all(rule.expect.evaluate(names) for rule in schema.where) and all(
        (low is None or scalars[name] >= low.evaluate(names))
        and (high is None or scalars[name] <= high.evaluate(names))
        for name, low, high in bounds
    )


def fitting_sizes(
    letters: list[str],
    candidates: list[int],
    equations: list[tuple[Any, int]],
    names: dict[str, Any],
) -> dict[str, Any] | None:
    """Return names with the first size of each letter that fits all equations, None if none fit.

    An equation is tried as soon as its letters have sizes: ops with seven letters have millions of
    combinations.
    """
    later = [(expr, size) for expr, size in equations if not expr.names.isdisjoint(letters)]
    if any(expr.evaluate(names) != size for expr, size in equations if (expr, size) not in later):
        return None
    if not letters:
        return names
    for value in candidates:
        found = fitting_sizes(letters[1:], candidates, later, {**names, letters[0]: value})
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("name", sorted(SCHEMAS))
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=50)
def test_rejects_exactly_the_sizes_that_disagree(name, data):
    """One axis of a valid call is resized. It is refused if and only if no sizes fit all shapes."""
    sample = data.draw(samples(SCHEMAS[name]))
    arguments = dict(sample.arguments)
    given_tensors = [a.name for a in sample.schema.tensors if arguments[a.name] is not None]
    resized = data.draw(st.sampled_from(given_tensors), "resized")
    shape = list(arguments[resized].shape)
    axis = data.draw(st.sampled_from(range(len(shape))), "axis")
    shape[axis] = max(0, shape[axis] + data.draw(st.sampled_from([-1, 1, 2]), "by"))
    arguments[resized] = arguments[resized].new_zeros(shape)
    if sizes_agree(sample, arguments):
        on_meta = {
            key: value.to("meta") if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        sample.overload(**on_meta)
    else:
        start = f"moe::{sample.schema.called}: expected "
        checks.assert_rejects(ValueError, (start, ", got "), sample.overload, arguments)


def test_no_check_reads_device_values():
    """Ids out of range are dropped by definition, and corrupt indices are not errors."""
    arguments = seeded_sample(SCHEMAS["grouped_gemm"], 0, T=3).arguments
    arguments["token_counts"] = torch.full_like(arguments["token_counts"], 1000)
    torch.ops.moe.grouped_gemm(**arguments)
