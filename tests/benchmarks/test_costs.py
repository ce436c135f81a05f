# SPDX-License-Identifier: Apache-2.0
"""The costs of expert parallelism: bytes add up, closed forms hold, measured rates come back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.expert_parallel import calibration, costs, simulate
from benchmarks.expert_parallel.costs import Costs, Layout, Machine, Rates
from benchmarks.expert_parallel.records import (
    BOTH,
    COMBINE,
    DISPATCH,
    EXPERTS,
    FEW_TOKENS,
    FORWARD,
    FUNCTIONAL,
    LINK,
    MAIN,
    NAMES,
    SYMMETRIC,
)  # fmt: skip
from benchmarks.suite import NAMED, SUITE, Shape
from testing import reference

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {shape.name: replace(shape, num_tokens=8192) for shape in (*SUITE, *NAMED)}
QWEN = SHAPES[MAIN]
MACHINE = Machine(host_size=8, within=400e9, between=50e9, memory=4e12)
RATES = Rates(0.8, 0.6, 3e-5, 4e-5, 650e12, 600e12)
WORLDS = (1, 2, 8, 16, 64)


def of(world_size, shape=QWEN, rates=RATES, machine=MACHINE, **layout):
    return Costs(Layout(shape, world_size, machine.host_size, **layout), machine, rates)


# Fill


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_fill_is_what_sampling_finds(name, world_size):
    shape = SHAPES[name]
    ids = reference.route("uniform", 8192, shape.num_experts, shape.top_k, torch.device("cpu"))
    ranks = ids.long() // (shape.num_experts // world_size)
    visits = torch.zeros(8192, world_size).scatter_(1, ranks, 1).sum(1)
    assert Layout(shape, world_size, 8).fill() == pytest.approx(visits.mean().item(), rel=0.01)


def test_fill_in_closed_form():
    # One expert of 4 on each of 4 ranks, 2 a token; all experts on a rank; all of them taken.
    assert Layout(Shape("", 1, 1, 1, 4, 2), 4, 8).fill() == pytest.approx(2)
    assert Layout(QWEN, 1, 8).fill() == 1
    assert Layout(Shape("", 1, 1, 1, 8, 8), 4, 8).fill() == 4
    # Two experts of 4 on each of 2 ranks: a pair lies on one rank in 2 of 6 cases.
    assert Layout(Shape("", 1, 1, 1, 4, 2), 2, 8).fill() == pytest.approx(2 - 1 / 3)


def test_hosts_are_visited_like_ranks_of_their_size():
    layout = Layout(QWEN, 64, 8)
    assert layout.fill(8) == pytest.approx(Layout(QWEN, 8, 8).fill())
    assert layout.fill(64) == 1


# Bytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("padded", [False, True])
def test_all_that_is_sent_is_received(name, world_size, padded):
    layout = Layout(SHAPES[name], world_size, 8, padded)
    assert sum(layout.peers) == world_size - 1
    # Rows to the others, and to itself.
    sent = layout.rows_to_a_rank * (sum(layout.peers) + 1)
    assert sent == pytest.approx(layout.received)
    filled = layout.shape.num_tokens * layout.fill()
    assert layout.received == pytest.approx(
        layout.shape.num_tokens * world_size if padded else filled
    )
    assert layout.message(with_ids=False) == layout.rows_to_a_rank * layout.row_bytes
    ids = layout.rows_to_a_rank * layout.slots * 6
    assert layout.message(with_ids=True) - layout.message(with_ids=False) == pytest.approx(ids)


def test_sizes_in_closed_form():
    layout = Layout(QWEN, 8, 8)
    assert layout.peers == (7, 0)
    assert Layout(QWEN, 64, 8).peers == (7, 56)
    assert layout.rows_memory == 8 * 8192 * 2048 * 2
    assert layout.pre_activation_memory == 8 * 8192 * 8 * 2 * 768 * 2
    assert layout.weight_bytes == 128 // 8 * 3 * 2048 * 768 * 2
    bounded = Layout(QWEN, 64, 8, capacity_factor=1.25)
    assert bounded.capacity == 1280
    assert bounded.slots == 2
    assert Layout(QWEN, 2, 8, capacity_factor=1.25).capacity == 8192
    assert costs.fsdp_bytes(layout, 1) == 0
    assert costs.fsdp_bytes(layout, 4) == pytest.approx(3 * 0.75 * layout.weight_bytes)


def test_no_more_is_sent_than_there_is_room():
    assert Layout(QWEN, 64, 8, capacity_factor=0.5).rows_to_a_rank == 512


# Times


def test_times_in_closed_form():
    rates = replace(RATES, dispatch=1.0, dispatch_seconds=0.0, forward=math.inf)
    machine = replace(MACHINE, memory=math.inf)
    two = of(2, rates=rates, machine=machine)
    assert two.dispatch == pytest.approx(two.layout.message(with_ids=True) / 400e9)
    assert two.experts(both=False) == 0
    # The slower link counts: 56 messages at 50 GB/s against 7 at 400.
    far = of(64, rates=rates, machine=machine)
    assert far.dispatch == pytest.approx(56 * far.layout.message(with_ids=True) / 50e9)
    fast = replace(machine, between=math.inf)
    near = of(64, rates=rates, machine=fast)
    assert near.dispatch == pytest.approx(7 * far.layout.message(with_ids=True) / 400e9)
    products = of(2, machine=machine)
    assert products.experts(both=True) == pytest.approx(18 * 8192 * 8 * 2048 * 768 / 600e12)
    assert products.communication(both=True) == pytest.approx(
        2 * (products.dispatch + products.combine) / products.block(both=True)
    )


def test_a_world_of_one_sends_nothing():
    assert of(1).link_seconds(is_dispatch=True) == 0
    assert of(1).layout.message(with_ids=False) * 0 == sum(of(1).layout.peers)


@pytest.mark.parametrize("part", ["dispatch", "combine"])
def test_times_are_monotonic(part):
    def time(costs):
        return getattr(costs, part)

    assert sorted(map(time, map(of, WORLDS))) == [time(of(w)) for w in WORLDS]
    for world_size in WORLDS[1:]:
        given = time(of(world_size))
        for faster in ("within", "between", "memory"):
            machine = replace(MACHINE, **{faster: 2 * getattr(MACHINE, faster)})
            assert time(of(world_size, machine=machine)) <= given
        assert time(of(world_size, padded=True)) >= given
        assert time(of(world_size, replace(QWEN, num_tokens=16384))) > given
        assert time(of(world_size, rates=replace(RATES, **{part: 0.9}))) < given


def test_overlap_gains_at_most_a_factor_of_two():
    for world_size in WORLDS[1:]:
        for both in (False, True):
            gain = of(world_size).overlapped(both)
            assert 1 <= gain <= 2
            share = of(world_size).communication(both)
            assert gain == pytest.approx(1 / max(share, 1 - share))
    assert of(8).recomputed > of(8).block(both=True)


# Calibration


def made_up(rates, machine, transport, names=NAMES, off=1.0):
    """Make the records of a run on two ranks whose times these rates give, exactly or off."""
    found = []
    for name in names:
        padded = transport == FUNCTIONAL
        costs_of = Costs(Layout(SHAPES[name], 2, 2, padded), machine, rates)
        wrong = 1.0 if name == MAIN else off
        link_bytes = costs_of.layout.message(with_ids=True)
        link_start = 1e-5
        times = {
            transport: 1.0,
            LINK: link_start + link_bytes / machine.within,
            f"{transport} {DISPATCH}": costs_of.dispatch * wrong,
            f"{transport} {COMBINE}": costs_of.combine * wrong,
        }
        few = {
            transport: 1.0,
            LINK: link_start,
            f"{transport} {DISPATCH}": rates.dispatch_seconds,
            f"{transport} {COMBINE}": rates.combine_seconds,
        }
        common = {"shape": name, "W": 2}
        for tokens, each, sent in ((FEW_TOKENS, few, 0), (8192, times, link_bytes)):
            found.append(
                {
                    **common, "what": "exchange", "T": tokens, "milliseconds": _milliseconds(each),
                    "bytes": {DISPATCH: sent, COMBINE: 1},
                }
            )  # fmt: skip
        for of_pass in (FORWARD, BOTH):
            both = of_pass == BOTH
            block = {transport: costs_of.block(both) * wrong, EXPERTS: costs_of.experts(both)}
            found.append(
                {
                    **common, "what": "block", "T": 8192, "pass": of_pass,
                    "milliseconds": _milliseconds(block),
                }
            )  # fmt: skip
    return found


def _milliseconds(seconds):
    return {name: [time * 1e3] * 3 for name, time in seconds.items()}


@pytest.mark.parametrize("transport", [SYMMETRIC, FUNCTIONAL])
def test_calibration_recovers_the_rates(transport):
    machine = replace(MACHINE, host_size=2, within=377e9)
    records = made_up(RATES, machine, transport)
    measured = calibration.Measured(records, MAIN)
    found_machine, found = calibration.calibrate(measured, QWEN, replace(machine, within=1.0))
    assert found_machine.within == pytest.approx(377e9)
    for field in Rates.__dataclass_fields__:
        assert getattr(found, field) == pytest.approx(getattr(RATES, field)), field
    cases = list(calibration.judge(records, MAIN, machine))
    assert len(cases) == 2 + 2 * 4
    assert all(abs(case.error) < 1e-9 for case in cases)


def test_too_short_a_dispatch_is_refused():
    machine = replace(MACHINE, host_size=2)
    measured = calibration.Measured(made_up(RATES, machine, SYMMETRIC), MAIN)
    measured.exchange[DISPATCH] = measured.overhead[DISPATCH]
    with pytest.raises(ValueError, match="qwen3-30b: expected dispatch to take longer than"):
        calibration.calibrate(measured, QWEN, machine)


@pytest.mark.parametrize(
    ("off", "last"),
    [
        (1.15, "all 10 are within 20%; calibrated on qwen3-30b"),
        (1.5, "8 of 10 are not within 20%; calibrated on qwen3-30b"),
    ],
)
def test_verdict(off, last, tmp_path, capsys):
    machine = replace(simulate.MACHINE, host_size=2)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"cases": made_up(RATES, machine, SYMMETRIC, off=off)}))
    assert simulate.main(["judge", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last
    assert f"{1 / off - 1:+.0%}" in next(line for line in lines if line.startswith("dsv3 dispatch"))


def test_rates_of_another_run(tmp_path, capsys):
    machine = replace(simulate.MACHINE, host_size=2)
    rates, run = tmp_path / "rates.json", tmp_path / "run.json"
    rates.write_text(json.dumps({"cases": made_up(RATES, machine, SYMMETRIC, (MAIN,))}))
    run.write_text(json.dumps({"cases": made_up(RATES, machine, SYMMETRIC, ("dsv3",))}))
    assert simulate.main(["judge", str(run), "--rates", str(rates)]) == 0
    assert "all 4 are within 20%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        simulate.main(["judge", str(run), "--rates", str(rates), "--calibrate", "dsv3"])
    assert "rates.json, got dsv3" in capsys.readouterr().err


def test_a_shape_that_was_not_measured_is_refused(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"cases": made_up(RATES, MACHINE, SYMMETRIC, ("dsv3",))}))
    with pytest.raises(SystemExit):
        simulate.main(["judge", str(file)])
    assert "--calibrate: expected one of ['dsv3'] of " in capsys.readouterr().err


def test_the_experts_of_other_models_come_out_within_a_fifth():
    """One GPU, measured: the speed of qwen3-30b gives the times of all models."""
    cases = [
        case
        for name in ("experts", "named")
        for case in json.loads((RESULTS / f"h200_{name}.json").read_text())["cases"]
        # Unless it has biases, or widths that no tensor core likes.
        if case["shape"] not in ("odd", "gpt-oss-120b biases") and case["routing"] == "uniform"
    ]
    shapes = {shape.name: shape for shape in (*SUITE, *NAMED)}
    speeds, _ = simulate._speeds_of_one_gpu(RESULTS, Layout(shapes[MAIN], 1, 1), simulate.MACHINE)
    rates = Rates(1, 1, 0, 0, *speeds)
    judged = set()
    for case in cases:
        if "moe_ops" not in case["milliseconds"]:
            continue
        computed = Costs(Layout(shapes[case["shape"]], 1, 1), simulate.MACHINE, rates)
        seconds = case["milliseconds"]["moe_ops"][1] / 1e3
        error = computed.experts(case["pass"] == BOTH) / seconds - 1
        assert abs(error) < calibration.WITHIN, (case["shape"], case["pass"], error)
        judged.add(case["shape"])
    assert len(judged) == 14


# The page


def test_the_page_has_what_the_program_prints():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    begin, end = (page.index(marker) for marker in simulate.MARKERS)
    shown = page[begin + len(simulate.MARKERS[0]) : end].strip()
    assert shown == "\n".join(simulate.plan()).strip()


def test_plan_writes_between_the_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *simulate.MARKERS, "after", ""]))
    simulate.main(["plan", "--write", str(page)])
    simulate.main(["plan"])
    text = page.read_text()
    assert text.startswith(f"before\n{simulate.MARKERS[0]}\n")
    assert text.endswith(f"{simulate.MARKERS[1]}\nafter\n")
    assert capsys.readouterr().out.strip() in text


def test_committed_measurements_take_the_place_of_assumptions(tmp_path):
    (tmp_path / "h200_experts.json").write_text((RESULTS / "h200_experts.json").read_text())
    _, before, rows = simulate.assumptions(tmp_path)
    assert before.dispatch == simulate.SHARE
    assert sum("assumed" in row["from"] for row in rows) == 2
    machine = replace(simulate.MACHINE, host_size=2, within=377e9)
    records = {"cases": made_up(RATES, machine, SYMMETRIC)}
    (tmp_path / simulate.MEASURED).write_text(json.dumps(records))
    found, after, rows = simulate.assumptions(tmp_path)
    assert found.host_size == 8
    assert found.within == pytest.approx(377e9)
    assert after.dispatch == pytest.approx(RATES.dispatch)
    assert not any("assumed" in row["from"] for row in rows)
