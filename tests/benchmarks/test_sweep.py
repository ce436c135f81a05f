# SPDX-License-Identifier: Apache-2.0
"""The sweep over drawn shapes: its flow on a CPU, and how a run goes on."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import suite
from benchmarks.cuda import __main__ as cuda
from benchmarks.cuda import ahead, share, sweep, sweep_file
from benchmarks.cuda.experts import BOTH, COMPILED, EAGER, FORWARD, PASSES, ROOT
from benchmarks.cuda.timing import OURS, Bench
from benchmarks.draws import Draw, num_bytes
from benchmarks.timing import write

TINY = suite.TINY_SUITE[0]
GPT_OSS = replace(TINY, name="gpt-oss", is_gpt_oss=True)
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.4}
FACTS = {
    "gpu": "NVIDIA H200",
    "dtype": "bfloat16",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "kernel_sha256": "a" * 64,
    "limit_gb": 60.0,
    "part": "sweep",
}


class Bf16Bench(Bench):
    """torch compiles grouped_mm in bf16 alone."""

    dtype = torch.bfloat16


def bench(kind=Bench):
    return kind(torch.device("cpu"), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


def facts(**more):
    return {**FACTS, "repeated": [], **more}


# One shape


@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_a_shape_has_a_record_of_each_pass(shape, routing):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    records = sweep.run_shape(bench(), Draw(shape, routing), gpu="H100")
    json.dumps(records, allow_nan=False)
    assert [record["pass"] for record in records] == list(PASSES)
    for record in records:
        assert "wrong" not in record, record
        assert set(record["errors"]) == set(record["milliseconds"]) == {OURS, EAGER}
        assert [record[key] for key in "THIEK"] == [12, 32, 16, 4, 2]
        assert (record["shape"], record["routing"]) == (shape.name, routing)
    assert "configs" not in records[0]
    told = records[1]["configs"]
    assert set(told) == {
        f"{projection} {kind}"
        for projection in ("up", "down")
        for kind in ("forward", "backward_dX", "backward_dW")
    }
    assert all(text.split(", ")[0] in {"computed", "shipped", "tuned"} for text in told.values())


@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
def test_compiled_grouped_mm_is_right(shape):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    for record in sweep.run_shape(bench(Bf16Bench), Draw(shape, "zipf"), "aot_eager"):
        assert "wrong" not in record, record
        assert set(record["ratio"]) == {COMPILED}


# A run


def record(name, shape="0/00", routing="uniform", ratio=1.5, **more):
    sizes = dict(zip("THIEK", (12, 32, 16, 4, 2), strict=True))
    of_pass = {"pass": name, "milliseconds": {OURS: [1.0] * 3}, "ratio": {EAGER: [ratio] * 3}}
    return {"shape": shape, "routing": routing, **sizes, **of_pass, **more}


def both(draw, **more):
    return [record(name, draw.shape.name, draw.routing, **more) for name in PASSES]


DRAWS = [Draw(replace(TINY, name=f"0/{i:02}"), "uniform") for i in range(5)]


@pytest.fixture
def measured(monkeypatch):
    """Names of the shapes that were measured, by a function in place of the measuring."""
    names = []

    def run_shape(bench, draw):
        names.append(draw.shape.name)
        return both(draw)

    monkeypatch.setattr(sweep, "run_shape", run_shape)
    return names


def test_a_run_goes_on_where_the_last_one_ended(tmp_path, measured):
    path = tmp_path / "h200_sweep.json"
    results = sweep_file.Results(path, facts())
    results.add(DRAWS[1], both(DRAWS[1]))
    # Cut short between the passes.
    results.add(DRAWS[2], both(DRAWS[2])[:1])
    again = sweep_file.Results(path, facts())
    assert sweep.run(bench(), DRAWS, again, math.inf, 0) == []
    assert measured == ["0/00", "0/02", "0/03", "0/04"]
    found = json.loads(path.read_text())
    assert found["environment"] == facts()
    assert {case["shape"] for case in found["cases"]} == {draw.shape.name for draw in DRAWS}
    assert len(found["cases"]) == 10
    sweep.run(bench(), DRAWS, sweep_file.Results(path, facts()), math.inf, 0)
    assert len(measured) == 4


def test_a_run_stops_at_its_deadline(tmp_path, measured, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(sweep, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    results = sweep_file.Results(tmp_path / "h200_sweep.json", facts())
    left = sweep.run(bench(), DRAWS, results, 4, 0)
    assert measured == ["0/00", "0/01"]
    assert left == ["0/02", "0/03", "0/04"]


def test_each_batch_is_compiled_before_it_is_measured(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 85e9))
    asked = []

    def compile_batch(jobs, processes, free_bytes, until):
        asked.append((list(jobs), processes, free_bytes, len(measured)))
        run, job_bytes = jobs["0/00"] if "0/00" in jobs else jobs["0/04"]
        assert run.func is sweep.compile_shape
        assert job_bytes == sweep.MARGIN * num_bytes(TINY)

    on_gpu = replace(bench(), device=torch.device("cuda"))
    results = sweep_file.Results(tmp_path / "h200_sweep.json", facts())
    assert sweep.run(on_gpu, DRAWS, results, math.inf, 2, compile_batch) == []
    names = [draw.shape.name for draw in DRAWS]
    assert asked == [(names[:4], 2, 80e9, 0), (names[4:], 2, 80e9, 4)]
    assert measured == names


def test_a_shape_that_fails_is_told_and_tried_again(tmp_path, measured, monkeypatch):
    path = tmp_path / "h200_sweep.json"
    right = sweep.run_shape

    def fail(bench, draw):
        if draw.shape.name == "0/01":
            raise RuntimeError("out of memory\nand more")
        return right(bench, draw)

    monkeypatch.setattr(sweep, "run_shape", fail)
    sweep.run(bench(), DRAWS[:3], sweep_file.Results(path, facts()), math.inf, 0)
    environment = json.loads(path.read_text())["environment"]
    assert environment["failed"] == {"0/01": "RuntimeError: out of memory"}
    assert measured == ["0/00", "0/02"]
    monkeypatch.setattr(sweep, "run_shape", right)
    sweep.run(bench(), DRAWS[:3], sweep_file.Results(path, facts()), math.inf, 0)
    assert measured == ["0/00", "0/02", "0/01"]
    # A run of other shapes keeps what it does not try again.
    monkeypatch.setattr(sweep, "run_shape", fail)
    fresh = tmp_path / "fresh" / path.name
    sweep.run(bench(), DRAWS[:3], sweep_file.Results(fresh, facts()), math.inf, 0)
    sweep.run(bench(), DRAWS[3:4], sweep_file.Results(fresh, facts()), math.inf, 0)
    assert set(json.loads(fresh.read_text())["environment"]["failed"]) == {"0/01"}
    assert "failed" not in json.loads(path.read_text())["environment"]


@pytest.mark.parametrize("key", sweep_file.SAME)
def test_results_of_another_kind_are_not_mixed(tmp_path, key):
    path = tmp_path / "h200_sweep.json"
    sweep_file.Results(path, facts()).add(DRAWS[0], both(DRAWS[0]))
    with pytest.raises(ValueError, match=f"is of {key} "):
        sweep_file.Results(path, facts(**{key: "another"}))


def test_repeated_draws_of_every_seed_are_listed(tmp_path):
    path = tmp_path / "h200_sweep.json"
    sweep_file.Results(path, facts(repeated=["0/03 T 1: 70 GB"])).add(DRAWS[0], both(DRAWS[0]))
    for _ in range(2):
        results = sweep_file.Results(path, facts(repeated=["1/07 T 2: 80 GB"]))
        results.write()
    found = json.loads(path.read_text())["environment"]["repeated"]
    assert found == ["0/03 T 1: 70 GB", "1/07 T 2: 80 GB"]


@pytest.mark.parametrize(
    "names", [["0/09", "0/10", "0/100", "1/00"], ["gpt-oss-120b", "granite", "odd", "tiny"]]
)
def test_the_file_is_in_the_order_of_the_shapes(tmp_path, names):
    results = sweep_file.Results(tmp_path / "h200_sweep.json", facts())
    for name in names[::-1]:
        draw = Draw(replace(TINY, name=name), "uniform")
        results.add(draw, both(draw))
    cases = json.loads(results.path.read_text())["cases"]
    found = [(case["shape"], case["pass"]) for case in cases]
    assert found == [(name, of_pass) for name in names for of_pass in PASSES]


def test_the_summary_has_the_mean_and_the_least():
    records = [
        record(name, shape, ratio=ratio)
        for shape, ratio in (("a", 2.0), ("b", 0.5), ("c", 1.0))
        for name in PASSES
    ]
    records.append(record(BOTH, "d", wrong=[OURS]) | {"ratio": {}})
    assert list(sweep_file.summary(records)) == [
        f"{name}: 3 shapes, geometric mean 1.000, below 1: 1, least: b 0.50, c 1.00, a 2.00"
        for name in PASSES
    ]


def with_peaks(shape, ours, theirs):
    return record(BOTH, shape, mib={OURS: {"peak": ours}, COMPILED: {"peak": theirs}})


def test_the_summary_counts_the_peaks_that_are_too_high():
    """1.02 times the peer's and 16 MiB are allowed, and what the CPU has no number of is not told."""
    records = [
        with_peaks("allowed", 1036.0, 1000.0),
        with_peaks("large", 1500.0, 1000.0),
        with_peaks("small", 36.5, 20.0),
        with_peaks("least", 1036.1, 1000.0),
        record(BOTH, "alone", mib={OURS: {"peak": 9.0}}),
        record(BOTH, "of a CPU", mib={OURS: {}, COMPILED: {}}),
        record(FORWARD, "allowed"),
    ]
    *_, told = sweep_file.summary(records)
    assert told == (
        "peak: 3 of 4 shapes exceed 1.02x of the peer's plus 16 MiB, most: small 1.82x "
        "(36 to 20 MiB), large 1.50x (1500 to 1000 MiB), least 1.04x (1036 to 1000 MiB)"
    )
    *_, told = sweep_file.summary(records[:1])
    assert told == "peak: 0 of 1 shapes exceed 1.02x of the peer's plus 16 MiB"


# Several GPUs


@pytest.fixture
def halves(tmp_path):
    """Files of two GPUs of a host, of which the first measured the first and the last shape."""
    paths = []
    for name, draws, clock in (("0", [DRAWS[4], DRAWS[0]], 345), ("1", DRAWS[1:4], 1980)):
        path = tmp_path / name / "h200_sweep.json"
        more = {"clock now": f"{clock} MHz", "ceilings": {"dense_tflops": float(clock)}}
        results = sweep_file.Results(path, facts(**more, repeated=[f"0/0{name}"]))
        for draw in draws:
            results.add(draw, both(draw, errors={OURS: float(name)}, configs={"up": "computed"}))
        paths.append(path)
    return paths


def change(path, **facts):
    found = json.loads(path.read_text())
    found["environment"] |= facts
    path.write_text(json.dumps(found))


def test_what_two_gpus_measured_is_joined(tmp_path, halves):
    change(halves[1], failed={"0/07": "why"})
    path = tmp_path / "h200_sweep.json"
    records = sweep_file.join(halves, path)
    found = json.loads(path.read_text())
    assert found["environment"] == {
        **FACTS,
        "clock now": ["345 MHz", "1980 MHz"],
        "ceilings": {"dense_tflops": [345.0, 1980.0]},
        "gpus of one host": 2,
        "repeated": ["0/00", "0/01"],
        "failed": {"0/07": "why"},
    }
    assert found["cases"] == records
    of_halves = [json.loads(half.read_text())["cases"] for half in halves]
    assert [case["shape"] for case in records] == [d.shape.name for d in DRAWS for _ in PASSES]
    assert all(case in of_halves[0] + of_halves[1] for case in records)
    assert len(records) == sum(map(len, of_halves))


def test_what_a_later_run_measured_is_not_missing(tmp_path, halves):
    """A shape that failed in the run that measured a pass of it stays told."""
    why = "TimeoutError: no time"
    measured, failing, never, nowhere = (*(draw.shape.name for draw in DRAWS[:2]), "0/07", "0/08")
    change(halves[1], failed={measured: why, failing: why, never: why})
    change(halves[0], **{sweep_file.LEFT_OUT: [never, nowhere]})
    path = tmp_path / "h200_sweep.json"
    sweep_file.join(halves, path, gpus=1)
    environment = json.loads(path.read_text())["environment"]
    assert environment["failed"] == {failing: why, never: why}
    assert environment[sweep_file.LEFT_OUT] == [nowhere]
    assert environment["gpus of one host"] == 1


def test_cases_without_shapes_are_not_joined(tmp_path):
    file = tmp_path / "h200_model.json"
    write(file, {"gpu": "H200"}, [{"tokens": 64}])
    with pytest.raises(ValueError, match="its cases have no shapes"):
        sweep_file.join([file], tmp_path / "joined.json")


def test_peers_of_one_shape_are_joined(tmp_path):
    files = [tmp_path / name / "h200_experts_peers.json" for name in "abc"]
    for file, peer in zip(files, ("sonicmoe", "liger", "liger"), strict=True):
        write(file, {"gpu": "H200"}, [{"shape": "olmoe", "peer": peer}])
    path = tmp_path / "h200_experts_peers.json"
    assert [case["peer"] for case in sweep_file.join(files[:2], path)] == ["sonicmoe", "liger"]
    with pytest.raises(ValueError, match="several files have liger olmoe"):
        sweep_file.join(files, path)


def test_what_a_later_run_measured_of_a_peer_is_not_missing(tmp_path):
    files = [tmp_path / name / "h200_experts_peers.json" for name in "ab"]
    labels = ["sonicmoe olmoe", "liger olmoe"]
    told = {"failed": {labels[0]: "why"}, sweep_file.LEFT_OUT: labels[1:]}
    write(files[0], {**told, sweep_file.ENDED_AFTER: labels[0]}, [])
    write(files[1], {sweep_file.LEFT_OUT: labels[1:]}, [{"shape": "olmoe", "peer": "sonicmoe"}])
    path = tmp_path / "h200_experts_peers.json"
    sweep_file.join(files, path)
    environment = json.loads(path.read_text())["environment"]
    assert environment == {
        "gpus of one host": 2,
        sweep_file.ENDED_AFTER: labels[:1],
        sweep_file.LEFT_OUT: labels[1:],
    }


def test_libraries_that_one_run_lacked_are_not_absent(tmp_path):
    files = [tmp_path / name / "h200_experts_peers.json" for name in "abc"]
    lacks = "no module"
    versions = ({"sonicmoe": "0.1"}, {"sonicmoe": "0.1", "liger": "0.8"}, {"sonicmoe": "0.2"})
    for file, present in zip(files, versions, strict=True):
        absent = {name: lacks for name in ("liger", "unsloth") if name not in present}
        case = {"shape": "olmoe", "peer": file.parent.name}
        write(file, {"present": present, "absent": absent}, [case])
    path = tmp_path / "h200_experts_peers.json"
    sweep_file.join(files[:2], path)
    environment = json.loads(path.read_text())["environment"]
    assert environment["present"] == versions[1]
    assert environment["absent"] == {"unsloth": lacks}
    with pytest.raises(ValueError, match=r"the files differ in sonicmoe: 0\.1, 0\.2"):
        sweep_file.join(files[1:], path)


def test_what_another_host_measured_is_joined(tmp_path, halves):
    joined = tmp_path / "joined" / "h200_sweep.json"
    sweep_file.join(halves, joined)
    found = json.loads(halves[0].read_text())
    other = tmp_path / "2" / "h200_sweep.json"
    cases = [{**found["cases"][0], "shape": "0/47"}]
    write(other, {**found["environment"], "clock now": "1200 MHz"}, cases)
    path = tmp_path / "h200_sweep.json"
    sweep_file.join([joined, other], path, gpus=1)
    environment = json.loads(path.read_text())["environment"]
    assert environment["gpus of one host"] == [2, 1]
    assert environment["clock now"] == ["345 MHz", "1980 MHz", "1200 MHz"]
    assert environment["ceilings"] == {"dense_tflops": [345.0, 1980.0, 345.0]}


@pytest.mark.parametrize("key", ["gpu", "kernel_sha256", "torch", "part"])
def test_what_was_measured_otherwise_is_not_joined(tmp_path, halves, key):
    change(halves[1], **{key: "another"})
    with pytest.raises(ValueError, match=f"the files differ in {key}: .*, another"):
        sweep_file.join(halves, tmp_path / "h200_sweep.json")
    assert not (tmp_path / "h200_sweep.json").exists()


def test_a_shape_of_two_files_is_not_joined(tmp_path, halves):
    with pytest.raises(ValueError, match="several files have 0/00, 0/04"):
        sweep_file.join([*halves, halves[0]], tmp_path / "h200_sweep.json")


def test_the_command_joins_files(tmp_path, halves, monkeypatch, capsys):
    def call(*paths, gpus=1):
        options = [f"--results={tmp_path / 'results'}", f"--gpus={gpus}", "--join"]
        options += map(str, paths)
        monkeypatch.setattr(sys, "argv", ["sweep", *options])
        return sweep.main()

    def joined():
        return json.loads((tmp_path / "results" / "h200_sweep.json").read_text())

    assert call(*halves) == 0
    assert len(joined()["cases"]) == 2 * len(DRAWS)
    assert joined()["environment"]["gpus of one host"] == 2
    assert call(*halves, gpus=3) == 0
    assert joined()["environment"]["gpus of one host"] == 3
    assert "forward: 5 shapes, geometric mean 1.500" in capsys.readouterr().out
    assert "several files have" in str(call(halves[0], halves[0]))
    assert "No such file" in str(call(tmp_path / "h200_sweep.json"))
    with pytest.raises(SystemExit):
        call(halves[0], tmp_path / "h200_named.json")


class Gpu:
    """In place of a process: writes what the GPU of these arguments has measured."""

    def __init__(self, command, cwd):
        _, _, module, *options = command
        assert module == "benchmarks.cuda.sweep"
        given = dict(option.split("=") for option in options)
        assert pathlib.Path(given["--results"]).is_relative_to(cwd / "build")
        assert (given["--seed"], given["--deadline"]) == ("3", "99.0")
        self.names = given["--only"].split(",")
        gpu = int(given["--device"].removeprefix("cuda:"))
        self.code = int(gpu == 1)
        path = pathlib.Path(given["--results"]) / "h200_sweep.json"
        results = sweep_file.Results(path, facts(ceilings={"dense_tflops": float(gpu)}))
        for name in self.names:
            draw = Draw(replace(TINY, name=name), "uniform")
            results.add(draw, both(draw))

    def wait(self):
        return self.code


def test_gpus_share_the_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(share, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Gpu)

    def call(gpus):
        options = ["--shapes=5", "--seed=3", "--deadline=99", f"--results={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["sweep", f"--gpus={gpus}", *options])
        return sweep.main()

    # One of them says that something was wrong or left.
    assert call(3) == 1
    found = json.loads((tmp_path / "h200_sweep.json").read_text())
    assert [case["shape"] for case in found["cases"][::2]] == [f"3/{i:02}" for i in range(5)]
    assert found["environment"]["gpus of one host"] == 3
    with pytest.raises(SystemExit):
        call(4)
    assert "expected at most the 3 GPUs of this host, got 4" in capsys.readouterr().err


class GpuOfPeers:
    """The same of the peers, of which the second GPU had no time for one."""

    def __init__(self, command, cwd):
        _, _, module, *options = command
        assert module == "benchmarks.cuda"
        given = dict(option.split("=") for option in options)
        assert (given["--only"], given["--seconds"]) == ("experts-peers", "99.0")
        assert given["--peers"] == "sonicmoe,liger"
        names = given["--shapes"].split(",")
        is_second = given["--device"] == "cuda:1"
        missing = {sweep_file.LEFT_OUT: ["sonicmoe dsv3"]} if is_second else {}
        told = {"part": "experts-peers", "present": {"sonicmoe": "0.1.2"}, **missing}
        path = pathlib.Path(given["--results"]) / "h200_experts_peers.json"
        write(path, {"gpu": "H200", **told}, [{"shape": name} for name in names if name != "dsv3"])
        self.code = int(is_second)

    def wait(self):
        return self.code


def test_gpus_share_the_shapes_of_a_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(share, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", GpuOfPeers)

    def call(only):
        options = ["--shapes=qwen3-30b,dsv3,olmoe", "--seconds=99", f"--results={tmp_path}"]
        options += ["--peers=sonicmoe,liger"]
        monkeypatch.setattr(sys, "argv", ["cuda", "--gpus=2", f"--only={only}", *options])
        return cuda.main()

    assert call("experts-peers") == 1
    found = json.loads((tmp_path / "h200_experts_peers.json").read_text())
    assert [case["shape"] for case in found["cases"]] == ["qwen3-30b", "olmoe"]
    assert found["environment"][sweep_file.LEFT_OUT] == ["sonicmoe dsv3"]
    assert found["environment"]["gpus of one host"] == 2
    with pytest.raises(SystemExit):
        call("experts-peers,experts")
    assert "experts-peers, got experts-peers,experts" in capsys.readouterr().err
    # It has no shapes to share.
    with pytest.raises(SystemExit):
        call("model")
    assert "--gpus: expected --only to name one of gemm, rows," in capsys.readouterr().err


def test_a_process_that_is_killed_leaves_nothing_of_an_earlier_run(tmp_path, monkeypatch):
    class Killed:
        def __init__(self, command, cwd):
            self.is_second = "--device=cuda:1" in command

        def wait(self):
            return -9 if self.is_second else 0

    monkeypatch.setattr(share, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Killed)
    earlier = tmp_path / "build" / "rows_gpus" / "1" / "h200_rows.json"
    write(earlier, {}, [])
    assert share.share(["x"], "--only", ["a", "b"], 2, "rows", goes_on=True) == (-9, [earlier])
    assert share.share(["x"], "--only", ["a", "b"], 2, "rows") == (-9, [])


def test_a_line_of_a_shape():
    records = both(DRAWS[0], mib={OURS: {"peak": 10.0}, EAGER: {"peak": 20.0}})
    line = " ".join(sweep._line(records))
    assert line.startswith("0/00 uniform T 12 H 32 I 16 E 4 K 2: forward 1.000 ms 1.50x,")
    assert "peak {'moe_ops': 10.0, 'eager': 20.0} MiB" in line


def run_command(*options):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda.sweep", "--device", "cpu", *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    """The interpreter is for the kernel that measures a ceiling."""
    for _ in range(2):
        done = run_command("--tiny", "--results", str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "interpreter_sweep.json").read_text())
    assert [case["pass"] for case in found["cases"]] == list(PASSES)
    assert found["environment"]["part"] == "sweep"
    assert found["environment"]["repeated"] == []
    assert "geometric mean" in done.stdout
    unknown = run_command("--tiny", "--results", str(tmp_path), "--only", "0/77")
    assert unknown.returncode == 2
    assert "unknown: 0/77; known: tiny" in unknown.stderr


# Compiling ahead


def jobs(*sizes):
    return {f"job {i}": (print, float(size)) for i, size in enumerate(sizes)}


def test_jobs_start_while_there_is_memory_and_a_process():
    waiting = jobs(4, 3, 5, 1, 1)
    assert ahead.next_jobs(waiting, [], 8, 9) == ["job 0", "job 1", "job 3", "job 4"]
    assert ahead.next_jobs(waiting, [], 2, 9) == ["job 0", "job 1"]
    assert ahead.next_jobs(waiting, [7.0], 8, 9) == ["job 3", "job 4"]
    assert ahead.next_jobs(waiting, [9.0], 8, 9) == []


def test_a_job_that_exceeds_the_memory_runs_alone():
    waiting = jobs(20, 1)
    assert ahead.next_jobs(waiting, [], 8, 9) == ["job 0"]
    assert ahead.next_jobs(waiting, [1.0], 8, 9) == ["job 1"]


def note(path, text):
    with path.open("a") as file:
        file.write(text)


def fail():
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.slow
def test_all_jobs_run_and_a_failure_is_told(tmp_path, capsys):
    path = tmp_path / "done"
    several: dict[str, ahead.Job] = {
        name: (functools.partial(note, path, name), 1.0) for name in "abc"
    }
    several["bad"] = (fail, 1.0)
    ahead.compile_within(several, 2, 10 * ahead.CONTEXT_BYTES, math.inf)
    assert sorted(path.read_text()) == ["a", "b", "c"]
    assert capsys.readouterr().out == "compiling bad ahead: RuntimeError: no such kernel\n"


def test_nothing_starts_after_the_deadline(tmp_path):
    path = tmp_path / "done"
    ahead.compile_within({"a": (lambda: note(path, "a"), 1.0)}, 1, math.inf, -math.inf)
    assert not path.exists()
