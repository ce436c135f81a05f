# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer, of parts or as a model of transformers has it."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_ops.layers.configs import BLOCKS, CLASSES, Block
from moe_ops.layers.experts import Experts, GatedMLP
from moe_ops.layers.functional import in_shape_of
from moe_ops.layers.lora import LoraExperts
from moe_ops.layers.router import Router


class MoE(nn.Module):
    """Send each token through the experts that a router chooses, and through a shared one.

        router_logits, topk_weights, topk_ids = router(hidden_states)
        output = experts(hidden_states, topk_ids, topk_weights)
               + sigmoid(shared_expert_gate(hidden_states)) * shared_expert(hidden_states)

    Args:
        router (Router): chooses the experts.
        experts (Experts or LoraExperts): the experts.
        shared_expert (nn.Module or None): what every token goes through besides, such as a
            GatedMLP.
        shared_expert_gate (nn.Module or None): one logit per token, such as
            nn.Linear(hidden_size, 1), whose sigmoid multiplies the shared expert's output
            (Qwen2-MoE). None stands for a factor of one.

    Every part that holds parameters has reset_parameters(), for use after to_empty().

    Raises:
        ValueError: shared_expert_gate without shared_expert; a router of another number of experts
            or another hidden_size than the experts'.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts | LoraExperts,
        shared_expert: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if shared_expert is None and shared_expert_gate is not None:
            raise ValueError(
                "moe_ops.layers.MoE: expected shared_expert with shared_expert_gate, got None; "
                "pass both or neither"
            )
        num_experts, hidden_size, _ = experts.down_proj.shape
        if tuple(router.weight.shape) != (num_experts, hidden_size):
            raise ValueError(
                "moe_ops.layers.MoE: expected router.weight.shape == (num_experts, hidden_size) of "
                f"the experts ({num_experts}, {hidden_size}), got {tuple(router.weight.shape)}"
            )
        self.router = router
        # LoraExperts has the same attributes where they are used here.
        self.experts = cast(Experts, experts)
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        # Set by from_config: the model, and whether its blocks keep the experts' projections
        # transposed.
        self._model_type: str | None = None
        self._transposed: bool | None = None

    @classmethod
    def from_config(
        cls,
        config: Any,
        layer_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoE:
        """Make the MoE layer of a model that transformers has, from its config.

        Args:
            config (object): a config of transformers, or any object with the same attributes; its
                model_type is one of qwen3_moe, qwen2_moe, mixtral, olmoe, deepseek_v3, glm4_moe,
                gpt_oss and llama4_text.
            layer_idx (int or None): the decoder layer that this is in, which is refused if it has
                no experts; None does not ask. The layer is the same for all.
            device (torch.device, str or None): of the parameters.
            dtype (torch.dtype or None): of the parameters; the config's own is not read.

        Returns:
            layer (MoE): with weights of its own; load_from() takes a block's.

        Raises:
            ValueError: another model_type, a layer without experts, or a setting that this layer
                does not support.
            TypeError: a subclass whose constructor does not take the arguments of this one.
        """
        block = _block_of(config, layer_idx)
        parts = _make_parts(config, block, device=device, dtype=dtype)
        try:
            inspect.signature(cls).bind(*parts)
        except TypeError as error:
            raise TypeError(
                f"moe_ops.layers.MoE.from_config: expected the constructor of {cls.__name__} to take "
                f"router, experts, shared_expert and shared_expert_gate: {error}"
            ) from None
        layer = cls(*parts)
        layer._model_type = config.model_type
        layer._transposed = block.transposed
        return layer

    def load_from(self, block: nn.Module) -> MoE:
        """Copy the weights of transformers' own block of the same model.

        Args:
            block (nn.Module): a Qwen3MoeSparseMoeBlock, DeepseekV3MoE, GptOssMLP or Llama4TextMoe,
                whichever the config that this layer was made from belongs to. Its tensors are
                copied, in this layer's dtypes and to its devices.

        Returns:
            self (MoE): the layer, which now computes what the block does.

        Raises:
            ValueError: the layer does not come from from_config, the block is transformers' block
                of another model, or its state has other names or shapes. A class of yours is taken
                by the names and shapes in its state.
        """
        if self._model_type is None or self._transposed is None:
            raise ValueError(
                "moe_ops.layers.MoE.load_from: expected a layer made by MoE.from_config, "
                "got one made of parts; use load_state_dict"
            )
        for module in (self, block):
            if any(tensor.is_meta for tensor in module.state_dict().values()):
                raise ValueError(
                    "moe_ops.layers.MoE.load_from: expected tensors with data, got meta tensors in "
                    f"{type(module).__name__}; call its to_empty(device=...) or load its weights"
                )
        known = [c.__name__ for c in type(block).__mro__ if c.__name__ in CLASSES.values()]
        expected_class = CLASSES[self._model_type]
        if known and known[0] != expected_class:
            raise ValueError(
                f"moe_ops.layers.MoE.load_from: expected {expected_class}, got "
                f"{type(block).__name__}; this layer was made from a {self._model_type} config"
            )
        theirs = {
            _our_name(name): _our_layout(name, tensor, self._transposed)
            for name, tensor in block.state_dict().items()
        }
        ours = self.state_dict()
        for name in sorted(ours.keys() | theirs.keys()):
            expected, got = (
                str(tuple(state[name].shape)) if name in state else "no such tensor"
                for state in (ours, theirs)
            )
            if expected != got:
                raise ValueError(
                    f"moe_ops.layers.MoE.load_from: expected {name} to be {expected}, "
                    f"got {got} in {type(block).__name__}; make the layer from the block's config"
                )
        self.load_state_dict(theirs)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer.

        Args:
            hidden_states ((..., hidden_size), the parameters' dtype): T tokens in any shape.

        Returns:
            output ((..., hidden_size), the dtype of hidden_states).
            router_logits ((T, num_experts), as the router has them): for load_balancing_loss.

        Differentiable, both, in hidden_states and the parameters.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits, topk_weights, topk_ids = self.router(tokens)
        output = self.experts(tokens, topk_ids, topk_weights)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            output = output + shared
        return in_shape_of(hidden_states, output), router_logits


def _block_of(config: Any, layer_idx: int | None) -> Block:
    """Return what the config says about its MoE blocks. Refuse a layer that has none."""
    model_type = getattr(config, "model_type", None)
    if model_type not in BLOCKS:
        raise ValueError(
            "moe_ops.layers.MoE.from_config: expected config.model_type to be one of "
            f"{', '.join(BLOCKS)}, got {model_type!r}"
        )
    block = BLOCKS[model_type](config)
    is_layer = layer_idx is None or 0 <= layer_idx < config.num_hidden_layers
    if layer_idx is not None and not (is_layer and block.has_experts(layer_idx)):
        raise ValueError(
            "moe_ops.layers.MoE.from_config: expected layer_idx of a layer with experts in "
            f"this {model_type} config, got {layer_idx}; pass None to make the layer anyway"
        )
    return block


def _make_parts(
    config: Any, block: Block, **place: Any
) -> tuple[Router, Experts, nn.Module | None, nn.Module | None]:
    """Make router, experts, shared_expert and shared_expert_gate."""
    hidden_size = config.hidden_size
    router = Router(hidden_size, top_k=config.num_experts_per_tok, **block.router, **place)
    experts = Experts(block.router["num_experts"], hidden_size, **block.experts, **place)
    shared_expert = shared_expert_gate = None
    if block.shared_intermediate_size is not None:
        activation = block.experts["activation"]
        shared_expert = GatedMLP(hidden_size, block.shared_intermediate_size, activation, **place)
    if block.shared_expert_gate:
        shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **place)
    return router, experts, shared_expert, shared_expert_gate


# What transformers calls the parts of its blocks, where it is not what MoE calls them.
_OUR_NAMES = {"gate": "router", "shared_experts": "shared_expert"}


def _our_name(name: str) -> str:
    part, dot, rest = name.partition(".")
    return f"{_OUR_NAMES.get(part, part)}{dot}{rest}"


def _our_layout(name: str, tensor: Tensor, transposed: bool) -> Tensor:
    is_projection = name in {"experts.gate_up_proj", "experts.down_proj"}
    return tensor.transpose(1, 2) if transposed and is_projection else tensor
