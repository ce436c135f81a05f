# SPDX-License-Identifier: Apache-2.0
"""Tables and plots show the benchmarks' results."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.report.columns import Column, Table, at, keys, markdown, median, ratio, spread

ROOT = Path(__file__).resolve().parents[2]
PAGE = "\n".join(["before", *report.CARD_MARKERS, "after", ""])
PART_FACTS: dict[str, dict[str, Any]] = {
    "experts": {"grouped_mm": "transformers 5.17.0"},
    "experts-peers": {"present": {}, "absent": {"liger": "no module liger_kernel"}},
}
ENVIRONMENT = {"date": "2026-01-02", "gpu": "NVIDIA H200", "kernel_sha256": "a" * 64}


def gemm_case(name, ratio, **more):
    median = {"moe_ops": [1.0, 1.1, 1.2], "torch": [1.2, 1.3, 1.4]}
    return {
        "shape": "olmoe",
        "routing": "uniform",
        "projection": "up",
        "pass": name,
        "milliseconds": median,
        "ratio": {
            "torch": [ratio - 0.1, ratio, ratio + 0.1],
            "permuted": [1.0, 1.07, 1.1],
        },
        "tflops": {"moe_ops": 654.3},
        "of_dense_ceiling": 0.87,
        **more,
    }


def experts_case(name, ratio, **more):
    return {
        "shape": "olmoe",
        "routing": "uniform",
        "pass": name,
        "errors": {"moe_ops": 0.01, "eager": 0.01, "compiled": 0.01},
        "milliseconds": {"moe_ops": [9.0, 9.126, 9.2]},
        "ratio": ratio,
        "tflops": {"moe_ops": 611.6},
        "of_floor": 1.347,
        **more,
    }


def block_case(name, milliseconds, ratio, **more):
    return {
        "shape": "olmoe",
        "pass": name,
        "errors": {"moe_ops": 0.01, "loop": 0.01},
        "milliseconds": {
            "moe_ops": [milliseconds] * 3,
            "loop": [20.0 * milliseconds] * 3,
            "unsloth": [3.0] * 3,
        },
        "ratio": ratio,
        "of_floor": 1.35,
        **more,
    }


def kernel_case(shape, kernel, nth, milliseconds, share, **more):
    case = {"shape": shape, "kernel": kernel, "nth": nth, "milliseconds": milliseconds}
    return {**case, "share": share, **more}


CASES = {
    "ceilings": [{"when": "start", "dense_tflops": 780.0, "copy_tbs": 4.2, "read_tbs": 4.4}],
    "gemm": [
        gemm_case("forward", 1.25),
        gemm_case("dX", 0.8),
        gemm_case("dW", 1.0) | {"ratio": {}, "wrong": ["moe_ops"], "tflops": {}},
    ],
    "rows": [
        {
            "shape": "olmoe",
            "op": "permute",
            "milliseconds": {},
            "ratio": {"torch": [1.1, 1.2, 1.3]},
            "tbs": 3.612,
            "of_copy_ceiling": 0.86,
        }
    ],
    "routing": [
        {
            "op": "routing_indices",
            "E": 128,
            "slots": 131072,
            "milliseconds": {"moe_ops": [0.01, 0.0123, 0.02]},
            "ratio": {"eager": [3.0, 4.0, 5.0]},
        },
        {
            "op": "topk_routing",
            "T": 16,
            "E": 8,
            "K": 2,
            "pass": "forward",
            "milliseconds": {"moe_ops": [0.01, 0.02, 0.03], "torch": [0.02, 0.04, 0.06]},
            "ratio": {"torch": [1.9, 2.0, 2.1]},
        },
    ],
    "decode": [
        {
            "shape": "qwen3-30b",
            "projection": "up",
            "T": 8,
            "milliseconds": {"moe_ops": [0.1, 0.1, 0.1]},
            "ratio": {"of read": [1.1, 1.2, 1.3]},
            "floor_milliseconds": 0.08,
            "of_floor": 1.25,
        }
    ],
    "dispatch": [
        {
            "call": "permute",
            "kernels": 1,
            "microseconds": {name: [5.0, 6.0, 7.0] for name in ("moe_ops", "launches", "bare op")},
            "of_bare_op": 2.5,
        }
    ],
    "first-call": [
        {
            "shape": "olmoe",
            "triton_cache": "empty",
            "seconds": {"torch alone": 2.5, "first": 12.5, "second": 0.01},
        }
    ],
    "experts": [
        experts_case("forward", {"eager": [1.3, 1.4, 1.5], "compiled": [1.2, 1.23, 1.3]}),
        experts_case(
            "forward+backward",
            {"eager": [1.3, 1.4, 1.5], "recompute": [1.1, 1.11, 1.12]},
            wrong=["compiled"],
            mib={"moe_ops": {"kept": 388.4, "output": 64.0, "peak": 2000.6, "gradients": 1000.0}},
        ),
        experts_case(
            "forward+backward",
            {"compiled, dynamic": [1.9, 2.0, 2.1]},
            errors={"moe_ops": 0.01, "compiled, dynamic": 0.01},
        ),
    ],
    "experts-kernels": [
        kernel_case("olmoe", "gemm", 1, 1.0, 0.1, of_floor=1.25),
        kernel_case("olmoe", "gemm", 2, 0.5, 0.05),
        kernel_case("large", "gemm", 1, 3.0, 0.2),
        kernel_case("large", "rows", 1, 2.0, 0.15),
        kernel_case("large", "gemm", 2, 1.0, 0.1),
    ],
    "experts-first-call": [
        {
            "shape": "large",
            "triton_cache": "warm",
            "seconds": {"torch alone": 2.5, "first": 1.5, "second": 0.02},
        }
    ],
    "experts-peers": [
        {
            "shape": "olmoe",
            "peer": "scattermoe",
            "pass": "forward+backward",
            "milliseconds": {"moe_ops": [7.0, 7.5, 8.0], "scattermoe": [11.0, 11.25, 12.0]},
            "ratio": {"scattermoe": [1.4, 1.5, 1.6]},
            "mib": {"moe_ops": {"kept": 388.0, "peak": 2000.0}, "scattermoe": {"kept": 1378.0}},
            "first_call_seconds": 6.5,
        }
    ],
    "lora": [
        {
            "shape": "qwen3-30b",
            "layout": "PEFT",
            "pass": "forward+backward",
            "errors": {"moe_ops": 0.01, "eager": 0.01, "compiled": 0.01},
            "milliseconds": {"moe_ops": [7.0, 7.5, 8.0]},
            "ratio": {"eager": [1.3, 1.4, 1.5], "checkpoint": [0.9, 1.0, 1.1]},
            "wrong": ["compiled"],
            "mib": {"moe_ops": {"kept": 700.4, "output": 64.0, "peak": 1500.0, "gradients": 90.0}},
        }
    ],
    "blocks": [
        block_case("forward", 2.5, {"loop": [7.9, 8.0, 8.1], "compat: loop": [6.9, 7.0, 7.1]}),
        block_case(
            "forward+backward",
            9.0,
            {"loop": [4.9, 5.0, 5.1]},
            mib={"moe_ops": {"kept": 388.4, "peak": 2000.6}},
        ),
        block_case("forward", 2.5, {"unsloth": [1.4, 1.5, 1.6]}, peer="unsloth"),
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "performance.md").write_text(PAGE)
    return tmp_path


def write_cuda(folder):
    for part, cases in CASES.items():
        facts = {**ENVIRONMENT, **PART_FACTS.get(part, {}), "part": part}
        content = {"environment": facts, "cases": cases}
        file = folder / "results" / f"h200_{part.replace('-', '_')}.json"
        file.write_text(json.dumps(content))


def render(folder, name="h200.md"):
    """Write all pages and return the text of a page of tables."""
    report.write(folder / "results", folder / "performance.md")
    return (folder / "results" / name).read_text()


def test_without_results_nothing_is_written(folder):
    report.write(folder / "results", folder / "performance.md")
    assert (folder / "performance.md").read_text() == PAGE
    assert not list((folder / "results").glob("*.md"))
    assert not (folder / "images").exists()


def test_cuda_tables(folder):
    write_cuda(folder)
    text = render(folder)
    assert text.startswith("# h200\n")
    for row in (
        "| start | 780.0 | 4.2 | 4.4 |",
        "| olmoe | uniform | up | forward | 654 | 0.87 | 1.25 (1.15-1.35) | - | - | 7% |",
        "| olmoe | uniform | up | dW | - | 0.87 | wrong | wrong | wrong | - |",
        "| forward | 1 | 1.250 | 1.250 | - | - | - | - |",
        "| dW | 1 | - | - | - | - | - | - |",
        "| olmoe | permute | 3.61 | 0.86 | 1.20 (1.10-1.30) | - |",
        "| 128 | 131072 | 12.3 | - | 4.00 (3.00-5.00) | - | - | - |",
        "| 16 | 8 | 2 | forward | 20.0 | 40.0 | 2.00 (1.90-2.10) |",
        "| qwen3-30b | up | 8 | 100.0 | - | - | 80.0 | - | 1.20 (1.10-1.30) | 1.25 |",
        "| permute | 1 | 6.0 | 6.0 | 6.0 | 0.50 | 2.50 |",
        "| olmoe | empty | 2.5 | 12.5 | 0.01 |",
        "| forward | 9.13 | 612 | 1.40 (1.30-1.50) | 1.23 (1.20-1.30) | - | - | 1.35 | - | - |",
        "| forward+backward | 9.13 | 612 | 1.40 (1.30-1.50) | wrong | 1.40 | - | 1.35 | - | 1.11 (",
        "| forward+backward | 9.13 | 612 | - | - | - | 2.00 (1.90-2.10) | 1.35 | - | - |",
        "| olmoe | uniform | moe_ops | 388 | 64 | 2001 | 1000 |",
        "| gemm 1 | 1.000 (10%, 1.25x) | 3.000 (20%) |\n| rows 1 | - | 2.000 (15%) |\n| gemm 2 |",
        "| large | warm | 2.5 | 1.5 | 0.02 |",
        "| scattermoe | forward+backward | 11.25 | 7.50 | 1.50 (1.40-1.60) | 1378 / 388 | - / 2000 |",
        "| qwen3-30b | PEFT | forward+backward | 7.50 | - | - | 1.40 (1.30-1.50) | wrong | - | 1.20 | - | 1.00 (",
        "| qwen3-30b | PEFT | moe_ops | 700 | 64 | 1500 | 90 |",
        "| olmoe | forward | 8.00 (7.90-8.10) | - | - | - | 7.00 (6.90-7.10) | - | - | - | 1.35 |",
        "| olmoe | moe_ops | 2.50 | 6.50 | 9.00 | 388 | 2001 |",
        "| olmoe | loop | 50.00 | 130.00 | 180.00 | - | - |",
        "| olmoe | unsloth | forward | 3.00 | 2.50 | - | 1.50 (1.40-1.60) | - |",
        "grouped_mm transformers 5.17.0",
        "absent liger: no module liger_kernel",
    ):
        assert row in text
    assert text.count("gpu NVIDIA H200") == 1
    assert render(folder) == text


def test_facts_of_another_run_are_told(folder):
    write_cuda(folder)
    file = folder / "results" / "h200_rows.json"
    file.write_text(file.read_text().replace("2026-01-02", "2026-03-04"))
    text = render(folder)
    assert text.count("date 2026-03-04") == 1
    assert text.count("date 2026-01-02") == 2


def test_plots(folder):
    pytest.importorskip("matplotlib")
    write_cuda(folder)
    text = render(folder)
    for name in ("h200_gemm.png", "h200_rows.png", "h200_experts.png", "h200_blocks.png"):
        assert (folder / "images" / name).read_bytes().startswith(b"\x89PNG")
        assert f"(../images/{name})" in text


def test_cpu_tables(folder):
    case: dict[str, Any] = {"dtype": "bf16", "counts": "new", "pass": "dX", "E": 8, "H": 256}
    cases = [case | {"ratio": [1.0, ratio, 2.0]} for ratio in (0.8, 1.25)]
    cases.append(case | {"wrong": ["moe_ops"]})
    file = folder / "results" / "cpu_gemm_bf16.json"
    file.write_text(json.dumps({"environment": {"date": "2026-01-02"}, "cases": cases}))
    assert "| bf16 | new | dX | 2 | 1.000 | 1.000 | 0.800 | 1 |" in render(folder, "cpu.md")


def test_a_table_is_a_list_of_columns():
    table = Table(
        about="What it shows.",
        columns=(
            *keys("shape"),
            Column("ms", median("milliseconds", "moe_ops"), ".1f"),
            Column("MiB", at("mib", "moe_ops", "peak"), lambda mib: f"{mib / 1024:.1f} GiB"),
            Column("ratio", ratio("torch", of_all=False), spread),
        ),
        rows=lambda cases: cases[1:],
    )
    full = {
        "shape": "olmoe",
        "milliseconds": {"moe_ops": [1.0, 2.0, 3.0]},
        "mib": {"moe_ops": {"peak": 2048}},
        "errors": {"torch": 0.01},
        "ratio": {"torch": [1.0, 1.2, 1.3]},
    }
    wrong = {**full, "milliseconds": {}, "ratio": {}, "wrong": ["torch"]}
    not_compared = {**wrong, "mib": {}, "errors": {}}
    assert list(markdown(table, [{}, full, wrong, not_compared])) == [
        "What it shows.\n",
        "| shape | ms | MiB | ratio |",
        "| --- | --- | --- | --- |",
        "| olmoe | 2.0 | 2.0 GiB | 1.20 (1.00-1.30) |",
        "| olmoe | - | 2.0 GiB | wrong |",
        "| olmoe | - | - | - |",
        "",
    ]


def test_a_table_without_rows():
    table = Table(about="What it shows.", columns=keys("shape"))
    assert list(markdown(table, [])) == ["What it shows.\n", "| shape |", "| --- |", ""]
    assert not list(markdown(dataclasses.replace(table, skip_empty=True), []))


def test_a_key_that_every_record_has():
    with pytest.raises(KeyError, match="shape"):
        list(markdown(Table(columns=keys("shape")), [{}]))


def drawn(part):
    """Return for each panel its title, label and ticks, and each series' bars with their labels."""
    mpl = pytest.importorskip("matplotlib")
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure = report.draw(report.PLOTS[part], CASES[part], plt)
    panels = []
    for axes in figure.axes:
        told = [text.get_text() for text in axes.texts]
        series = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
        ticks = [tick.get_text() for tick in axes.get_xticklabels()]
        panels.append((axes.get_title(), axes.get_ylabel(), ticks, series, told))
    size = tuple(figure.get_size_inches())
    plt.close(figure)
    return size, panels


def test_plot_of_gemm():
    size, panels = drawn("gemm")
    assert size == (9, 3)
    assert panels == [
        (
            "up projection: above 1 ours is faster",
            "torch._grouped_mm / ours",
            ["olmoe"],
            {"forward": [1.25], "dX": [0.8], "dW": [0.0]},
            ["1.25", "0.80", "wrong"],
        )
    ]


def test_plot_of_rows():
    size, panels = drawn("rows")
    assert size == (9, 3.5)
    title = "bytes that must be moved over time, 1 is a device copy"
    label = "fraction of copy bandwidth"
    assert panels == [(title, label, ["olmoe"], {"permute": [0.86]}, ["0.86"])]


def test_plot_of_experts():
    size, panels = drawn("experts")
    assert size == (9, 6)
    # The panels share their x axis, and the lowest names the shapes.
    both = [
        ("compiled", [], {"forward": [1.23], "forward+backward": [0.0]}, ["1.23", "wrong"]),
        ("eager", ["olmoe"], {"forward": [1.4], "forward+backward": [1.4]}, ["1.40", "1.40"]),
    ]
    assert panels == [
        (
            f"transformers' grouped_mm, {peer}: above 1 ours is faster",
            "grouped_mm / ours",
            ticks,
            series,
            told,
        )
        for peer, ticks, series, told in both
    ]


def test_plot_of_blocks():
    size, panels = drawn("blocks")
    assert size == (9, 3)
    assert panels == [
        (
            "transformers' loop over experts: above 1 ours is faster",
            "transformers / ours",
            ["olmoe"],
            {"forward": [8.0], "forward+backward": [5.0]},
            ["8.00", "5.00"],
        )
    ]


def test_a_plot_without_cases():
    plt = pytest.importorskip("matplotlib.pyplot")
    skewed = [{**case, "routing": "zipf"} for case in CASES["gemm"]]
    assert report.draw(report.PLOTS["gemm"], skewed, plt) is None


def test_the_pages_are_what_the_committed_results_give(tmp_path):
    """They are so byte for byte, but for the images, since matplotlib's pixels may change."""
    page = ROOT / "docs" / "performance.md"
    shutil.copy(page, tmp_path)
    shutil.copytree(page.parent / "images", tmp_path / "images")
    report.write(ROOT / "benchmarks" / "results", tmp_path / page.name)
    assert (tmp_path / page.name).read_bytes() == page.read_bytes()
    written, committed = (
        {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
        for folder in (tmp_path, page.parent)
    )
    assert written == committed


def test_page_without_markers(folder):
    write_cuda(folder)
    (folder / "performance.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no <!-- cards: begin -->"):
        render(folder)


def test_cpu_tables_take_the_routings_of_a_shape_together(tmp_path):
    cases = []
    for num_rows, routing, middle in (
        (1024, "uniform", 0.8), (1024, "skewed", 1.25), (4096, "uniform", 0.9), (4096, "skewed", 0.9),
    ):  # fmt: skip
        shape = {"E": 8, "N": 512, "D": 256, "R": num_rows, "routing": routing}
        case = {"dtype": "bf16", "counts": "same", "pass": "dX", "ratio": [0.0, middle, 2.0]}
        cases.append({**shape, **case})
    result = {"environment": {"date": "2026-01-02"}, "cases": cases}
    (tmp_path / "cpu_gemm_bf16.json").write_text(json.dumps(result), encoding="utf-8")
    table = "\n".join(report.cpu_page(tmp_path))
    assert "| bf16 | same | dX | 4 | 0.949 | 0.900 | 0.800 | 1 |" in table
