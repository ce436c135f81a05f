# SPDX-License-Identifier: Apache-2.0
"""What the whole expert block, and models that hold it, are to reach: the report compares results.

Ratios are of forward and backward: another's time over ours at least, ours over another's at most.
The aims of expert parallelism stand in benchmarks/expert_parallel/acceptance.py, those of quantised
experts in their records.
"""

# By the shape: compiled grouped_mm's time over ours. It is transformers', compiled for these very
# sizes.
BLOCK = {
    "qwen3-30b": 1.5,
    "olmoe": 1.4,
    "mixtral": 1.14,
    "dsv3": 1.35,
    "gptoss20b": 1.22,
    "fine-grained": 1.9,
    "large": 1.38,
}
NAMED = {
    "gpt-oss-120b": 1.15,
    "gpt-oss-120b biases": 1.3,
    "llama4-scout": 1.1,
    "deepseek-v2-lite": 1.25,
    "glm-4.5-air": 1.33,
    "qwen3-next": 1.6,
    "kimi-k2": 1.38,
}
# The geometric mean over the drawn shapes.
SWEEP = 1.35
# LoRA on frozen experts, adapters on both projections, both sides compiled.
LORA = {"qwen3-30b": 1.2}
# At most so much of compiled grouped_mm's peak of memory, and so many MiB on top.
PEAK_FACTOR, PEAK_MIB = 1.02, 16.0
# Widths that are no multiples of 8 elements, from so many tokens on: our time over that of the next
# that are, at most.
WIDTH, WIDTH_TOKENS = 1.5, 8192
# The host's time: ours over compiled grouped_mm's.
HOST = 0.7
# A step among many of the host's larger shape, which is of fine-tuning: compiled grouped_mm's time
# over ours.
STEP = 1.5
# A first call, without torch's own first gradient: seconds with nothing compiled before, and with
# everything.
FIRST_CALL_COLD, FIRST_CALL_WARM = 10.0, 0.7
# A decoding step over the read of its weights: for one token, and for more.
DECODE_ONE, DECODE = 1.8, 1.2
# A step of a whole model of the most tokens: grouped_mm's time over ours, and our peak of memory over
# its own; without activation checkpointing, and with.
MODEL, MODEL_PEAK = 1.12, 0.8
MODEL_CHECKPOINTS, MODEL_CHECKPOINTS_PEAK = 1.0, 1.0


def exceeds_peak(ours: float, theirs: float) -> bool:
    """Tell whether our peak of memory is more than is allowed beside a peer's, in MiB."""
    return ours > PEAK_FACTOR * theirs + PEAK_MIB
