# SPDX-License-Identifier: Apache-2.0
"""Log and steer, in transformers' Trainer, how evenly the experts of each layer are used.

The experts modules are the same under every experts_implementation. A hook on each of them counts
the ids that the model's router chose; router logits need not be returned.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from moe_ops.integrations.requirements import missing
from moe_ops.integrations.transformers import MINIMUM_VERSION
from moe_ops.layers import load_balance_metrics, update_selection_bias_
from moe_ops.layers.experts_modules import experts_in, num_experts_of

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise missing(
        "moe_ops.integrations.load_balance", "transformers", MINIMUM_VERSION, error
    ) from error


class TokenCounts:
    """Count the tokens that each expert of a model gets, in every forward of training.

    Make it before torch.compile traces the model, with the model on its device. Padding is counted
    like any token. Where activation checkpointing computes a layer twice, its tokens are counted
    twice: the shares stay the same. Ids outside [0, num_experts) are not counted.

    Args:
        model (nn.Module): its experts modules are those of transformers' experts interface, PEFT's
            wrappers around them, and moe_ops.layers.Experts and LoraExperts.

    Attributes:
        counts (dict of Tensor (num_experts,), int64): by the name of the experts module, on its
            device.

    Raises:
        ValueError: a model without such modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        for name, module in experts_in(model):
            device = next(itertools.chain(module.parameters(), module.buffers())).device
            counts = torch.zeros(num_experts_of(module), dtype=torch.long, device=device)
            self.counts[name] = counts
            self._hooks.append(
                module.register_forward_pre_hook(_counting_into(counts), with_kwargs=True)
            )
        if not self.counts:
            raise ValueError(
                "moe_ops.integrations.load_balance: expected a model with experts modules, got none "
                f"in {type(model).__name__}; its experts bypass transformers' experts interface"
            )

    def reset(self) -> None:
        """Begin again at zero."""
        for counts in self.counts.values():
            counts.zero_()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


class LoadBalanceCallback(TrainerCallback):
    """Log how evenly the experts of each layer were used since the last logging step.

        trainer.add_callback(LoadBalanceCallback(trainer))

    Each record of the training loss is followed by one with three numbers for each layer, which
    moe_ops.layers.load_balance_metrics defines:

        moe_max_over_mean/<experts module>   busiest expert over the mean: 1 is even
        moe_dead_experts/<experts module>    experts that got no token
        moe_entropy/<experts module>         in nats: log(num_experts) is even

    They are of the batches of all ranks together, one all-reduce and one synchronisation with the
    host a logging step. They go where the Trainer's logs go: log_history, TensorBoard and the like.
    What TokenCounts says about padding and torch.compile holds. The ranks of transformers' expert
    parallelism hold different experts under the same names: there the numbers mean nothing.

    Args:
        trainer (transformers.Trainer): whose log() is called.

    Raises:
        ValueError: from train(), a model without experts modules.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._token_counts: TokenCounts | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count. A training that an exception ended is ended first."""
        self.on_train_end(args, state, control)
        self._token_counts = TokenCounts(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the metrics after a record of the training loss."""
        if self._token_counts is not None and "loss" in (kwargs.get("logs") or {}):
            counts = _over_ranks(self._token_counts.counts)
            self._token_counts.reset()
            self._trainer.log(_by_name(counts))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        if self._token_counts is not None:
            self._token_counts.remove()
            self._token_counts = None


class SelectionBiasCallback(TrainerCallback):
    """Move the selection bias of every router by its experts' load, after each optimizer step.

        trainer.add_callback(SelectionBiasCallback(rate=1e-3))

    This is moe_ops.layers.update_selection_bias_ for models that have a buffer
    e_score_correction_bias beside their experts, as DeepSeek-V3 and GLM-4-MoE have. The counts are
    of all batches of the step on all ranks. What TokenCounts says about padding and torch.compile
    holds; transformers' expert parallelism is not supported.

    Args:
        rate (float): size of a step; DeepSeek-V3 has 1e-3.

    Raises:
        ValueError: from train(), a model without experts modules or without such a buffer.
        TypeError: from the first step, a bias in bf16 or fp16.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._token_counts: TokenCounts | None = None
        self._biases: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the biases and begin to count. A training that an exception ended is ended first."""
        self.on_train_end(args, state, control)
        model = kwargs["model"]
        token_counts = TokenCounts(model)
        self._biases = {
            name: bias
            for name in token_counts.counts
            if (bias := _selection_bias(model.get_submodule(name.rpartition(".")[0]))) is not None
        }
        if not self._biases:
            token_counts.remove()
            raise ValueError(
                "moe_ops.integrations.load_balance.SelectionBiasCallback: expected routers with an "
                f"e_score_correction_bias, got none in {type(model).__name__}; use an auxiliary loss"
            )
        self._token_counts = token_counts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the biases."""
        if self._token_counts is not None:
            counts = _over_ranks(self._token_counts.counts)
            self._token_counts.reset()
            for name, bias in self._biases.items():
                update_selection_bias_(bias, counts[name], self._rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        if self._token_counts is not None:
            self._token_counts.remove()
            self._token_counts = None


def _counting_into(counts: Tensor) -> Any:
    @torch.no_grad()
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            # The second argument of transformers' experts modules and of those of moe_ops.layers.
            name = "topk_ids" if "topk_ids" in kwargs else "top_k_index"
            ids = (args[1] if len(args) > 1 else kwargs[name]).reshape(-1).long()
            is_kept = (ids >= 0) & (ids < counts.numel())
            counts.scatter_add_(0, ids.clamp(0, counts.numel() - 1), is_kept.long())

    return count


def _over_ranks(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on one device, added up over all ranks of torch.distributed."""
    device = next(iter(counts.values())).device
    numbers = torch.cat([each.to(device) for each in counts.values()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(numbers)
    sizes = [each.numel() for each in counts.values()]
    return dict(zip(counts, numbers.split(sizes), strict=True))


def _by_name(counts: dict[str, Tensor]) -> dict[str, float]:
    """Return what is logged, read from the device at once."""
    metrics = {
        f"moe_{metric}/{name}": value
        for name, layer_counts in counts.items()
        for metric, value in load_balance_metrics(layer_counts).items()
    }
    return dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))


def _selection_bias(block: nn.Module) -> Tensor | None:
    """Return the e_score_correction_bias of the router of a block, or of the block itself."""
    for module in (block, *block.children()):
        bias = getattr(module, "e_score_correction_bias", None)
        if isinstance(bias, Tensor):
            return bias
    return None
