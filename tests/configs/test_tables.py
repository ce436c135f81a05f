# SPDX-License-Identifier: Apache-2.0
"""The tables that the package ships hold the configurations that were measured, and nothing else."""

import hashlib
import json
from importlib import resources
from typing import Any

import pytest

from moe_ops.configs import cache

# For each table: how many keys each pass has, and the SHA-256 of its keys and their fields. Only a
# new measurement changes these. If you tune a table anew, write the new ones down here. Each table
# serves an architecture. Its "device" is the GPU on which it was measured.
SHIPPED = {
    "sm_90": (
        {"forward": 48, "backward_dX": 30, "backward_dW": 14},
        "77ae24c6bcbcdd09205a980f7679c7f6a3da6b25e1aa75d427756f4da1e68ea1",
    ),
}
tables = pytest.mark.parametrize("name", SHIPPED)


def text_of(name: str) -> str:
    file = resources.files("moe_ops.configs") / "tables" / f"{name}.json"
    return file.read_text(encoding="utf-8")


def digest(configs: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()


def test_every_table_is_listed():
    folder = resources.files("moe_ops.configs") / "tables"
    assert {file.name for file in folder.iterdir()} == {f"{name}.json" for name in SHIPPED}


@tables
def test_keys_and_fields_are_those_that_were_measured(name):
    numbers, expected = SHIPPED[name]
    configs = json.loads(text_of(name))["configs"]
    passes = [key.partition(" ")[0] for key in configs]
    assert {kind: passes.count(kind) for kind in numbers} == numbers
    assert len(configs) == sum(numbers.values())
    assert digest(configs) == expected


def test_the_gpu_that_was_measured_is_recorded():
    assert {name: json.loads(text_of(name))["device"] for name in SHIPPED} == {
        "sm_90": "NVIDIA H200"
    }


@tables
def test_every_field_is_read(name):
    content = json.loads(text_of(name))["configs"]
    read = cache.parse_table(text_of(name))
    assert list(read) == sorted(content)
    for key, values in content.items():
        assert read[key].to_dict() == values, key


@tables
def test_the_format_is_that_of_write_table(name, tmp_path):
    """Each line has one configuration, and they are sorted, so a diff of two tables can be read."""
    device, written = json.loads(text_of(name))["device"], tmp_path / f"{name}.json"
    cache.write_table(written, device, cache.parse_table(text_of(name)))
    lines, expected = (text.splitlines() for text in (text_of(name), written.read_text("utf-8")))
    # The second line has the versions: in the table those of the measurement, here those that run.
    assert [lines[0], *lines[2:]] == [expected[0], *expected[2:]]


@tables
def test_a_table_may_hold_retired_flags(name):
    """An old file with such flags is read as one without them."""
    content = json.loads(text_of(name))
    expected = cache.parse_table(text_of(name))
    for values in content["configs"].values():
        values |= {"permute_x": True, "permute_y": False, "fuse_mul_post": True}
    assert cache.parse_table(json.dumps(content)) == expected
