# SPDX-License-Identifier: Apache-2.0
"""fully_shard over a transformers model whose experts run here: one process's gradients, two ranks."""

import logging

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from testing.tiny_models import VOCAB_SIZE, make_model
from testing.tolerances import MODULE_NORM, relative_error

pytestmark = pytest.mark.slow

PEFTS_OWN_PATH = "PEFT's own path"


class Messages(logging.Handler):
    """Collects what the logger "moe_ops" says."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def build(name, lora):
    from moe_ops.integrations import transformers

    transformers.register()
    model = make_model(name)
    model.set_experts_implementation("moe_ops")
    if lora:
        import peft

        from testing.peft_problem import config

        torch.manual_seed(3)
        model = peft.get_peft_model(model, config())
    return model


def layers(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.layers


def shard(model, mesh, **options):
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def step(model, input_ids):
    output = model(input_ids=input_ids, use_cache=False)[0]
    # A mean, since fully_shard takes the mean of the ranks' gradients.
    output.float().square().mean().backward()


def gradients(model):
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same_gradients(model, expected, dtype=torch.float32):
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        error = relative_error(actual[name], gradient)
        assert error <= MODULE_NORM[dtype], f"{name}: relative error {error:.2e}"


def check_gradients(rank, world_size, name, lora, compiled):
    """`lora` is "", "before" or "after": when moe_ops is enabled for PEFT's adapters."""
    mesh = init_device_mesh("cpu", (world_size,))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB_SIZE, (2 * world_size, 12), generator=generator)
    single, model = build(name, lora), build(name, lora)
    messages = Messages()
    logging.getLogger("moe_ops").addHandler(messages)
    if lora:
        from moe_ops.integrations import peft

        peft._log_once.cache_clear()
        peft.enable(single)
    if lora == "before":
        assert len(peft.enable(model)) == 1
    for layer in layers(model):
        if compiled:
            # The graph is what fullgraph is about. Inductor's C++ would cost a minute.
            layer.compile(fullgraph=True, backend="aot_eager")
    shard(model, mesh)
    if lora == "after":
        assert len(peft.enable(model)) == 1
    step(single, input_ids)
    step(model, input_ids.chunk(world_size)[rank])
    assert_same_gradients(model, gradients(single))
    assert not [text for text in messages.texts if PEFTS_OWN_PATH in text], messages.texts


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lora", ["", "before", "after"], ids=["full", "enabled", "enabled late"])
def test_gradients_are_one_process_s(ranks, lora, compiled):
    """Adapters go beside sharded weights as beside whole ones: PEFT's merged path runs nowhere."""
    if lora:
        pytest.importorskip("peft", reason="the peft extra is not installed")
    ranks(2).run(check_gradients, name="qwen3_moe", lora=lora, compiled=compiled)


def test_transposed_experts_with_biases(ranks):
    pytest.importorskip("peft", reason="the peft extra is not installed")
    ranks(2).run(check_gradients, name="gpt_oss", lora="before", compiled=False)


def check_mixed_precision(rank, world_size):
    """Parameters in fp32 compute in bf16: the gradients are those of a bf16 copy, to its rounding."""
    mesh = init_device_mesh("cpu", (world_size,))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB_SIZE, (2 * world_size, 12), generator=generator)
    model = build("qwen3_moe", "")
    experts = layers(model)[0].mlp.experts
    seen = []
    experts.register_forward_pre_hook(lambda module, _: seen.append(module.gate_up_proj.dtype))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh, mp_policy=policy)
    step(model, input_ids.chunk(world_size)[rank])
    assert seen == [torch.bfloat16]
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
        assert gradient.norm() > 0, name


def test_mixed_precision(ranks):
    ranks(2).run(check_mixed_precision)
