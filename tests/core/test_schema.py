# SPDX-License-Identifier: Apache-2.0
"""A schema file is read as it says. A mistake in it is told with file, key and reason."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import yaml

from moe_ops._core import codegen, reference, schema
from moe_ops._core.schema import SchemaError, load, load_all

GOOD = """
op: scale
since: "0.1"
summary: Multiply rows.
equation: output = input * factor
schema: "(Tensor input, Tensor? row_ids=None, SymInt top_k=1, str mode='sum', bool flip=False) -> Tensor"
dims: {T: num_tokens, H: hidden_size}
let: {R: T * top_k}
arguments:
  input: {shape: [R, H], dtype: floating, grad: true, doc: Rows.}
  row_ids: {shape: [R], dtype: index, values: permutation, doc: Order of the rows.}
  top_k: {min: 1, max: H, doc: Slots per token.}
  mode: {choices: [sum, max], doc: What to do.}
  flip: {doc: Backwards.}
where:
  - {expect: not flip or row_ids is not None, because: flipping needs an order}
outputs:
  output: {shape: [T, H], dtype: input, doc: Rows.}
flops: R * H
source: made up for this test
"""


def document() -> Any:
    return yaml.safe_load(GOOD)


def read(mapping: Any) -> schema.OpSchema:
    return load(yaml.safe_dump(mapping, sort_keys=False), "scale.yaml")


def test_reads_what_the_file_says():
    op = read(document())
    assert (op.name, op.since, op.source) == ("scale", "0.1", "made up for this test")
    assert [(a.name, a.type, a.is_optional) for a in op.arguments] == [
        ("input", "Tensor", False),
        ("row_ids", "Tensor?", True),
        ("top_k", "SymInt", False),
        ("mode", "str", False),
        ("flip", "bool", False),
    ]
    assert op.argument("input").grad
    assert not op.argument("input").has_default
    assert op.argument("mode").default == "sum"
    assert op.argument("mode").choices == ("sum", "max")
    sizes = {"T": 3, "H": 5, "top_k": 2}
    assert [e.evaluate(sizes) for e in op.argument("input").shape] == [6, 5]
    assert [e.evaluate(sizes) for e in op.outputs[0].shape] == [3, 5]
    assert op.flops is not None
    assert op.flops.evaluate(sizes) == 30
    # The rows bind T by division; nothing else binds it.
    assert [(s.argument.name, s.axis, s.letter) for s in op.sizes if s.letter] == [
        ("input", 0, "T"),
        ("input", 1, "H"),
    ]


def test_list_of_flags():
    flags = "bool[3] flip=[True, False, True]"
    op = read(changed(schema=document()["schema"].replace("bool flip=False", flags), where=[]))
    assert op.argument("flip").num_flags == 3
    assert op.argument("flip").default == [True, False, True]
    assert op.argument("mode").num_flags == 0


def test_advice_for_every_quantised_dtype_but_those_that_have_their_own():
    advice = {
        "quantised": "dequantise it", "int8": "use int4", "dtype": "cast it", "any": "give  another",
    }  # fmt: skip
    op = read(changed(arguments__input__advice=advice))
    found = dict(op.argument("input").advice)
    assert found.pop("any") == "give another"
    assert found.pop("dtype") == "cast it"
    assert found.pop("int8") == "use int4"
    assert found == dict.fromkeys(set(schema.QUANTISED) - {"int8"}, "dequantise it")
    assert op.argument("row_ids").advice == {}


def test_the_named_dtypes_are_torchs():
    names = {*schema.QUANTISED, *(name for group in schema.DTYPES.values() for name in group)}
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in names)


def test_sizes_rounded_up():
    """Scales have such sizes, one for each block of four columns."""
    blocks = ["T", "(H + 3) // 4"]
    arguments = {**document()["arguments"]}
    arguments["row_ids"] = {"shape": blocks, "dtype": "float8_e4m3fn", "doc": "Blocks."}
    op = read(changed(arguments=arguments))
    sizes = {"T": 3, "H": 9, "top_k": 2}
    assert [e.evaluate(sizes) for e in op.argument("row_ids").shape] == [3, 3]
    assert op.argument("row_ids").dtype == "float8_e4m3fn"


def changed(**paths):
    """Return GOOD with the value at each path replaced, or taken out if the new value is `...`."""
    return changed_in(document(), **paths)


def changed_in(mapping, **paths):
    for path, value in paths.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("__"))
        place = mapping
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return mapping


def with_a_dtype(**paths):
    """Return a schema whose output has the dtype that an argument names, with changes."""
    return changed_in(
        {
            **document(),
            "schema": "(Tensor input, SymInt top_k, ScalarType to) -> Tensor",
            "dims": {"T": "num_tokens", "H": "hidden_size"},
            "arguments": {
                "input": {"shape": ["T", "H"], "dtype": "uint8", "doc": "Bytes."},
                "top_k": {"choices": [2, 4], "doc": "A size."},
                "to": {"choices": ["bfloat16", "float32"], "doc": "A dtype."},
            },
            "where": [],
            "outputs": {"output": {"shape": ["T", "top_k"], "dtype": "to", "doc": "Numbers."}},
            "flops": "T * H",
        },
        **paths,
    )


def test_reads_dtypes_and_choices_of_integers():
    op = read(with_a_dtype())
    assert op.argument("top_k").choices == (2, 4)
    assert op.argument("to").choices == ("bfloat16", "float32")
    fake = codegen.generate(op).fake
    rows = torch.zeros(3, 5, dtype=torch.uint8, device="meta")
    output = fake(rows, 4, torch.bfloat16)
    assert isinstance(output, torch.Tensor)
    assert (output.shape, output.dtype) == ((3, 4), torch.bfloat16)
    for arguments, error, expected in (
        ((rows, 3, torch.float32), ValueError, r"expected top_k in \(2, 4\), got 3"),
        ((rows, 4, torch.int8), TypeError, r"expected to in \(bfloat16, float32\), got int8"),
        (
            (rows.int(), 4, torch.float32),
            TypeError,
            r"expected input.dtype in \(uint8\), got int32",
        ),
    ):
        with pytest.raises(error, match=rf"^moe::scale: {expected}$"):
            fake(*arguments)
    page = reference.page(op)
    assert "| to | one of bfloat16, float32 |" in page
    assert "| output | Tensor (T, top_k), in to |" in page


SIGNATURE = document()["schema"]
INPUT = document()["arguments"]["input"]
# Each mistake, with the key that the error must name and a piece of the reason that it must give.
MISTAKES = {
    "no op": (changed(op=...), "op", "missing"),
    "another op's file": (changed(op="other"), "op", "other.yaml"),
    "no since": (changed(since=...), "since", "missing"),
    "since a number": (changed(since=0.1), "since", "expected text, got 0.1"),
    "no summary": (changed(summary=...), "summary", "missing"),
    "empty summary": (changed(summary=" "), "summary", "expected text"),
    "no schema": (changed(schema=...), "schema", "missing"),
    "no source": (changed(source=...), "source", "missing"),
    "no dims": (changed(dims=...), "dims", "missing"),
    "no arguments": (changed(arguments=...), "arguments", "missing"),
    "no outputs": (changed(outputs=...), "outputs", "missing"),
    "unknown key": (changed(flop="R"), "(whole file).flop", "unknown key"),
    "schema without return": (changed(schema="(Tensor input)"), "schema", "-> Tensor"),
    "unknown type": (
        changed(schema=SIGNATURE.replace("SymInt", "int")), "schema", "'int top_k=1'",
    ),
    "argument twice": (
        changed(schema=SIGNATURE.replace("bool flip", "bool mode")), "schema", "'mode' stands twice",
    ),
    "default that is no literal": (
        changed(schema=SIGNATURE.replace("=1", "=one")), "schema", "top_k",
    ),
    "default of the wrong type": (
        changed(schema=SIGNATURE.replace("=1", "='one'")), "schema", "top_k",
    ),
    "required after default": (
        changed(schema=SIGNATURE.replace("bool flip=False", "bool flip")), "schema", "flip",
    ),
    "list of no flags": (
        changed(schema=SIGNATURE.replace("bool flip", "bool[0] flip")), "schema", "bool[N]",
    ),
    "default with a flag too few": (
        changed(schema=SIGNATURE.replace("bool flip=False", "bool[3] flip=[True, False]")),
        "schema", "no bool[3]",
    ),
    "no tensor first": (
        changed(schema="(SymInt top_k=1) -> Tensor", arguments={"top_k": {"doc": "x"}},
                where=[], let={}, dims={}, flops=..., outputs={"output": {}}),
        "schema", "first argument",
    ),
    "dims no mapping": (changed(dims=["T"]), "dims", "mapping"),
    "dimension named like an argument": (changed(dims__mode="modes"), "dims.mode", "no argument"),
    "dimension without a name": (changed(dims__T="number of tokens"), "dims.T", "a name such as"),
    "dimension that nothing has": (changed(dims__Z="zeros"), "dims.Z", "no required tensor"),
    "let named like a dimension": (changed(let__T="H"), "let.T", "no argument or dimension"),
    "let of an unknown letter": (changed(let__R="T * Q"), "let.R", "'Q'"),
    "let that is no expression": (changed(let__R="T *"), "let.R", "not an expression"),
    "let that calls": (changed(let__R="max(T, H)"), "let.R", "Call is not allowed"),
    "argument missing": (changed(arguments__flip=...), "arguments", "in this order"),
    "argument too many": (changed(arguments__more={"doc": "x"}), "arguments", "in this order"),
    "argument no mapping": (changed(arguments__flip="x"), "arguments.flip", "mapping"),
    "no doc": (changed(arguments__flip__doc=...), "arguments.flip.doc", "expected text"),
    "no shape": (changed(arguments__input__shape=...), "arguments.input.shape", "missing"),
    "no dtype": (changed(arguments__input__dtype=...), "arguments.input.dtype", "missing"),
    "shape no list": (changed(arguments__input__shape="R"), "arguments.input.shape", "list"),
    "shape of an unknown letter": (
        changed(arguments__input__shape=["R", "Q"]), "arguments.input.shape[1]", "'Q'",
    ),
    "shape that reads a tensor": (
        changed(arguments__input__shape=["R", "row_ids"]), "arguments.input.shape[1]", "is None",
    ),
    "shape that nothing solves": (
        changed(arguments__input__shape=["R + 1", "H"]), "arguments.input.shape[0]", "no rule",
    ),
    "unknown dtype": (changed(arguments__input__dtype="float"), "arguments.input.dtype", "'float'"),
    "dtype of a later argument": (
        changed(arguments__input__dtype="row_ids"), "arguments.input.dtype", "'row_ids'",
    ),
    "accumulator as an argument's dtype": (
        changed(arguments__row_ids__dtype="accumulator(input)"), "arguments.row_ids.dtype",
        "'accumulator(input)'",
    ),
    "unknown values": (
        changed(arguments__row_ids__values="shuffled"), "arguments.row_ids.values", "'shuffled'",
    ),
    "inverse of nothing": (
        changed(arguments__row_ids__values="inverse of order"), "arguments.row_ids.values", "order",
    ),
    "counts of an unknown letter": (
        changed(arguments__row_ids__values="counts of Q"), "arguments.row_ids.values", "'Q'",
    ),
    "misspelt tensor key": (changed(arguments__input__type="x"), "arguments.input.type", "unknown"),
    "tensor key of a scalar": (changed(arguments__flip__grad=True), "arguments.flip.grad", "unknown"),
    "grad no flag": (changed(arguments__input__grad="yes!"), "arguments.input.grad", "true, false or ignored"),
    "stands_for no name": (
        changed(arguments__input__stands_for=["weight"]), "arguments.input.stands_for", "a name such as",
    ),
    "advice that is text": (
        changed(arguments__input__advice="convert it"), "arguments.input.advice", "mapping",
    ),
    "advice for an unknown dtype": (
        changed(arguments__input__advice={"float8": "x"}), "arguments.input.advice.float8", "unknown",
    ),
    "empty advice": (
        changed(arguments__input__advice={"any": ""}), "arguments.input.advice.any", "expected text",
    ),
    "advice for a scalar": (
        changed(arguments__flip__advice={"any": "x"}), "arguments.flip.advice", "unknown",
    ),
    "range of a bool": (changed(arguments__flip__min=0), "arguments.flip.min", "no range"),
    "range of an unknown letter": (changed(arguments__top_k__max="Q"), "arguments.top_k.max", "'Q'"),
    "choices of a number": (
        changed(arguments__top_k__choices=["a"]), "arguments.top_k.choices", "list of integers",
    ),
    "no dtypes to choose from": (
        with_a_dtype(arguments__to__choices=...), "arguments.to.choices", "expected some of bfloat16",
    ),
    "dtypes that are none": (
        with_a_dtype(arguments__to__choices=["int8"]), "arguments.to.choices", "got ['int8']",
    ),
    "bytes in the format of no argument": (
        with_a_dtype(arguments__input__values="weights in format"), "arguments.input.values",
        "'format' is not an argument",
    ),
    "choices of a bool": (
        changed(arguments__flip__choices=["a"]), "arguments.flip.choices", "no choices",
    ),
    "default not among the choices": (
        changed(arguments__mode__choices=["max", "min"]), "arguments.mode.choices", "'sum'",
    ),
    "where no list": (changed(where={"expect": "flip"}), "where", "expected a list"),
    "where without reason": (changed(where__0={"expect": "flip"}), "where[0].because", "text"),
    "where without expectation": (changed(where__0={"because": "x"}), "where[0].expect", "missing"),
    "where of an unknown name": (
        changed(where__0={"expect": "flop", "because": "x"}), "where[0].expect", "'flop'",
    ),
    "output without doc": (changed(outputs__output__doc=...), "outputs.output.doc", "text"),
    "output without shape": (changed(outputs__output__shape=...), "outputs.output.shape", "missing"),
    "output of an unknown dtype": (
        changed(outputs__output__dtype="floating"), "outputs.output.dtype", "'floating'",
    ),
    "output accumulated for no argument": (
        changed(outputs__output__dtype="accumulator(x)"), "outputs.output.dtype",
        "'accumulator(x)'",
    ),
    "two outputs for one Tensor": (
        changed(outputs__more=document()["outputs"]["output"]), "outputs", "one Tensor",
    ),
    "misspelt output key": (changed(outputs__output__dtypes="x"), "outputs.output.dtypes", "unknown"),
    "output condition of an unknown name": (
        changed(outputs__output__if="needs[0]"), "outputs.output.if", "'needs'",
    ),
    "backward no list": (changed(backward="scale"), "backward", "list of names"),
    "flops of an unknown letter": (changed(flops="R * Q"), "flops", "'Q'"),
}  # fmt: skip


def test_the_unchanged_file_is_good():
    assert read(changed()).name == "scale"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_told_with_file_key_and_reason(mistake):
    mapping, key, reason = MISTAKES[mistake]
    with pytest.raises(SchemaError) as caught:
        read(mapping)
    text = str(caught.value)
    assert text.startswith(f"scale.yaml: {key}: "), text
    assert reason in text.removeprefix(f"scale.yaml: {key}: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("op: [", "not valid YAML"),
        ("", "mapping"),
        ("- op", "mapping"),
        ("1: 2", "names as keys"),
        (GOOD + "op: scale\n", "'op' stands twice"),
        (GOOD.replace("doc: Rows.", "doc: Rows., doc: Rows."), "'doc' stands twice"),
    ],
)
def test_text_that_is_no_mapping(text, reason):
    with pytest.raises(SchemaError, match=r"^scale\.yaml: ") as caught:
        load(text, "scale.yaml")
    assert reason in str(caught.value)


def test_load_all_names_the_file_of_a_missing_backward_op(tmp_path):
    mapping = changed(backward=["scale_backward"])
    (tmp_path / "scale.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    with pytest.raises(SchemaError, match=r"^scale\.yaml: backward: .*'scale_backward'"):
        load_all(tmp_path)


def test_an_op_that_runs_for_another_is_called_by_that_name(tmp_path):
    assert read(document()).called == "scale"
    for mapping in (document(), changed(op="scale_forward", runs_for="scale")):
        text = yaml.safe_dump(mapping, sort_keys=False)
        (tmp_path / f"{mapping['op']}.yaml").write_text(text)
    schemas = load_all(tmp_path)
    assert {name: op.called for name, op in schemas.items()} == dict.fromkeys(schemas, "scale")


def test_errors_name_what_a_tensor_stands_for_but_for_its_last_axis():
    op = read(changed(arguments__input__stands_for="weight"))
    assert [size.called for size in op.sizes][:2] == ["weight.shape[0]", "input.shape[1]"]
    source = codegen.generate(op).source
    assert "expected weight.shape[0] to be a multiple of top_k" in source
    assert "expected row_ids.device == input.device" in source


def test_load_all_names_the_file_that_runs_for_a_missing_op(tmp_path):
    mapping = changed(runs_for="scala")
    (tmp_path / "scale.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    with pytest.raises(SchemaError, match=r"^scale\.yaml: runs_for: .*'scala'"):
        load_all(tmp_path)


ADVICE = {"int8": "dequantise it", "any": "give another"}
# The backward of scale, whose arguments are like those of scale.
SCALE_BACKWARD = """
op: scale_backward
since: "0.1"
summary: Multiply rows.
schema: "(Tensor grad, Tensor? row_ids=None, SymInt top_k=1, str mode='max') -> Tensor"
dims: {T: num_tokens, H: hidden_size}
let: {R: T * top_k}
arguments:
  grad: {like: scale.input, doc: Rows.}
  row_ids: {like: scale.row_ids, dtype: int32, doc: {like: scale.row_ids}}
  top_k: {like: scale.top_k}
  mode: {like: scale.mode, choices: [max]}
outputs:
  output: {shape: [T, H], dtype: grad, doc: Rows.}
source: made up for this test
"""
ROW_IDS_GIVEN = {"expect": "top_k == 1 or row_ids is not None", "because": "slots need an order"}
# This op is scale without a rule, and its argument mode has no choices.
OTHER = changed(op="other", where=..., arguments__mode__choices=...)


def read_both(folder, inner=None, **paths):
    """Read scale, changed as `paths` say, and the op that is like it."""
    scale = changed(**{"arguments__input__advice": ADVICE, "backward": ["scale_backward"], **paths})
    inner = yaml.safe_load(SCALE_BACKWARD) if inner is None else inner
    for mapping in (scale, inner, OTHER):
        text = yaml.safe_dump(mapping, sort_keys=False)
        (folder / f"{mapping['op']}.yaml").write_text(text)
    schemas = load_all(folder)
    return schemas["scale"], schemas["scale_backward"]


def backward_changed(**paths):
    return changed_in(yaml.safe_load(SCALE_BACKWARD), **paths)


def test_like_takes_over_what_is_left_out(tmp_path):
    scale, backward = read_both(tmp_path, arguments__input__autocast=True)
    grad, row_ids, top_k, mode = backward.arguments
    assert [e.text for e in grad.shape] == ["R", "H"]
    assert grad.dtype == "floating"
    assert grad.advice == scale.argument("input").advice == ADVICE
    assert (row_ids.dtype, row_ids.values) == ("int32", "permutation")
    assert [bound.text for bound in (top_k.minimum, top_k.maximum)] == ["1", "H"]
    assert (mode.choices, mode.default) == (("max",), "max")
    # `grad` and `autocast` are each op's own.
    assert scale.argument("input").grad
    assert scale.argument("input").autocast
    assert not grad.grad
    assert not grad.autocast


def test_like_refers_the_reader_where_doc_is_left_out(tmp_path):
    scale, backward = read_both(tmp_path)
    assert [a.doc for a in backward.arguments] == [
        "Rows.", scale.argument("row_ids").doc, "As in the forward.", "As in the forward.",
    ]  # fmt: skip
    _, backward = read_both(tmp_path, backward=[])
    assert backward.argument("top_k").doc == "As in scale."


def test_like_of_one_key(tmp_path):
    advice = {"like": "scale.input", "any": "give one more"}
    mapping = backward_changed(arguments__row_ids__advice=advice)
    _, backward = read_both(tmp_path, mapping)
    assert backward.argument("row_ids").advice == {**ADVICE, "any": "give one more"}


def test_like_of_another_argument_of_the_same_op(tmp_path):
    more = {"like": "scale.input", "shape": ["T"], "doc": "Order."}
    scale, _ = read_both(tmp_path, arguments__row_ids=more)
    assert scale.argument("row_ids").dtype == "floating"
    assert scale.argument("row_ids").advice == ADVICE
    assert not scale.argument("row_ids").grad


def test_like_of_what_is_like_a_third(tmp_path):
    mapping = backward_changed(
        arguments__grad__shape=["R", "H"], where=[{"like": "scale"}, ROW_IDS_GIVEN]
    )
    likes = {"arguments__mode": {"like": "other.mode", "choices": ["sum", "max"], "doc": "Which."}}
    rule = {"expect": "top_k < 9", "because": "nine is too many"}
    scale, backward = read_both(tmp_path, mapping, where=[rule], **likes)
    assert backward.argument("mode").choices == ("max",)
    assert [w.because for w in scale.where] == ["nine is too many"]
    assert [w.because for w in backward.where] == ["nine is too many", "slots need an order"]


LIKE_MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown op": (
        {"arguments__grad__like": "scala.input"}, "arguments.grad.like", "no op named 'scala'",
    ),
    "unknown argument": (
        {"arguments__grad__like": "scale.inputs"}, "arguments.grad.like",
        "scale has no argument 'inputs'",
    ),
    "no argument named": (
        {"arguments__grad__like": "scale"}, "arguments.grad.like", "expected op.argument, got 'scale'",
    ),
    "no name": ({"arguments__grad__like": 3}, "arguments.grad.like", "expected op.argument, got 3"),
    "itself": (
        {"arguments__grad__like": "scale_backward.grad"}, "arguments.grad.like",
        "goes in a circle: scale_backward.grad -> scale_backward.grad",
    ),
    "each other": (
        {"arguments__grad__like": "scale_backward.row_ids",
         "arguments__row_ids__like": "scale_backward.grad"},
        "arguments.row_ids.like",
        "goes in a circle: scale_backward.grad -> scale_backward.row_ids -> scale_backward.grad",
    ),
    "scalar like a tensor": (
        {"arguments__mode__like": "scale.row_ids"}, "arguments.mode.dtype", "unknown key",
    ),
    "dtype of an argument that this op lacks": (
        {"arguments__grad": {"like": "scale_backward.row_ids", "dtype": "input", "doc": "x"}},
        "arguments.grad.dtype", "'input'",
    ),
    "like of the same op without doc": (
        {"arguments__mode": {"like": "scale_backward.top_k", "min": 1}}, "arguments.mode.doc",
        "expected text",
    ),
    "advice that is not there": (
        {"arguments__grad__advice": {"like": "scale.row_ids"}}, "arguments.grad.advice.like",
        "scale.row_ids has no advice",
    ),
    "advice like an unknown op's": (
        {"arguments__grad__advice": {"like": "scala.input"}}, "arguments.grad.advice.like",
        "no op named 'scala'",
    ),
    "doc with more than like": (
        {"arguments__grad__doc": {"like": "scale.input", "any": "x"}}, "arguments.grad.doc.like",
        "stands alone",
    ),
    "where of an unknown op": (
        {"where": [{"like": "scala"}]}, "where[0].like", "no op named 'scala'",
    ),
    "where of several ops": (
        {"where": [{"like": ["scale"]}]}, "where[0].like", "no op named ['scale']",
    ),
    "where of an op without": ({"where": [{"like": "other"}]}, "where[0].like", "other has no where"),
    "where like and more": (
        {"where": [{"like": "scale", "because": "x"}]}, "where[0].like", "stands alone",
    ),
    "where of itself": (
        {"where": [ROW_IDS_GIVEN, {"like": "scale_backward"}]}, "where[1].like",
        "goes in a circle: scale_backward -> scale_backward",
    ),
    "where about an argument that this op lacks": (
        {"where": [{"like": "scale"}]}, "where[0].like.expect", "'flip'",
    ),
    "shape": ({"arguments__grad__shape": {"like": "scale.input"}}, "arguments.grad.shape.like", "only"),
    "dims": ({"dims__like": "scale"}, "dims.like", "only"),
    "let": ({"let__like": "scale"}, "let.like", "only"),
    "output": ({"outputs__output__like": "scale.output"}, "outputs.output.like", "only"),
    "whole file": ({"like": "scale"}, "(whole file).like", "unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", LIKE_MISTAKES)
def test_mistake_in_like_is_told_with_file_key_and_reason(mistake, tmp_path):
    paths, key, reason = LIKE_MISTAKES[mistake]
    with pytest.raises(SchemaError) as caught:
        read_both(tmp_path, backward_changed(**paths))
    text = str(caught.value)
    assert text.startswith(f"scale_backward.yaml: {key}: "), text
    assert reason in text.removeprefix(f"scale_backward.yaml: {key}: ")


def test_needs_neither_torch_nor_the_package():
    """setup.py loads the folder by its path, where only PyYAML is installed."""
    code = textwrap.dedent(f"""
        import importlib.util, sys
        sys.modules["torch"] = None
        spec = importlib.util.spec_from_file_location("schema_alone", {schema.__file__!r})
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        assert not any(name.startswith("moe_ops") for name in sys.modules)
        print(module.load({GOOD!r}, "scale.yaml").name)
    """)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "scale\n"
