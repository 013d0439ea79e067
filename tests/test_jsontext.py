"""JSON as the tower accepts it."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tower import jsontext
from tower.jsontext import BadJson

#: The same examples in every run, however slow the machine is.
CALM = settings(deadline=None, derandomize=True, database=None)

TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner))

#: Pieces that random bytes rarely form by themselves.
PIECES = st.sampled_from(
    [*rb'" { } [ ] : , \u \ud800 \udc00 \u0000 - 1e999 NaN Infinity null 0 12345678901234567890123'.split(b" "), b"\xff", b"\xed\xa0\x80"]
)


@pytest.mark.slow
@given(VALUES, st.booleans())
@CALM
def test_what_any_writer_makes_of_a_value_is_read_back_equal(value: Any, ascii_only: bool) -> None:
    """Both ways to write text give the same value, and so does our own."""
    assert repr(jsontext.loads(json.dumps(value, ensure_ascii=ascii_only).encode())) == repr(value)
    assert repr(jsontext.loads(jsontext.dumps(value).encode())) == repr(value)
    assert jsontext.dumps(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@given(VALUES)
@settings(CALM, max_examples=30)
def test_equal_values_have_equal_canonical_text(value: Any) -> None:
    """The order of keys does not matter."""
    turned = json.loads(json.dumps(value), object_pairs_hook=lambda pairs: dict(reversed(pairs)))

    assert jsontext.canonical(turned) == jsontext.canonical(value)


@pytest.mark.slow
@given(st.binary() | st.lists(PIECES | st.binary(max_size=3)).map(b"".join))
@settings(CALM, max_examples=300)
def test_no_bytes_raise_anything_but_bad_json(data: bytes) -> None:
    """And what is read can be written, stored and sent."""
    try:
        value = jsontext.loads(data)
    except BadJson as error:
        assert str(error)
        str(error).encode()
        return
    assert "\x00" not in jsontext.dumps(value)
    jsontext.canonical(value).encode()


STRINGS = st.sampled_from(
    [
        '""',
        '"a"',
        '"b"',
        r'"\u0061"',
        r'"\ud83d\ude00"',
        '"😀"',
        r'"\ud800"',
        r'"\u0000"',
        '"\x00"',
        '"\x7f"',
        '"\u2028"',
        r'"\/"',
        '"\ufeff"',
        "'a'",
    ]
)
NUMBERS = st.sampled_from(
    [
        "0",
        "-0",
        "-0.0",
        "01",
        "+1",
        "1.",
        ".5",
        "1e5",
        "1e400",
        "-1e-400",
        str(2**63),
        str(2**63 - 1),
        "7" * 5000,
        "7" * 5000 + ".5",
        "NaN",
        "-Infinity",
    ]
)
NAMES = st.sampled_from(["null", "true", "false", "True", "undefined", "", "//", "\ufeff"])


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(STRINGS, inner).map(":".join)
    lists = st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
    objects = st.lists(pairs, max_size=4).map(lambda items: f"{{{' , '.join(items)}}}")
    return lists | objects | st.tuples(inner, st.integers(1, 150)).map(lambda pair: "[" * pair[1] + pair[0] + "]" * pair[1])


NEARLY_JSON = st.recursive(STRINGS | NUMBERS | NAMES, _nested, max_leaves=12)
CODECS = st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Return what looks like JSON, and mostly is, with a byte or two changed now and then."""
    data = bytearray(draw(NEARLY_JSON).encode(draw(CODECS), "backslashreplace"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 1))] = draw(st.binary(max_size=1))
    return bytes(data)


@pytest.mark.slow
@given(bodies())
@settings(CALM, max_examples=500)
def test_whatever_is_accepted_means_the_same_to_every_reader(data: bytes) -> None:
    """To Python's own parser, and to ours after it was written down again; all else is BadJson."""
    try:
        value = jsontext.loads(data)
    except BadJson as error:
        assert 0 < len(str(error)) < 400
        return
    assert repr(value) == repr(json.loads(data.decode()))
    for text in (jsontext.dumps(value), jsontext.canonical(value)):
        assert jsontext.loads(text.encode()) == value
    assert repr(jsontext.loads(jsontext.dumps(value).encode())) == repr(value)
    assert jsontext.dumps(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


MANY = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"[" * MANY,
        b'{"":' * (MANY // 4),
        b"7" * MANY,
        b"-" * MANY,
        b"7" * MANY + b".0",
        b"1e" + b"9" * MANY,
        b'"' + b"\\" * MANY,
        b'"' + b"\\u0000" * (MANY // 6) + b'"',
        b'"' + b"\\ud800" * (MANY // 6) + b'"',
        b" " * MANY,
        b"\n" * MANY + b"x",
        b"\xff" * MANY,
        b'{"a":1' + b',"a":1' * (MANY // 6) + b"}",
        b"[" + b"1," * (MANY // 2) + b"]",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_a_megabyte_of_rubbish_costs_little(data: bytes) -> None:
    """Not its square in time, which would never end, and a few dozen times its size in memory."""
    tracemalloc.start()
    try:
        with pytest.raises(BadJson) as raised:
            jsontext.loads(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(data)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b"{", "at line 1, column 2"),
        (b'{"a":1,}', "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b"[1] 2", "Extra data"),
        (b'"\x01"', "Invalid control character"),
        (b'{"a":1,"a":1}', "The key 'a' stands twice"),
        (b'[{"b":{"a":1,"a":2}}]', "The key 'a' stands twice"),
        (b'{"\\u0061":1,"a":2}', "The key 'a' stands twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"1e999", "too large for a double"),
        (b"-1e999", "too large for a double"),
        (b"9223372036854775808", "does not fit 64 bits"),
        (b"-9223372036854775809", "does not fit 64 bits"),
        (b"1" * 5000, "does not fit 64 bits"),
        (b'"\\u0000"', "holds a NUL"),
        (b'{"a\\u0000":1}', "holds a NUL"),
        (b'"\\ud800"', "half a surrogate pair"),
        (b'"\\udc00\\ud800"', "half a surrogate pair"),
        (b'{"\\udfff":1}', "half a surrogate pair"),
        (b'{"\\ud800":1,"\\ud800":1}', "stands twice"),
        (b"\xff", "not UTF-8 (byte 0)"),
        (b'"\xc3"', "not UTF-8 (byte 1)"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\xc0\x80"', "not UTF-8"),
        ('{"a":1}'.encode("utf-16"), "not UTF-8"),
        ('{"a":1}'.encode("utf-16-le"), "not JSON"),
        ('{"a":1}'.encode("utf-32"), "not UTF-8"),
        (b'\xef\xbb\xbf{"a":1}', "byte order mark"),
        (b"[" * 102 + b"]" * 102, "deeper than 100"),
        (b'{"a":' * 102 + b"1" + b"}" * 102, "deeper than 100"),
        (b"[" * 2000 + b"]" * 2000, "deeper than 100"),
        (b"[" * 100_000, "not JSON|deeper than 100"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper than 100"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 100"),
    ],
)
def test_what_another_reader_could_take_differently_is_refused(data: bytes, said: str) -> None:
    """The message says why."""
    with pytest.raises(BadJson) as raised:
        jsontext.loads(data)

    assert any(part in str(raised.value) for part in said.split("|")), str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b" [1, -0, 1.0, 1e2, 2.5E-3]\r\n\t", [1, 0, 1.0, 100.0, 0.0025]),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'"\xf0\x9f\x98\x80"', "😀"),
        (b'{"__proto__":{"x":1},"constructor":2,"":3}', {"__proto__": {"x": 1}, "constructor": 2, "": 3}),
        (b"[9223372036854775807,-9223372036854775808]", [2**63 - 1, -(2**63)]),
        (b"1e-999", 0.0),
        (b"[" * 100 + b"]" * 100, None),
    ],
)
def test_all_other_json_is_read(data: bytes, value: Any) -> None:
    """Odd is not wrong."""
    assert jsontext.loads(data) == (value if value is not None else json.loads(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\x00", {"a": "\ud800"}, {1, 2}, object(), [b""], {(1, 2): 3}])
def test_what_json_cannot_hold_is_not_written(value: Any) -> None:
    """A handler's result is checked by the same rules."""
    with pytest.raises(BadJson):
        jsontext.dumps(value)


def test_a_value_that_holds_itself_is_not_written() -> None:
    """It is deeper than any limit."""
    value: list[Any] = []
    value.append(value)

    with pytest.raises(BadJson, match="deeper than 100"):
        jsontext.dumps(value)
