# SPDX-License-Identifier: Apache-2.0
"""Builds tiny models with PEFT's LoRA adapters, and records what runs in a step of them."""

import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ops.integrations import peft as moe_ops_peft
from testing.tiny_models import make_model
from testing.tolerances import MODULE_NORM, relative_error

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model.model.layers.0.mlp.experts"


def config(targets=BOTH, **options):
    # Adapters whose lora_B is not zero: their gradients are then both worth a comparison.
    options = {"r": 8, "lora_alpha": 16, "init_lora_weights": False, **options}
    return peft.LoraConfig(target_parameters=list(targets), **options)


def wrapped_model(name="qwen3_moe", dtype=torch.float32, **options):
    model = make_model(name, dtype)
    model.set_experts_implementation("moe_ops")
    return peft.get_peft_model(model, config(**options))


def split_model(*args, **options):
    model = wrapped_model(*args, **options)
    assert moe_ops_peft.enable(model) == [PREFIX]
    return model


def assert_same_step(actual, expected, dtype=torch.float32):
    (output, gradients), (expected_output, expected_gradients) = actual, expected
    assert relative_error(output, expected_output) <= MODULE_NORM[dtype]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            assert gradient.norm() > 0, name
            error = relative_error(gradients[name], gradient)
            assert error <= MODULE_NORM[dtype], f"{name}: {error:.2e}"


class MoeCalls(TorchDispatchMode):
    """Records the moe ops that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "moe":
            self.calls.append((func._schema.name.removeprefix("moe::"), args))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out

    def names(self):
        return [name for name, _ in self.calls]

    def is_split(self):
        """Return whether adapters are computed beside a base: by their own op, or by thin GEMMs."""
        by_op = any(name.startswith("fused_experts_lora") for name in self.names())
        gemms = [args for name, args in self.calls if name == "grouped_gemm"]
        # The rank of config().
        return by_op or any(args[1].shape[1] == 8 for args in gemms)
