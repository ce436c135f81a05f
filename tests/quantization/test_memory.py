# SPDX-License-Identifier: Apache-2.0
"""Of two dequantised weights one is there at a time, and none between forward and backward."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe_ops
from moe_ops._core.library import OPS
from moe_ops.quantization.formats import FORMATS
from testing.quantized_problem import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    Experts,
    make_experts,
    make_weights,
)

SIZES = {
    NUM_EXPERTS * 2 * INTERMEDIATE * HIDDEN: "gate_up_proj",
    NUM_EXPERTS * HIDDEN * INTERMEDIATE: "down_proj",
}
WATCHED = (
    "fused_experts_quantized", "fused_experts_quantized_forward", "grouped_gemm_quantized",
    "fused_experts_quantized_down_backward", "fused_experts_quantized_up_backward",
    "grouped_gemm_quantized_dx",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


class Watch(TorchDispatchMode):
    """Finds what the ops allocate that is as large as a weight.

    Kernels that are registered over the ops' own enter it. A code is a byte, so a stored weight is
    never taken for a dequantised one.

    Attributes:
        events: the weights in the order in which they are made, with the ops between them.
        most: how many were there at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []
        self.events: list[str] = []
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {id(a.untyped_storage()) for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.is_floating_point()
            and result.dim() == 3
            and result.untyped_storage().nbytes() == result.numel() * result.itemsize
            and result.numel() in SIZES
            and id(result.untyped_storage()) not in before
            and not self.knows(result)
        ):
            self.made.append(StorageWeakRef(result.untyped_storage()))
            self.events.append(SIZES[result.numel()])
            self.most = max(self.most, self.alive())
        return result

    def knows(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in [
            storage for storage in self.made if not storage.expired()
        ]

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.made)

    def kernel_of(self, name: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            with self:
                result = OPS[name].device_kernels["CPU"](*args)
            if name != "dequantize_weight":
                self.events.append(name)
            return result

        return kernel


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Watch the ops. The garbage collector does not run: references have to end by themselves."""
    found = Watch()
    with torch.library._scoped_library("moe", "IMPL") as library:
        for name in WATCHED:
            library.impl(name, found.kernel_of(name), "CPU", allow_override=True)
        gc.collect()
        gc.disable()
        try:
            yield found
        finally:
            gc.enable()


FORWARD = ["gate_up_proj", "down_proj", "fused_experts_quantized_forward"]
DOWN_BACKWARD, UP_BACKWARD = (
    f"fused_experts_quantized_{projection}_backward" for projection in ("down", "up")
)
BACKWARD = ["down_proj", DOWN_BACKWARD, "gate_up_proj", UP_BACKWARD]


def plain(experts: Experts) -> Tensor:
    return experts()


def checkpointed(experts: Experts) -> Tensor:
    output: Tensor = checkpoint(lambda *_: experts(), *experts.leaves.values(), use_reentrant=False)
    return output


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("form", [plain, checkpointed])
def test_experts(watch, format, form):
    experts = make_experts(format)
    output = form(experts)
    assert watch.events == FORWARD
    assert watch.alive() == 0
    output.sum().backward()
    assert watch.events == FORWARD + (FORWARD if form is checkpointed else []) + BACKWARD
    assert watch.alive() == 0
    assert watch.most == 1


def test_experts_without_a_gradient(watch):
    with torch.no_grad():
        make_experts("nf4")()
    assert watch.events == ["gate_up_proj", "down_proj", "fused_experts_quantized"]
    assert watch.alive() == 0
    assert watch.most == 1


def test_recomputing_holds_one_at_a_time(watch):
    """The first product of the backward is then the forward's."""
    make_experts("nf4", recompute="pre_activation")().sum().backward()
    assert watch.events == [*FORWARD, "gate_up_proj", *BACKWARD]
    assert watch.alive() == 0
    assert watch.most == 1


def test_gradients_of_biases_dequantise_nothing(watch):
    experts = make_experts("nf4")
    for name in ("hidden_states", "topk_weights", "gate_up_bias"):
        experts.leaves[name].requires_grad_(False)
    experts().sum().backward()
    assert watch.events == [*FORWARD, DOWN_BACKWARD]


def test_nothing_as_large_as_a_weight_is_saved():
    """What is saved are the stored tensors themselves, the routing, and rows."""
    experts = make_experts("nf4")
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts()
    stored = [*experts.gate_up_proj.parameters(), *experts.down_proj.parameters()]
    addresses = {tensor.data_ptr() for tensor in stored}
    assert addresses <= {tensor.data_ptr() for tensor in saved}
    assert not [t for t in saved if t.numel() in SIZES and t.data_ptr() not in addresses]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_frees_them(watch, backend):
    experts = make_experts("nf4")
    torch.compile(plain, fullgraph=True, backend=backend)(experts).sum().backward()
    assert watch.events == FORWARD + BACKWARD
    assert watch.alive() == 0
    assert watch.most == 1


def test_grouped_gemm(watch):
    weight, _ = make_weights("mxfp4")
    input = torch.randn(9, HIDDEN, requires_grad=True)
    output = moe_ops.grouped_gemm(input, weight, torch.tensor([3, 0, 5, 1]))
    assert watch.alive() == 0
    output.sum().backward()
    assert watch.events == [
        "gate_up_proj", "grouped_gemm_quantized", "gate_up_proj", "grouped_gemm_quantized_dx"
    ]  # fmt: skip
    assert watch.alive() == 0
