# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile(fullgraph=True) a quantised weight is constants and graph inputs."""

import pytest
import torch
from torch import nn

from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS

SHAPE = (2, 5, 70)


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


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dequantizes_bit_for_bit_when_compiled(format, backend):
    """Inductor's own kernel of a traced decoder gave wrong values of nf4 on a CPU."""
    for shape in (SHAPE, (3, 8, 256)):
        weight = quantize_weight(torch.randn(shape), format)
        compiled = torch.compile(weight.dequantize, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(), weight.dequantize(), rtol=0, atol=0)
        doubled = torch.compile(lambda w=weight: w.dequantize() * 2 + 1, backend=backend)
        torch.testing.assert_close(doubled(), weight.dequantize() * 2 + 1, rtol=0, atol=0)
