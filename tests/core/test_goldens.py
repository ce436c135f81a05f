# SPDX-License-Identifier: Apache-2.0
"""The schemas and the ops in compiled graphs do not change unnoticed.

EXPECTTEST_ACCEPT=1 rewrites them.
"""

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing.moe_block import BLOCKS, compiled_graphs

expecttest = pytest.importorskip("expecttest", reason="the goldens are expecttest's")


def test_schemas_as_the_dispatcher_has_them():
    schemas = [str(getattr(torch.ops.moe, name).default._schema) for name in sorted(SCHEMAS)]
    expecttest.assert_expected_inline(
        "\n".join(schemas),
        """\
moe::dequantize_weight(Tensor codes, Tensor scale, Tensor? nested_scale, Tensor? nested_offset, str format, SymInt group_size, str scale_encoding, SymInt in_features, ScalarType output_dtype) -> Tensor
moe::ep_combine(Tensor input, Tensor local_ids, Tensor sent_slots, SymInt num_experts, SymInt world_size, SymInt capacity, str group) -> Tensor
moe::ep_combine_backward(Tensor grad_output, Tensor sent_slots, SymInt num_experts, SymInt world_size, SymInt capacity, str group) -> Tensor
moe::ep_dispatch(Tensor input, Tensor topk_ids, Tensor topk_weights, SymInt num_experts, SymInt world_size, SymInt capacity, str group) -> (Tensor output, Tensor local_ids, Tensor local_weights, Tensor sent_slots, Tensor num_dropped)
moe::ep_dispatch_backward(Tensor grad_output, Tensor grad_local_weights, Tensor local_ids, Tensor sent_slots, SymInt num_experts, SymInt world_size, SymInt capacity, str group, bool[2] needs) -> (Tensor grad_input, Tensor grad_topk_weights)
moe::fused_experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, bool weights_before=False, str recompute="none", str? kernel_config=None) -> Tensor
moe::fused_experts_down_backward(Tensor grad_output, Tensor? hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor? gate_up_bias, Tensor? down_bias, Tensor? pre_activation, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices, str activation, bool gated, bool interleaved, float? activation_limit, bool weights_before, bool[4] needs, bool transposed, str? kernel_config=None) -> (Tensor grad_pre_activation, Tensor grad_down_proj, Tensor grad_topk_weights, Tensor grad_down_bias)
moe::fused_experts_forward(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, bool weights_before=False, str recompute="none", str? kernel_config=None) -> (Tensor output, Tensor pre_activation, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices)
moe::fused_experts_lora(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_lora_a, Tensor gate_up_lora_b, Tensor down_lora_a, Tensor down_lora_b, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, str? kernel_config=None) -> Tensor
moe::fused_experts_lora_backward(Tensor grad_output, Tensor? hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor gate_up_lora_a, Tensor gate_up_lora_b, Tensor down_lora_a, Tensor down_lora_b, Tensor? down_bias, Tensor pre_activation, Tensor? gate_up_low_rank, Tensor? down_low_rank, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices, str activation, bool gated, bool interleaved, float? activation_limit, bool[6] needs, str? kernel_config=None) -> (Tensor grad_hidden_states, Tensor grad_topk_weights, Tensor grad_gate_up_lora_a, Tensor grad_gate_up_lora_b, Tensor grad_down_lora_a, Tensor grad_down_lora_b)
moe::fused_experts_lora_forward(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_lora_a, Tensor gate_up_lora_b, Tensor down_lora_a, Tensor down_lora_b, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, str? kernel_config=None) -> (Tensor output, Tensor pre_activation, Tensor gate_up_low_rank, Tensor down_low_rank, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices)
moe::fused_experts_lora_quantized(Tensor hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, Tensor down_codes, Tensor down_scale, Tensor? down_nested_scale, Tensor? down_nested_offset, str down_format, SymInt down_group_size, str down_scale_encoding, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_lora_a, Tensor gate_up_lora_b, Tensor down_lora_a, Tensor down_lora_b, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, str? kernel_config=None) -> Tensor
moe::fused_experts_lora_quantized_backward(Tensor grad_output, Tensor? hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, Tensor down_codes, Tensor down_scale, Tensor? down_nested_scale, Tensor? down_nested_offset, str down_format, SymInt down_group_size, str down_scale_encoding, Tensor topk_weights, Tensor gate_up_lora_a, Tensor gate_up_lora_b, Tensor down_lora_a, Tensor down_lora_b, Tensor? down_bias, Tensor pre_activation, Tensor? gate_up_low_rank, Tensor? down_low_rank, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices, str activation, bool gated, bool interleaved, float? activation_limit, bool[6] needs, str? kernel_config=None) -> (Tensor grad_hidden_states, Tensor grad_topk_weights, Tensor grad_gate_up_lora_a, Tensor grad_gate_up_lora_b, Tensor grad_down_lora_a, Tensor grad_down_lora_b)
moe::fused_experts_lora_quantized_forward(Tensor hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, Tensor down_codes, Tensor down_scale, Tensor? down_nested_scale, Tensor? down_nested_offset, str down_format, SymInt down_group_size, str down_scale_encoding, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_lora_a, Tensor gate_up_lora_b, Tensor down_lora_a, Tensor down_lora_b, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, str? kernel_config=None) -> (Tensor output, Tensor pre_activation, Tensor gate_up_low_rank, Tensor down_low_rank, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices)
moe::fused_experts_quantized(Tensor hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, Tensor down_codes, Tensor down_scale, Tensor? down_nested_scale, Tensor? down_nested_offset, str down_format, SymInt down_group_size, str down_scale_encoding, Tensor topk_ids, Tensor topk_weights, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, bool weights_before=False, str recompute="none", str? kernel_config=None) -> Tensor
moe::fused_experts_quantized_down_backward(Tensor grad_output, Tensor? hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, Tensor down_codes, Tensor down_scale, Tensor? down_nested_scale, Tensor? down_nested_offset, str down_format, SymInt down_group_size, str down_scale_encoding, Tensor topk_weights, Tensor? gate_up_bias, Tensor? down_bias, Tensor? pre_activation, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices, str activation, bool gated, bool interleaved, float? activation_limit, bool weights_before, bool[3] needs, str? kernel_config=None) -> (Tensor grad_pre_activation, Tensor grad_topk_weights, Tensor grad_down_bias)
moe::fused_experts_quantized_forward(Tensor hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, Tensor down_codes, Tensor down_scale, Tensor? down_nested_scale, Tensor? down_nested_offset, str down_format, SymInt down_group_size, str down_scale_encoding, Tensor topk_ids, Tensor topk_weights, Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool gated=True, bool interleaved=False, float? activation_limit=None, bool weights_before=False, str recompute="none", str? kernel_config=None) -> (Tensor output, Tensor pre_activation, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices)
moe::fused_experts_quantized_up_backward(Tensor grad_pre_activation, Tensor? hidden_states, Tensor gate_up_codes, Tensor gate_up_scale, Tensor? gate_up_nested_scale, Tensor? gate_up_nested_offset, str gate_up_format, SymInt gate_up_group_size, str gate_up_scale_encoding, SymInt hidden_size, Tensor? topk_weights, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices, SymInt top_k, bool[3] needs, str? kernel_config=None) -> (Tensor grad_hidden_states, Tensor grad_topk_weights, Tensor grad_gate_up_bias)
moe::fused_experts_up_backward(Tensor grad_pre_activation, Tensor? hidden_states, Tensor gate_up_proj, Tensor? topk_weights, Tensor token_counts, Tensor gather_indices, Tensor scatter_indices, SymInt top_k, bool[4] needs, bool transposed, str? kernel_config=None) -> (Tensor grad_hidden_states, Tensor grad_gate_up_proj, Tensor grad_topk_weights, Tensor grad_gate_up_bias)
moe::grouped_gemm(Tensor input, Tensor weight, Tensor token_counts, Tensor? gather_indices=None, Tensor? topk_weights=None, Tensor? bias=None, SymInt top_k=1, bool permute_x=False, bool permute_y=False, str? kernel_config=None) -> Tensor
moe::grouped_gemm_dw(Tensor grad_output, Tensor input, Tensor token_counts, Tensor? gather_indices=None, Tensor? topk_weights=None, SymInt top_k=1, bool permute_x=False, bool permute_y=False, bool[2] needs=[True, False], bool transposed=False, str? kernel_config=None) -> (Tensor grad_weight, Tensor grad_bias)
moe::grouped_gemm_dx(Tensor grad_output, Tensor weight, Tensor token_counts, Tensor? gather_indices=None, Tensor? topk_weights=None, Tensor? input=None, Tensor? bias=None, SymInt top_k=1, bool permute_x=False, bool permute_y=False, bool[2] needs=[True, False], str? kernel_config=None) -> (Tensor grad_input, Tensor grad_topk_weights)
moe::grouped_gemm_quantized(Tensor input, Tensor codes, Tensor scale, Tensor? nested_scale, Tensor? nested_offset, str format, SymInt group_size, str scale_encoding, Tensor token_counts, Tensor? gather_indices=None, Tensor? topk_weights=None, Tensor? bias=None, SymInt top_k=1, bool permute_x=False, bool permute_y=False, str? kernel_config=None) -> Tensor
moe::grouped_gemm_quantized_dx(Tensor grad_output, Tensor codes, Tensor scale, Tensor? nested_scale, Tensor? nested_offset, str format, SymInt group_size, str scale_encoding, SymInt in_features, Tensor token_counts, Tensor? gather_indices=None, Tensor? topk_weights=None, Tensor? input=None, Tensor? bias=None, SymInt top_k=1, bool permute_x=False, bool permute_y=False, bool[2] needs=[True, False], str? kernel_config=None) -> (Tensor grad_input, Tensor grad_topk_weights)
moe::permute(Tensor input, Tensor gather_indices, SymInt top_k, Tensor? scatter_indices=None) -> Tensor
moe::routing_indices(Tensor topk_ids, SymInt num_experts) -> (Tensor token_counts, Tensor gather_indices, Tensor scatter_indices)
moe::topk_routing(Tensor logits, SymInt top_k, Tensor? selection_bias=None, str score_function="softmax", bool score_before_topk=True, bool renormalize=False, SymInt num_groups=1, SymInt top_groups=1, str group_score="top2_sum", float scaling_factor=1.) -> (Tensor topk_weights, Tensor topk_ids)
moe::topk_routing_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_ids, str score_function, bool score_before_topk, bool renormalize, float scaling_factor) -> Tensor
moe::unpermute(Tensor input, Tensor gather_indices, Tensor? topk_weights=None, SymInt top_k=1, Tensor? scatter_indices=None) -> Tensor
moe::unpermute_backward(Tensor grad_output, Tensor input, Tensor gather_indices, Tensor topk_weights, SymInt top_k, Tensor? scatter_indices, bool[2] needs) -> (Tensor grad_input, Tensor grad_topk_weights)""",
    )


def render(graphs: dict[str, list[str]]) -> str:
    return "\n".join(line for name, ops in graphs.items() for line in (f"{name}:", *ops)) + "\n"


def test_graphs_of_the_fused_block():
    expecttest.assert_expected_inline(
        render(compiled_graphs(BLOCKS["fused"])),
        """\
forward:
moe.topk_routing.default: float32[3, 2], int32[3, 2]
moe.routing_indices.default: int32[4], int32[6], int32[6]
moe.grouped_gemm.default: float32[6, 12]
moe.grouped_gemm.default: float32[6, 8]
backward:
moe.grouped_gemm_dx.default: float32[6, 6], float32[3, 2]
moe.grouped_gemm_dw.default: float32[4, 8, 6], float32[0]
moe.grouped_gemm_dx.default: float32[3, 8], float32[0]
moe.grouped_gemm_dw.default: float32[4, 12, 8], float32[0]
moe.topk_routing_backward.default: float32[3, 4]
""",
    )


def test_graphs_of_the_unfused_block():
    expecttest.assert_expected_inline(
        render(compiled_graphs(BLOCKS["unfused"])),
        """\
forward:
moe.topk_routing.default: float32[3, 2], int32[3, 2]
moe.routing_indices.default: int32[4], int32[6], int32[6]
moe.permute.default: float32[6, 8]
moe.grouped_gemm.default: float32[6, 12]
moe.grouped_gemm.default: float32[6, 8]
moe.unpermute.default: float32[3, 8]
backward:
moe.unpermute_backward.default: float32[6, 8], float32[3, 2]
moe.grouped_gemm_dx.default: float32[6, 6], float32[0]
moe.grouped_gemm_dw.default: float32[4, 8, 6], float32[0]
moe.grouped_gemm_dx.default: float32[6, 8], float32[0]
moe.grouped_gemm_dw.default: float32[4, 12, 8], float32[0]
moe.unpermute.default: float32[3, 8]
moe.topk_routing_backward.default: float32[3, 4]
""",
    )
