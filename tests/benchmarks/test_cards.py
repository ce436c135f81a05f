# SPDX-License-Identifier: Apache-2.0
"""performance.md says of each card how fast the block is, and what falls short."""

import json

import pytest

from benchmarks import report
from benchmarks.report import cards as cards_module
from benchmarks.report.cards import block_bars, cards
from benchmarks.report.plots import BLOCK

MORE_FACTS: dict[str, dict[str, object]] = {
    "experts-peers": {"present": {"sonicmoe": "0.1.2", "scattermoe": "0.3.0"}},
    "sweep": {"date": "2026-01-01"},
}
FACTS = {"date": "2026-01-02", "gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}


def case(shape, name, ratio, **more):
    return {
        "shape": shape,
        "routing": "uniform",
        "pass": name,
        "errors": {"moe_ops": 0.01, "compiled": 0.01},
        "milliseconds": {"moe_ops": [9.0, 9.126, 9.2]},
        "ratio": {} if ratio is None else {"compiled": [ratio - 0.1, ratio, ratio + 0.1]},
        **more,
    }


SIZES = {"T": 7, "H": 6, "I": 5, "E": 4, "K": 3}
PEAKS = {"moe_ops": {"peak": 1030.0}, "compiled": {"peak": 900.0}}
PARTS = {
    "experts": [
        case("olmoe", "forward", 1.5),
        case("olmoe", "forward+backward", 0.97, mib=PEAKS),
        case("olmoe", "forward", 3.0, routing="zipf"),
        case("olmoe", "forward", None, errors={"moe_ops": 0.01, "compiled, dynamic": 0.01}),
    ],
    "named": [
        case("odd", "forward", 1.25, **SIZES),
        case("odd", "forward+backward", None, wrong=["compiled"], **SIZES),
        case("kimi-k2", "forward+backward", 1.2, **SIZES),
        case("qwen3-next", "forward+backward", 1.7, **SIZES),
    ],
    "sweep": [
        case("0/00", "forward", 2.0, **SIZES),
        case("0/01", "forward", 0.5, **SIZES),
        {**case("0/02", "forward", None, wrong=["compiled"], **SIZES)},
        case("0/00", "forward+backward", 1.1, **SIZES),
    ],
    "model": [
        {
            "tokens": tokens,
            "checkpoints": checkpoints,
            "ratio": {"grouped_mm": [0.9, ratio, 1.1]},
            "peak_mib": {"moe_ops": peak, "grouped_mm": 100.0},
        }
        for tokens, checkpoints, ratio, peak in (
            (64, False, 1.01, 99.0),
            (256, False, 1.05, 81.0),
            (256, True, 0.91, 99.0),
        )
    ],
    "experts-first-call": [
        {"triton_cache": state, "seconds": {"first": seconds}}
        for state, seconds in (
            ("empty", 10.5),
            ("empty", 12.5),
            ("empty", 9.5),
            ("warm", 0.5),
            ("warm", 0.9),
            ("warm", 0.7),
        )
    ],
    "widths": [
        {"T": tokens, "H": 1001, "I": 8, "pass": "forward", "ratio": {"next": [1.0, ratio, 2.0]}}
        for tokens, ratio in ((512, 1.9), (8192, 1.61), (16384, 1.5))
    ],
    "blocks": [
        {
            "shape": shape,
            "pass": "forward+backward",
            "ratio": {"compiled": [1.4, 1.5, 1.6], "compat: compiled": [0.8, ratio, 1.2]},
        }
        for shape, ratio in (("olmoe", 0.87), ("large", 1.1))
    ],
    "decode-block": [{"T": 1, "of_floor": 2.5}, {"T": 8, "of_floor": 1.1}],
    "host": [
        {
            "what": "grouped_gemm",
            "shape": "small",
            "pass": "forward",
            "host_ratio": {"of torch": [1.2, 1.38, 1.5]},
        },
        {"what": "op", "shape": "small", "host_us": {"moe_ops": [1.0, 2.0, 3.0]}},
        {
            "what": "lora",
            "shape": "small",
            "pass": "forward+backward",
            "host_us": {"compiled": [7.0, 8.0, 9.0]},
            # Two places are told, so what rounds to the aim has reached it.
            "host_ratio": {
                "of compiled": [0.5, 0.703, 0.8],
                "compiled of compiled": [1.3, 1.4, 1.5],
            },
            "ratio": {"compiled": [1.1, 1.2, 1.3], "both compiled": [0.7, 0.8, 0.9]},
            "step_ratio": {"compiled": [1.1, 1.2, 1.3]},
        },
        {
            "what": "experts",
            "shape": "qwen3-30b T=2048",
            "pass": "forward+backward",
            "step_ratio": {"compiled": [1.5, 1.6, 1.7], "both compiled": [1.3, 1.4, 1.5]},
        },
    ],
}
PEERS = [
    {
        "shape": "olmoe",
        "peer": peer,
        "pass": "forward+backward",
        "ratio": {peer: [1.0, ratio, 1.2]},
        "mib": {"moe_ops": {"peak": 1030.0}, peer: {"peak": 981.0}},
    }
    for peer, ratio in (("sonicmoe", 1.17), ("scattermoe", 1.9))
]


def write(folder, parts):
    for part, cases in parts.items():
        content = {
            "environment": {**FACTS, **MORE_FACTS.get(part, {}), "part": part},
            "cases": cases,
        }
        (folder / f"h200_{part.replace('-', '_')}.json").write_text(json.dumps(content))
    return "\n".join(cards(folder))


def test_a_card(tmp_path):
    text = write(tmp_path, PARTS)
    assert text.startswith("## NVIDIA H200\n\n2026-01-01, 2026-01-02; torch 2.11.0, triton 3.6.0. ")
    for line in (
        "| olmoe | 16384 2048 1024 64 8 | 9.13 | 1.50 | 0.97 | 1030 | 900 |",
        "| odd | 7 6 5 4 3 | 9.13 | 1.25 | theirs wrong | - | - |",
        "- forward+backward: slower than compiled grouped_mm on 1 of 3 shapes above, down to 0.97x.",
        "- forward+backward of named models, compiled grouped_mm's time over ours: kimi-k2 1.20x (aim 1.38x).",
        "- A step of a whole model, 256 tokens, grouped_mm's time over ours: 1.05x (aim 1.12x).",
        "whole model, 256 tokens, our memory at most over grouped_mm's: 0.81x (aim 0.8x).",
        "256 tokens, with activation checkpointing, grouped_mm's time over ours: 0.91x (aim 1x).",
        # The middle one of three; the warm ones reach their aim.
        "- The experts' first call with nothing compiled before: 10.50 s (aim 10 s).",
        "- forward+backward, compiled grouped_mm's time over ours: olmoe 0.97x (aim 1.4x).",
        "- forward: slower than compiled grouped_mm on 1 of 2 drawn shapes, down to 0.50x.",
        "- More memory at most than compiled grouped_mm: olmoe 1.14x.",
        "from eight on): 1 token 2.50x.",
        "ours over compiled grouped_mm's (aim 0.7x): lora small compiled 1.40x.",
        "- Of these calls slower than compiled grouped_mm's: lora small compiled 0.80x.",
        "over ours: experts qwen3-30b T=2048 compiled 1.40x (aim 1.5x).",
        "- Widths that are no multiples of 8, over the next that are: H 1001, I 8, T 8192, forward 1.61x (aim 1.5x).",
        "compiled grouped_mm's time over its own: olmoe 0.87x.",
        "- The host's time of grouped_gemm, ours over torch's: small forward 1.38x.",
        "3 more shapes, drawn at random",
        "in the geometric mean forward 1.00 (0.50 to 2.00), forward+backward 1.10 (1.10 to 1.10).",
        "- forward+backward of the drawn shapes, in the geometric mean: 1.10x (aim 1.35x).",
        "| grouped_mm's MiB |",
    ):
        assert line in text, line
    for line in ("64 tokens", "everything compiled", "grouped_mm's: 0.99x"):
        assert line not in text, line
    assert "SonicMoE" not in text


def test_a_number_that_rounds_to_its_aim_has_a_digit_more():
    assert cards_module._told(1.347, 1.35) == "1.347x (aim 1.35x)"
    assert cards_module._told(1.34, 1.35) == "1.34x (aim 1.35x)"


def test_sonicmoe_has_columns_where_it_was_measured(tmp_path):
    text = write(tmp_path, {**PARTS, "experts-peers": PEERS})
    assert "| forward, SonicMoE | forward+backward, SonicMoE |" in text
    assert "| olmoe | 16384 2048 1024 64 8 | 9.13 | 1.50 | 0.97 | - | 1.17 | 1030 |" in text
    assert "that of SonicMoE 0.1.2, in its default configurations, over ours;" in text
    assert "- More memory at most than SonicMoE: olmoe 1.05x." in text


def test_nothing_falls_short(tmp_path):
    text = write(tmp_path, {"experts": [case("olmoe", "forward", 1.5)]})
    assert "What falls short:\n\n- Nothing in these tables." in text


def test_the_plot_of_the_block(tmp_path):
    mpl = pytest.importorskip("matplotlib")
    mpl.use("agg")
    from matplotlib import pyplot as plt

    parts = {part: {"cases": cases} for part, cases in {**PARTS, "experts-peers": PEERS}.items()}
    figure = report.draw(BLOCK, block_bars(parts), plt)
    heights = [
        {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
        for axes in figure.axes
    ]
    # A group of one bar stands above its name.
    theirs, sonicmoe = figure.axes[1].containers
    middles = [bar.get_x() + bar.get_width() / 2 for bar in (*theirs, sonicmoe[0])]
    assert middles == pytest.approx([-0.2, 1, 2, 3, 0.2])
    plt.close(figure)
    assert heights == [
        {"compiled grouped_mm": [1.5, 1.25]},
        {"compiled grouped_mm": [0.97, 0.0, 1.2, 1.7], "SonicMoE": [1.17, 0.0, 0.0, 0.0]},
    ]


def test_cpus_share_a_table(tmp_path):
    def cpu(name, passes, **more):
        cases = [
            {"dtype": "bf16", "pass": of, "E": 8, "ratio": [0.5, ratio, 2.0], **more}
            for of, ratio in passes
        ]
        content = {"environment": {"cpu": "EPYC"}, "cases": cases}
        (tmp_path / f"cpu_{name}.json").write_text(json.dumps(content))

    cpu("experts_bf16", [("forward", 1.25), ("forward", 1.0), ("forward+backward", 1.5)])
    cpu("gemm_bf16", [("forward", 0.5), ("dX", 2.0)], counts="new")
    cpu("fused", [("forward", 9.0)])
    assert "| EPYC | bf16 | 1.12 (1.00) | 1.50 (1.50) | 1.00 (0.50) |" in "\n".join(cards(tmp_path))
