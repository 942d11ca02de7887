"""The codec: what goes in comes out, and garbage is refused with our own error."""

from __future__ import annotations

import json
import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedlora import codec
from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.local_terms import LocalTerms
from fedlora.methods import TensorSpec
from fedlora.reduce import OneByOne, Reduction, WeightedMean, check_tensors
from fedlora.roles import Role
from fedlora.wire import (
    Reply,
    decode,
    encode,
    from_named_arrays,
    message_bytes,
    named_arrays,
    read_instruction,
    read_reduction,
    read_reports,
    write_instruction,
)

arrays = st.one_of(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
)
tensors = st.dictionaries(st.text(max_size=12), arrays, max_size=4)


def one_update(reduction: Reduction) -> Reduction:
    reduction.add(Update(ClientReport(0), {"x": np.ones(2)}), 3)
    return reduction


@given(tensors)
def test_round_trip(value: dict[str, NDArray[Any]]) -> None:
    for back in (decode(encode(value)), from_named_arrays(named_arrays(value))):
        assert list(back) == list(value)
        for name, array in value.items():
            assert back[name].dtype == array.dtype
            assert back[name].shape == array.shape
            assert back[name].tobytes() == array.tobytes()


@given(tensors, st.integers(1, 40))
def test_pieces_hold_whole_tensors(value: dict[str, NDArray[Any]], size: int) -> None:
    """However long a piece may be, the tensors come back, and none is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_PIECE_BYTES", size)
        whole = encode(value)
    back = decode(whole)
    assert [(name, array.tobytes()) for name, array in back.items()] == [(n, a.tobytes()) for n, a in value.items()]
    assert len(whole) - 1 <= len(value)
    assert sum(len(array.data) for name, array in whole.items() if name != "manifest") == sum(
        array.nbytes for array in value.values()
    )


def test_decoding_copies_nothing() -> None:
    """A message of gigabytes is in memory once."""
    whole = encode({"a": np.ones((2, 3), np.float32), "b": np.ones(7, np.float32)})
    held = np.frombuffer(whole["0"].data, np.uint8)
    for value in decode(whole).values():
        assert np.shares_memory(value, held)
        assert not value.flags.writeable


def test_a_piece_too_many_or_too_few_is_refused() -> None:
    whole = encode({"a": np.ones(3, np.float32)})
    whole["1"] = whole["0"]
    with pytest.raises(WireError, match="12 bytes follow the last tensor"):
        decode(whole)
    del whole["1"]
    whole["2"] = whole["0"]
    with pytest.raises(WireError, match="not a record of tensors"):
        decode(whole)
    del whole["2"], whole["0"]
    with pytest.raises(WireError, match="the data end before a"):
        decode(whole)


def record(manifest: bytes, data: bytes, codec: str = "fedlora.raw") -> ArrayRecord:
    return ArrayRecord(
        {
            "manifest": Array("uint8", (len(manifest),), codec, manifest),
            "0": Array("uint8", (len(data),), codec, data),
        }
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.one_of(st.binary(max_size=64), json_values.map(lambda v: zlib.compress(json.dumps(v).encode()))),
    st.binary(max_size=64),
)
def test_garbage_is_refused_with_our_own_error(manifest: bytes, data: bytes) -> None:
    """Any bytes at all: tensors, or a WireError; never a traceback from deep inside."""
    try:
        value = decode(record(manifest, data))
    except WireError:
        return
    assert sum(array.nbytes for array in value.values()) == len(data)


@given(st.integers(0, 200), st.integers(0, 255))
def test_damage_is_noticed_or_changes_numbers_only(at: int, byte: int) -> None:
    """One byte of the manifest changed: refused, or still tensors of the right total size."""
    whole = encode({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float64)})
    manifest = bytearray(whole["manifest"].data)
    manifest[at % len(manifest)] = byte
    try:
        value = decode(record(bytes(manifest), whole["0"].data))
    except WireError:
        return
    assert sum(array.nbytes for array in value.values()) == 2 * 3 * 4 + 4 * 8


@pytest.mark.parametrize(
    ("manifest", "data", "message"),
    [
        ([["a", "float16", [2]]], 4, "a has dtype 'float16'"),
        ([["a", "float32", [2]]], 4, "the data end before a"),
        ([["a", "float32", [1]]], 8, "4 bytes follow the last tensor"),
        ([["a", "float32", [1]], ["a", "float32", [1]]], 8, "a is there twice"),
        ([["a", "float32", [-1]]], 4, "not .name, dtype, shape."),
        ([["a", "float32", [True]]], 4, "not .name, dtype, shape."),
        ([["a", "float32", [2**50]]], 4, "not .name, dtype, shape."),
        ([["a", "float32", [1] * 65]], 4, "not .name, dtype, shape."),
        ([["a", "float32", [0, 2**39, 2**39]]], 0, "not .name, dtype, shape."),
        ({"a": 1}, 0, "not a list"),
    ],
)
def test_each_fault_has_its_message(manifest: Any, data: int, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(record(zlib.compress(json.dumps(manifest).encode()), bytes(data)))


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(b"[" + b" " * (1 << 28) + b"]", 9)
    with pytest.raises(WireError, match="cut short"):
        decode(record(bomb, b""))


def test_other_codecs_and_records_are_refused() -> None:
    with pytest.raises(WireError, match="not encoded as"):
        decode(record(b"", b"", codec="numpy.ndarray"))
    with pytest.raises(WireError, match="not a record of tensors"):
        decode(ConfigRecord({"a": 1}))
    with pytest.raises(WireError, match="not a record of tensors"):
        decode(None)


def test_check_tensors_names_the_first_fault() -> None:
    specs = {"a": TensorSpec((2, 2), "A", ("l",), 0.0)}
    check_tensors({"a": np.zeros((2, 2), np.float32)}, specs, "float32")
    for value, message in (
        ({}, "a is missing"),
        ({"a": np.zeros((2, 2), np.float32), "b": np.zeros(1, np.float32)}, "b is not expected"),
        ({"a": np.zeros((4,), np.float32)}, r"a has shape \[4\], not \[2, 2\]"),
        ({"a": np.zeros((2, 2), np.float64)}, "a has dtype float64, not float32"),
        ({"a": np.full((2, 2), np.nan, np.float32)}, "a holds NaN or infinity"),
    ):
        with pytest.raises(WireError, match=message):
            check_tensors(value, specs, "float32")


INSTRUCTION = Instruction(
    round=3,
    clients=(1, 4),
    roles={"A": Role.FROZEN, "head": Role.PERSONAL, "B": Role.UPLOAD},
    weights="equal",
    tensors={"x": np.ones(3, np.float32)},
    reduction="one-by-one",
    local=LocalTerms(learning_rate=0.5, proximal=0.01, scaffold=2, penalty=0.02, decay=0.9),
    extra={"variate/x": np.full(3, 2.0, np.float32)},
    ranks=(2, 8),
    experts=(1, 0),
    fingerprint="f",
    pack=3,
    ledger_heads=("h1", ""),
)


def test_instructions_round_trip() -> None:
    """Every field, and those of a plain one that are empty."""
    modules = replace(INSTRUCTION, ranks=(), modules=((0, 2, 7), (3,)), blocks=("h.1", "h.4"))
    for instruction in (INSTRUCTION, modules, Instruction(1, (0,), {"A": Role.SHARED}, {})):
        back = read_instruction(write_instruction(instruction))
        for field in fields(Instruction):
            here, there = getattr(instruction, field.name), getattr(back, field.name)
            if field.name in ("tensors", "extra"):
                assert here.keys() == there.keys()
                assert all(np.array_equal(here[name], there[name]) for name in here)
            else:
                assert here == there


def test_replies_round_trip() -> None:
    reports = [
        ClientReport(1, examples=5, steps=2, metrics={"loss": 0.5}, ledger_head="h"),
        ClientReport(4, Outcome.BUDGET_SPENT, "one more round would be too many"),
        ClientReport.failed(5, "broken"),
    ]
    content = Reply(reports).to_content()
    assert read_reports(content) == reports
    assert read_reduction(content, "mean") is None


def test_metrics_of_a_client_that_failed_are_not_read() -> None:
    reports = [ClientReport(1, metrics={"loss": 0.5}), ClientReport(2, Outcome.FAILED, "no", metrics={"loss": 0.7})]
    assert [report.metrics for report in read_reports(Reply(reports).to_content())] == [{"loss": 0.5}, {}]


def test_an_instruction_that_contradicts_itself_is_refused() -> None:
    for changes, message in (
        ({"clients": (4, 4), "ranks": (), "experts": (), "ledger_heads": ()}, "names a client twice"),
        ({"ranks": (1,)}, "ledger hashes, ranks or experts are not one a client"),
        ({"ledger_heads": ("a",)}, "ledger hashes, ranks or experts are not one a client"),
        ({"experts": (0,)}, "ledger hashes, ranks or experts are not one a client"),
        ({"experts": (0, -1)}, "its experts not 0 or more"),
        ({"modules": ((0,), (1,))}, "both ranks that clients hold and modules that they train"),
        ({"ranks": (), "modules": ((0,),)}, "modules are not 1 or more of each client"),
        ({"ranks": (), "modules": ((0, 1), ())}, "modules are not 1 or more of each client"),
        ({"ranks": (), "modules": ((0, 0), (1,))}, "modules are not ascending places from 0"),
        ({"ranks": (), "modules": ((2, 1), (1,))}, "modules are not ascending places from 0"),
        ({"ranks": (), "modules": ((-1, 1), (1,))}, "modules are not ascending places from 0"),
        ({"reduction": "median"}, "reduction 'median' is not known"),
        ({"weights": "loss"}, "roles or weights are not known"),
        ({"roles": {"A": "boss"}}, "roles or weights are not known"),
        ({"local": LocalTerms(scaffold=3)}, "terms of local training"),
        ({"local": LocalTerms(proximal=float("nan"))}, "terms of local training"),
        ({"local": LocalTerms(learning_rate=-1.0)}, "terms of local training"),
        ({"local": LocalTerms(penalty=float("inf"))}, "terms of local training"),
        ({"local": LocalTerms(decay=0.0)}, "terms of local training"),
        ({"local": LocalTerms(decay=1.5)}, "terms of local training"),
    ):
        with pytest.raises(WireError, match=message):
            read_instruction(write_instruction(replace(INSTRUCTION, **changes)))


def test_reductions_that_are_no_answer_are_refused() -> None:
    content = Reply([ClientReport(0)], one_update(WeightedMean())).to_content()
    with pytest.raises(WireError, match="reduced by 'mean', not 'one-by-one'"):
        read_reduction(content, "one-by-one")
    content["reply"]["values"] = [1]  # type: ignore[index]
    with pytest.raises(WireError, match="lists differ in length"):
        read_reduction(content, "mean")


KEYS = [
    *("round", "clients", "kinds", "roles", "weights", "fingerprint", "pack", "ranks", "reduction", "learning_rate"),
    *("modules", "module_counts"),
    *(
        "proximal",
        "scaffold",
        "penalty",
        "decay",
        "examples",
        "steps",
        "metrics",
        "outcomes",
        "reasons",
        "ledger_heads",
        "numbers",
    ),
    "values",
]


@pytest.mark.parametrize("read", [read_instruction, read_reports, lambda content: read_reduction(content, "mean")])
@given(
    st.dictionaries(
        st.sampled_from(KEYS),
        st.one_of(
            st.integers(-5, 5),
            st.text(max_size=4),
            st.floats(),
            st.lists(st.integers(0, 3)),
            st.lists(st.text(max_size=3)),
        ),
    ),
    st.lists(st.text(max_size=12)),
)
def test_garbage_messages_are_refused(read: Any, head: dict[str, Any], groups: list[str]) -> None:
    records = {f"reduced.{name}": encode({}) for name in groups}
    for name in ("instruction", "reply"):
        for content in (
            RecordDict({name: ConfigRecord(head)}),
            RecordDict({name: ConfigRecord(head), "tensors": encode({}), **records}),
        ):
            try:
                read(content)
            except WireError:
                continue


def test_the_envelope_is_small() -> None:
    """24 tensors of a real model: the envelope stays under 1 KiB."""
    names = {
        f"bert.encoder.layer.{n}.attention.self.{p}.lora_{m}": 8 * 384
        for n in range(6)
        for p in ("query", "value")
        for m in "AB"
    }
    value = {name: np.zeros(size, np.float32) for name, size in names.items()}
    payload = sum(array.nbytes for array in value.values())
    for reduction in (WeightedMean(), OneByOne()):
        report = ClientReport(0, examples=100, steps=7, metrics={"loss": 1.0})
        reduction.add(Update(report, value), 100)
        assert payload < message_bytes(Reply([report], reduction).to_content()) < payload + 1024
