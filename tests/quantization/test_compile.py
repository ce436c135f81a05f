# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile(fullgraph=True) a quantised weight is constants and graph inputs."""

import pytest
import torch
from torch import nn

import moe_ops
from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS
from testing import checks
from testing.moe_block import compiled_graphs
from testing.quantized_problem import HIDDEN, NUM_EXPERTS, TOP_K
from testing.quantized_problem import Layer as ExpertsLayer

SHAPE = (2, 5, 70)

# The graph of every format is traced and differentiated. To Inductor the ops in it are opaque, and
# one format shows that it compiles them; its C++ costs some 10 s each time.
BACKENDS = [
    *(("aot_eager", format) for format in FORMATS),
    pytest.param("inductor", "nf4", marks=pytest.mark.slow),
]
backends = pytest.mark.parametrize(("backend", "format"), BACKENDS)


class Layer(nn.Module):
    """Reads all that an op would ask for, and dequantises."""

    def __init__(self, format):
        super().__init__()
        self.weight = quantize_weight(torch.randn(SHAPE), format)

    def forward(self, x):
        weight = self.weight
        num_experts, out_features, in_features = weight.shape
        assert weight.ndim == 3
        assert not weight.requires_grad
        assert isinstance(weight, QuantizedWeight)
        sizes = num_experts * out_features + in_features + weight.group_size + weight.nbytes
        if weight.nested_scale is not None:
            sizes += weight.nested_scale.shape[1]
        if weight.format == "nf4" and weight.scale_encoding == "nested":
            sizes += 1
        packed = weight.codes.sum() + weight.scale.sum()
        return x.to(weight.dtype).to(weight.device) * sizes + packed + weight.dequantize().sum()


class Counter:
    """A backend that counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.mark.parametrize("format", FORMATS)
def test_layers_share_one_graph(format):
    backend, x = Counter(), torch.randn(3)
    for _ in range(4):
        layer = Layer(format)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), layer(x))
    assert backend.graphs == 1


def test_another_format_is_another_graph():
    backend, x = Counter(), torch.randn(3)
    for format in FORMATS:
        layer = Layer(format)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), layer(x))
    assert backend.graphs == len(FORMATS)


def test_a_changed_weight_is_seen():
    layer, other = Layer("nf4"), Layer("nf4")
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(3)
    before = compiled(x)
    layer.weight.load_state_dict(other.weight.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
    assert not torch.equal(before, compiled(x))


@backends
def test_dequantizes_bit_for_bit_when_compiled(format, backend):
    """Inductor's own kernel of a traced decoder gave wrong values of nf4 on a CPU."""
    for shape in (SHAPE, (3, 8, 256)):
        weight = quantize_weight(torch.randn(shape), format)
        compiled = torch.compile(weight.dequantize, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(), weight.dequantize(), rtol=0, atol=0)
        doubled = torch.compile(lambda w=weight: w.dequantize() * 2 + 1, backend=backend)
        torch.testing.assert_close(doubled(), weight.dequantize() * 2 + 1, rtol=0, atol=0)


def step(function, num_tokens):
    """Return the output and the gradients of hidden_states and topk_weights."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator).requires_grad_()
    topk_weights = torch.rand(num_tokens, TOP_K, generator=generator).requires_grad_()
    topk_ids = torch.randint(0, NUM_EXPERTS, (num_tokens, TOP_K), generator=generator)
    output = function(hidden_states, topk_ids, topk_weights)
    return output, *torch.autograd.grad(output.square().sum(), (hidden_states, topk_weights))


@backends
def test_layers_of_experts_share_one_graph(format, backend):
    """Forward and backward of four layers, compiled one by one, for several token counts."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for seed in range(4):
        layer = ExpertsLayer(format, seed)
        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
        for num_tokens in (9, 11, 12):
            for got, want in zip(step(compiled, num_tokens), step(layer, num_tokens), strict=True):
                checks.assert_close(got, want)
            graphs.append(counters["unique_graphs"])
    assert len(set(graphs)) == 1


def test_the_backward_reads_the_stored_weights_again():
    """No node of a graph returns a weight: the ops dequantise inside."""
    up, down = (quantize_weight(torch.randn(shape), "nf4") for shape in ((4, 12, 8), (4, 8, 6)))

    def block(hidden, weights):
        topk_weights, topk_ids = moe_ops.topk_routing(hidden @ weights.router.t(), 2)
        # What differentiates the block wants a gradient of each weight.
        others = weights.gate_up_proj.sum() + weights.down_proj.sum()
        return moe_ops.fused_experts(hidden, up, down, topk_ids, topk_weights) + 0 * others

    graphs = compiled_graphs(block)
    called = {
        name: [line.removeprefix("moe.").replace(".default", "") for line in lines]
        for name, lines in graphs.items()
    }
    routing = "int32[4], int32[6], int32[6]"
    assert called["forward"][1:] == [
        f"fused_experts_quantized_forward: float32[3, 8], float32[6, 12], {routing}"
    ]
    assert called["backward"][:-1] == [
        "fused_experts_quantized_down_backward: float32[6, 12], float32[3, 2], float32[0]",
        "fused_experts_quantized_up_backward: float32[3, 8], float32[0], float32[0]",
    ]
