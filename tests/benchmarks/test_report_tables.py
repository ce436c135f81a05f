# SPDX-License-Identifier: Apache-2.0
"""The tables of the host's time, the sweep, a whole model and a block's decoding step."""

import json
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import report
from benchmarks.cuda.__main__ import PARTS
from benchmarks.expert_parallel.records import RANKS, part_of
from benchmarks.report.columns import markdown
from benchmarks.report.tables import TABLES, sweep

PAGE = "\n".join([*report.CARD_MARKERS, ""])


def quartiles(middle):
    return [middle - 0.1, middle, middle + 0.1]


APART = {"launches": 1.0, "allocations": 2.0, "descriptors": 4, "us_without_launches": 9.87}


def host_case(what, name, host_us, host_ratio, **more):
    return {
        "what": what,
        "shape": "small",
        "pass": name,
        "errors": dict.fromkeys(host_us, 0.01),
        "host_us": {who: quartiles(us) for who, us in host_us.items()},
        "host_ratio": {of: quartiles(ratio) for of, ratio in host_ratio.items()},
        "ratio": {},
        **more,
    }


def sweep_case(shape, name, ratio, routing="uniform", **more):
    sizes = dict(zip("THIEK", (1076, 4776, 3544, 21, 6), strict=True))
    return {
        "shape": shape,
        "routing": routing,
        **sizes,
        "pass": name,
        "errors": {"moe_ops": 0.01, "compiled": 0.01},
        "milliseconds": {"moe_ops": quartiles(1.234)},
        "tflops": {"moe_ops": 345.6},
        "ratio": {} if ratio is None else {"compiled": quartiles(ratio)},
        "of_floor": 1.35,
        **more,
    }


def model_case(checkpoints, **more):
    both = ("moe_ops", "grouped_mm")
    return {
        "tokens": 16384,
        "length": 4096,
        "checkpoints": checkpoints,
        "errors": dict.fromkeys(both, 0.1),
        "milliseconds": {"moe_ops": quartiles(114.0), "grouped_mm": quartiles(123.5)},
        "ratio": {"grouped_mm": quartiles(1.08)},
        "tokens_per_second": {"moe_ops": 143719, "grouped_mm": 132664},
        "peak_mib": {"moe_ops": 15001.6, "grouped_mm": 19292.2},
        "first_step_seconds": {"moe_ops": 31.25, "grouped_mm": 28.0},
        **more,
    }


PEAKS = {"moe_ops": {"peak": 1030.0}, "compiled": {"peak": 1000.0}}
CONFIGS = {"up forward": "computed, pingpong", "down forward": "computed, persistent"}
CASES: dict[str, list[dict[str, Any]]] = {
    "host": [
        host_case(
            "experts",
            "forward+backward",
            {"moe_ops": 2304.0, "moe_ops compiled": 1952.0, "eager": 1500.0, "compiled": 1039.0},
            {"of eager": 1.54, "of compiled": 2.22, "compiled of compiled": 1.88},
            ratio={"compiled": quartiles(1.08)},
            wrong=["moe_ops compiled"],
        ),
        host_case("lora", "forward", {"moe_ops": 500.0, "eager": 400.0}, {"of eager": 1.25}),
        host_case("grouped_gemm", "forward", {"moe_ops": 60.0, "torch": 20.0}, {"of torch": 3.0}),
        host_case("op", "", {"moe_ops": 12.34}, {}, op="permute", **APART),
        host_case("op", "", {"moe_ops": 5.0}, {}, op="unpermute"),
        {
            "what": "launches",
            "block": "experts",
            "shape": "small",
            "pass": "forward",
            "implementation": "moe_ops",
            "launches": 7.0,
            "allocations": 9.0,
        },
    ],
    "sweep": [
        sweep_case("0/00", "forward", 1.5),
        sweep_case("0/00", "forward+backward", 1.25, mib=PEAKS, configs=CONFIGS),
        sweep_case("0/01", "forward", 0.96, routing="zipf"),
        sweep_case(
            "0/01",
            "forward+backward",
            None,
            routing="zipf",
            wrong=["compiled"],
            errors={"moe_ops": 0.01, "compiled": 0.02663},
        ),
    ],
    "named": [
        sweep_case(
            "odd",
            "forward+backward",
            0.98,
            mib={"moe_ops": {"peak": 1036.1}, "compiled": {"peak": 1000.0}},
            errors={"moe_ops": 0.01, "compiled": "nan"},
        )
    ],
    "model": [
        model_case(checkpoints=False),
        model_case(
            checkpoints=True, ratio={}, peak_mib={}, wrong=["moe_ops"], failed={"moe_ops": "why"}
        ),
    ],
    "decode-block": [
        {
            "shape": "qwen3-30b",
            "T": 1,
            "layers": 4,
            "errors": {"moe_ops": 0.01, "grouped_mm": 0.01},
            "milliseconds": {"moe_ops": quartiles(0.2), "grouped_mm": quartiles(0.4)},
            "ratio": {"grouped_mm": quartiles(2.0)},
            "floor_milliseconds": 0.16,
            "of_floor": 1.25,
        }
    ],
}


@pytest.fixture
def page(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    facts = {"date": "2026-01-02", "gpu": "NVIDIA H100"}
    of_part = {
        "sweep": {"limit_gb": 60.0, "repeated": ["0/03 T 1: 70 GB"], "failed": {"0/07": "memory"}}
    }
    for part, cases in CASES.items():
        content = {"environment": {**facts, "part": part, **of_part.get(part, {})}, "cases": cases}
        (results / f"h100_{part.replace('-', '_')}.json").write_text(json.dumps(content))
    path = tmp_path / "performance.md"
    path.write_text(PAGE)
    report.write(results, path)
    return path


def test_tables(page):
    text = (page.parent / "results" / "h100.md").read_text()
    for row in (
        "| experts | small | forward+backward | 2304 | 1952 | 1500 | 1039 | 1.54 (1.44-1.64) | 2.22 (2.12-2.32) | 1.88 (1.78-1.98) | 1.08 (0.98-1.18) | - |",
        "| lora | small | forward | 500 | - | 400 | - | 1.25 (1.15-1.35) | - | - | - | - |",
        "| small | forward | 60 | 20 | 3.00 (2.90-3.10) |",
        "| permute | small | 12.3 | 9.9 | 1 | 4 | 2 |",
        "| unpermute | small | 5.0 | - | - | - | - |",
        "| experts | small | forward | moe_ops | 7 | 9 |",
        "| all | forward | 2 | 0 | 1.200 | 0.960 | 1 | 1 | 1 | - |",
        "| all | forward+backward | 2 | 1 | 1.250 | 1.250 | 0 | 0 | 0 | 0 |",
        "| uniform routing | forward | 1 | 0 | 1.500 | 1.500 | 0 | 0 | 0 | - |",
        "| Zipf routing | forward | 1 | 0 | 0.960 | 0.960 | 1 | 1 | 1 | - |",
        "| Zipf routing | forward+backward | 1 | 1 | - | - | - | - | - | - |",
        "| all | forward+backward | 1 | 0 | 0.980 | 0.980 | 1 | 1 | 0 | 1 |",
        "| 16384 | no | 114.0 | 123.5 | 1.08 (0.98-1.18) | 143719 | 132664 | 14.65 | 18.84 | 0.78 | 31.2 | 28.0 |",
        "| 16384 | yes | 114.0 | 123.5 | wrong | 143719 | 132664 | - | - | - | 31.2 | 28.0 |",
        "| qwen3-30b | 1 | 4 | 200.0 | 160.0 | 1.25 | 400.0 | 2.00 (1.90-2.10) | - | - | - | - |",
        "[h100_sweep.md](h100_sweep.md)",
        "[h100_named.md](h100_named.md)",
    ):
        assert row in text, row
    assert "0/00" not in text
    # All of these cases have such widths.
    assert sweep.MISALIGNED not in text


def test_means_of_widths():
    wide = [{**sweep_case("0/02", name, 2.0), "H": 4768, "I": 3552} for name in ("forward", "dX")]
    half = {**sweep_case("0/03", "forward", 0.5), "H": 4768, "I": 3544}
    lines = list(markdown(sweep.MEANS, [*wide, half]))
    assert "| all | forward | 2 | 0 | 1.000 | 0.500 | 1 | 1 | 1 | - |" in lines
    assert f"| {sweep.ALIGNED} | forward | 1 | 0 | 2.000 | 2.000 | 0 | 0 | 0 | - |" in lines
    assert f"| {sweep.MISALIGNED} | forward | 1 | 0 | 0.500 | 0.500 | 1 | 1 | 1 | - |" in lines
    assert not any("routing" in line for line in lines)


def test_pages_of_one_part(page):
    results = page.parent / "results"
    names = sorted(path.name for path in results.glob("*.md"))
    assert names == ["h100.md", "h100_named.md", "h100_sweep.md"]
    text = (results / "h100_sweep.md").read_text()
    assert text.startswith("# h100: sweep\n")
    sizes = "1076 | 4776 | 3544 | 21 | 6 | 307"
    ms = "1.234 | 346"
    for row in (
        "date 2026-01-02, gpu NVIDIA H100",
        "limit_gb 60.0, repeated 0/03 T 1: 70 GB, failed 0/07: memory",
        "| all | forward+backward | 2 | 1 | 1.250 | 1.250 | 0 | 0 | 0 | 0 |",
        f"| 0/00 | uniform | {sizes} | {ms} | 1.50 (1.40-1.60) | {ms} | 1.25 (1.15-1.35) | 1.35 | 1030 | 1000 | 1.03 | 0.0100 / 0.0100 | 2 computed |",
        f"| 0/01 | zipf | {sizes} | {ms} | 0.96 (0.86-1.06) | {ms} | wrong | 1.35 | - | - | - | 0.0100 / 0.0266 | - |",
    ):
        assert row in text, row
    named = (results / "h100_named.md").read_text()
    ours = f"| odd | uniform | {sizes} | - | - | - | {ms} | 0.98 (0.88-1.08) | 1.35 |"
    assert ours in named
    assert " 0.0100 / nan | - |" in named


def test_a_plot_of_a_part_with_its_own_page(page):
    pytest.importorskip("matplotlib")
    assert (page.parent / "images" / "h100_sweep.png").read_bytes().startswith(b"\x89PNG")
    report.write(page.parent / "results", page)
    text = (page.parent / "results" / "h100_sweep.md").read_text()
    assert text.count("(../images/h100_sweep.png)") == 1


def test_points_of_a_plot():
    mpl = pytest.importorskip("matplotlib")
    mpl.use("agg")
    from matplotlib import pyplot as plt

    aligned = {**sweep_case("0/02", "forward", 2.0), "H": 4768, "I": 3552, "T": 7}
    figure = report.draw(report.PLOTS["sweep"], [*CASES["sweep"], aligned], plt)
    found = []
    for axes in figure.axes:
        points = {
            series.get_label(): [tuple(map(float, point)) for point in series.get_offsets()]
            for series in axes.collections
        }
        found.append((axes.get_title(), points))
    plt.close(figure)
    rows = pytest.approx(1076 * 6 / 21)
    narrow, wide = sweep.MISALIGNED, sweep.ALIGNED
    assert found == [
        (
            "forward: above 1 ours is faster",
            {narrow: [(rows, 1.5), (rows, 0.96)], wide: [(2.0, 2.0)]},
        ),
        ("forward+backward: above 1 ours is faster", {narrow: [(rows, 1.25)]}),
    ]


def test_the_facts_of_a_run_are_told_once(page):
    assert (page.parent / "results" / "h100.md").read_text().count("gpu NVIDIA H100") == 1


def test_a_part_without_a_result_has_no_table(tmp_path):
    (tmp_path / "results").mkdir()
    path = tmp_path / "performance.md"
    path.write_text(PAGE)
    report.write(tmp_path / "results", path)
    assert path.read_text() == PAGE


def test_every_part_has_tables():
    assert set(TABLES) == {"ceilings", "sweep", "named", "compiled", *map(part_of, RANKS), *PARTS}
