# SPDX-License-Identifier: Apache-2.0
"""Compute the activations of expert MLPs and their derivatives, in fp32.

The names are those of fused_experts' schema. NaN in gives NaN out.
"""

import triton
import triton.language as tl

from moe_ops._triton.kernels.grouped_gemm import halves_of

# gpt-oss: gate * sigmoid(1.702 * gate) * (up + 1).
_OAI_SLOPE = tl.constexpr(1.702)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
# 2 * sqrt(2 / pi), and the coefficient of the cubic term, both of gelu's tanh form.
_TANH_SLOPE = tl.constexpr(1.5957691216057308)
_TANH_CUBIC = tl.constexpr(0.044715)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), to some ulp of fp32.

    tl.sigmoid divides and takes 11 instructions per element, this takes 5. An up projection's
    epilogue is not much longer than that.
    """
    root = tl.rsqrt(1 + tl.exp2(x * _MINUS_LOG2_E))
    return root * root


@triton.jit
def at_most(x, limit):
    """Return min(x, limit), and NaN for NaN."""
    return tl.where(x > limit, limit, x)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """Return act(x) and d act / dx."""
    if ACTIVATION == "silu" or ACTIVATION == "swiglu_oai":  # noqa: PLR1714
        slope: tl.constexpr = 1.0 if ACTIVATION == "silu" else _OAI_SLOPE
        s = sigmoid(x * slope)
        value = x * s
        derivative = s + value * (1 - s) * slope
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * _SQRT_HALF))
        value = x * cdf
        derivative = cdf + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(y)) / 2 is sigmoid(2 y).
        cubic = x * x * _TANH_CUBIC
        s = sigmoid(x * (1 + cubic) * _TANH_SLOPE)
        value = x * s
        derivative = s + value * (1 - s) * (1 + 3 * cubic) * _TANH_SLOPE
    elif ACTIVATION == "relu":
        value = tl.where(x <= 0, 0.0, x)
        derivative = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu_squared", "unknown activation")
        positive = tl.where(x <= 0, 0.0, x)
        value = positive * positive
        derivative = 2 * positive
    return value, derivative


@triton.jit
def gated_activation(
    gate, up, limit, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr
):  # fmt: skip
    """Return act(gate) * up and its derivatives with respect to gate and up."""
    bounded = gate
    factor = up
    if HAS_LIMIT:
        bounded = at_most(gate, limit)
        factor = at_most(tl.where(up < -limit, -limit, up), limit)
    if ACTIVATION == "swiglu_oai":
        factor += 1
    value, slope = activation(bounded, ACTIVATION)
    d_gate = slope * factor
    d_up = value
    if HAS_LIMIT:
        d_gate = tl.where(gate > limit, 0.0, d_gate)
        d_up = tl.where(tl.abs(up) > limit, 0.0, d_up)
    return value * factor, d_gate, d_up


@triton.jit
def plain_activation(x, limit, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """Return act(x) and its derivative, for an MLP without a gate."""
    bounded = x
    if HAS_LIMIT:
        bounded = at_most(x, limit)
    value, slope = activation(bounded, ACTIVATION)
    if HAS_LIMIT:
        slope = tl.where(x > limit, 0.0, slope)
    return value, slope


@triton.jit
def split_gate(
    z, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Split z (BLOCK_M, 2 * BLOCK_I) into gate and up, (BLOCK_M, BLOCK_I) each.

    With INTERLEAVED they are its even and its odd columns, else its halves.
    """
    if INTERLEAVED:
        gate, up = z.reshape(BLOCK_M, BLOCK_I, 2).split()
    else:
        gate, up = halves_of(z, BLOCK_M, 2 * BLOCK_I)
    return gate, up
