# SPDX-License-Identifier: Apache-2.0
"""Each aim is of a shape that is measured: a name that is misspelt would never be missed."""

from benchmarks import aims, suite


def test_every_aim_has_its_shape():
    assert list(aims.BLOCK) == [shape.name for shape in suite.SUITE]
    assert set(aims.NAMED) <= {shape.name for shape in suite.NAMED}
    assert set(aims.LORA) == set(suite.LORA) <= set(aims.BLOCK)
