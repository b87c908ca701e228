import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.rl.tool_calls import MAX_CALLS, ToolCall, ToolSpec, load_json, without_thoughts
from bestiary.shared.rl.tool_formats import FORMATS, tool_format

CALC = ToolSpec(
    "calc",
    "The value of an expression.",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)
BOOK = ToolSpec(
    "book",
    "Book a room.",
    {
        "type": "object",
        "properties": {
            "day": {"type": "string"},
            "people": {"type": "integer"},
            "rate": {"type": "number"},
            "quiet": {"type": "boolean"},
            "extras": {"type": "array"},
        },
    },
)
TOOLS = (CALC, BOOK)
ALL = sorted(FORMATS)

# What real models write, by hand.
WRITTEN = {
    "hermes": 'Let me see.\n<tool_call>\n{"name": "book", "arguments": {"day": "Monday", "people": 3}}\n</tool_call>',
    "nemotron_nano_v2": "Let me see.\n"
    '<TOOLCALL>[{"name": "book", "arguments": {"day": "Monday", "people": 3}}]</TOOLCALL>',
    "nemotron_3": "Let me see.\n"
    "<tool_call>\n<function=book>\n<parameter=day>\nMonday\n</parameter>\n<parameter=people>\n"
    "3\n</parameter>\n</function>\n</tool_call>",
    "compact": 'Let me see.\nbook({"day": "Monday", "people": 3})',
}


@pytest.mark.parametrize("name", ALL)
def test_a_call_by_hand(name):
    parsed = tool_format(name).parse(WRITTEN[name], TOOLS)
    assert parsed.calls == [ToolCall("book", {"day": "Monday", "people": 3})]
    assert parsed.text == "Let me see."


def test_rendered_by_hand():
    calls = [ToolCall("calc", {"expression": "12*7"})]
    arguments = '{"name": "calc", "arguments": {"expression": "12*7"}}'
    assert FORMATS["hermes"].render(calls) == f"<tool_call>\n{arguments}\n</tool_call>"
    assert FORMATS["nemotron_nano_v2"].render(calls) == f"<TOOLCALL>[{arguments}]</TOOLCALL>"
    assert FORMATS["compact"].render(calls, TOOLS) == "calc(12*7)"
    xml = "<tool_call>\n<function=calc>\n<parameter=expression>\n12*7\n</parameter>\n</function>\n</tool_call>"
    assert FORMATS["nemotron_3"].render(calls) == xml


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        tool_format("herms")


# ------------------------------------------------------------------ round trips

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40) | st.sampled_from(
    [
        "</tool_call>",
        "<think>",
        "a</think>b",
        "</TOOLCALL>",
        '"}',
        "\\",
        "{}",
        '{"expression": "x"}',
        "a\nb",
        ")",
        "(",
        "",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=4)


def same(one, other):
    # 1, 1.0 and True are equal in Python, not in JSON.
    return [(c.name, json.dumps(c.arguments), c.error) for c in one] == [
        (c.name, json.dumps(c.arguments), c.error) for c in other
    ]


@settings(max_examples=200, deadline=None)
@given(calls=st.lists(st.builds(ToolCall, TEXT.filter(bool), ARGUMENTS), min_size=1, max_size=3))
@pytest.mark.parametrize("name", ["hermes", "nemotron_nano_v2"])
def test_json_calls_come_back(name, calls):
    form = tool_format(name)
    assert same(form.parse(f"<think>{form.name}</think>before {form.render(calls)} after").calls, calls)


@settings(max_examples=300, deadline=None)
@given(expression=TEXT, other=ARGUMENTS)
def test_compact_calls_come_back(expression, other):
    form = FORMATS["compact"]
    for call in (ToolCall("calc", {"expression": expression}), ToolCall("book", other)):
        assert same(form.parse("some words\n" + form.render([call], TOOLS), TOOLS).calls, [call])


@settings(max_examples=300, deadline=None)
@given(
    day=TEXT.filter(lambda t: not any(tag in t for tag in ("<think>", "</think>", "</tool_call>"))),
    people=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    quiet=st.booleans(),
    extras=st.lists(st.integers() | st.booleans(), max_size=3),
)
def test_xml_calls_come_back_in_their_types(day, people, rate, quiet, extras):
    call = ToolCall("book", {"day": day, "people": people, "rate": rate, "quiet": quiet, "extras": extras})
    form = FORMATS["nemotron_3"]
    assert same(form.parse(form.render([call, call]), TOOLS).calls, [call, call])
    untyped = form.parse(form.render([call])).calls[0]
    assert untyped.arguments["people"] == str(people)


def test_xml_refuses_what_it_cannot_write():
    with pytest.raises(BadDataError, match="own tags: day"):
        FORMATS["nemotron_3"].render([ToolCall("book", {"day": "a</parameter>"})])


def test_compact_refuses_two_calls():
    with pytest.raises(BadDataError, match="one call a turn, not 2"):
        FORMATS["compact"].render([ToolCall("calc"), ToolCall("calc")])


# ------------------------------------------------------------------ what stands where


@pytest.mark.parametrize("name", ALL)
def test_calls_in_thoughts_are_none(name):
    form = tool_format(name)
    call = form.render([ToolCall("calc", {"expression": "1"})], TOOLS)
    assert form.parse(f"<think>{call}</think>It is 1.", TOOLS) == ([], "It is 1.")
    assert form.parse(f"I could do\n{call}\n</think>\nIt is 1.", TOOLS).calls == []  # the prompt opened the thought
    assert form.parse(f"<think>hm\n{call}", TOOLS).calls == []
    assert form.parse(call, TOOLS, in_thought=True).calls == []
    assert len(form.parse(f"hm</think>\n{call}", TOOLS, in_thought=True).calls) == 1
    assert len(form.parse(f"<think>{call}</think>\n{call}", TOOLS).calls) == 1


def test_thoughts():
    assert without_thoughts("a<think>b</think>c<think>d") == "ac"
    assert without_thoughts("a</think>b<think>c</think>d") == "bd"
    assert without_thoughts("no tags") == "no tags"
    assert without_thoughts("a", in_thought=True) == ""
    assert without_thoughts("") == ""


def test_an_unclosed_call_is_read_where_it_is_whole():
    """A stop string may have cut the closing tag."""
    for name, end in (
        ("hermes", "\n</tool_call>"),
        ("nemotron_nano_v2", "</TOOLCALL>"),
        ("nemotron_3", "\n</tool_call>"),
    ):
        (call,) = tool_format(name).parse(WRITTEN[name].removesuffix(end), TOOLS).calls
        assert call == ToolCall("book", {"day": "Monday", "people": 3})
        (call,) = tool_format(name).parse(WRITTEN[name][: -len(end) - 8], TOOLS).calls
        assert call.error


MALFORMED = {
    "hermes": [
        "{",
        "[]",
        '{"name": 3}',
        '{"name": "calc", "arguments": [1]}',
        '{"arguments": {}}',
        "calc(1)",
        "NaN",
        "",
    ],
    "nemotron_nano_v2": ["[", "[]", "[3]", '[{"name": "a", "arguments": "b"}]', "{}", '[{"name": null}]', ""],
    "nemotron_3": [
        "",
        "calc",
        "<function=>",
        "<function=calc",
        "<function=book><parameter=people>\nmany\n</parameter></function>",
        "<function=calc><parameter=expression>1</function>",
        "<function=calc>words</function>",
        "<function=calc></function><function=calc></function>",
    ],
}


@pytest.mark.parametrize(("name", "body"), [(n, b) for n, bodies in MALFORMED.items() for b in bodies])
def test_a_malformed_call_is_an_error_to_answer(name, body):
    tag = "TOOLCALL" if name == "nemotron_nano_v2" else "tool_call"
    calls = tool_format(name).parse(f"<{tag}>{body}</{tag}>", TOOLS).calls
    assert [bool(call.error) for call in calls] == [True]
    assert len(calls[0].error) < 400


def test_compact_lines():
    def parse(text):
        return FORMATS["compact"].parse(text, TOOLS).calls

    assert parse("calc(f(a)b)") == [ToolCall("calc", {"expression": "f(a)b"})]
    assert parse("calc({1, 2})") == [ToolCall("calc", {"expression": "{1, 2}"})]
    assert parse("calc(12*7)  \n\n") == [ToolCall("calc", {"expression": "12*7"})]
    assert parse("calc(12*7") == [ToolCall("calc", error="the bracket is not closed")]
    assert parse("book(Monday)")[0].error == "the arguments are no JSON object"
    assert parse("book({)")[0].error.startswith("the arguments are no JSON object")
    assert parse("other()") == [ToolCall("other", {})]
    # An answer that holds brackets is an answer.
    for text in ("84", "calc(12*7)\n84", "calc(12*7) is 84", "It is calc (1)", "(84)", "", "1(2)"):
        assert parse(text) == [], text


def test_every_tool_is_listed():
    for form in FORMATS.values():
        text = form.list_tools(TOOLS)
        assert all(tool.name in text and tool.description in text for tool in TOOLS)
    lines = FORMATS["hermes"].list_tools(TOOLS).split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line)["function"]["name"] for line in lines] == ["calc", "book"]
    listed = FORMATS["nemotron_nano_v2"].list_tools(TOOLS).split("<AVAILABLE_TOOLS>")[1].split("</AVAILABLE_TOOLS>")[0]
    assert json.loads(listed)[1]["function"]["parameters"] == BOOK.parameters


# ------------------------------------------------------------------ hostile text

BIG = 10_000_000
HOSTILE = {
    "openings": lambda: "<tool_call>" * (BIG // 11),
    "pairs": lambda: "<tool_call></tool_call>" * (BIG // 23),
    "nano openings": lambda: "<TOOLCALL>" * (BIG // 10),
    "thoughts": lambda: "<think></think>" * (BIG // 15),
    "closings": lambda: "</think>" * (BIG // 8),
    "opened thoughts": lambda: "<think>" * (BIG // 7),
    "one long call": lambda: (
        '<tool_call>{"name": "calc", "arguments": {"expression": "' + "1" * BIG + '"}}</tool_call>'
    ),
    "one long list": lambda: "<TOOLCALL>[" + "{}," * (BIG // 3) + "{}]</TOOLCALL>",
    "nested": lambda: "<tool_call>" + "[" * 90_000 + "</tool_call>",
    "nested objects": lambda: "<tool_call>" + '{"a":' * 19_000 + "</tool_call>",
    "deep but valid": lambda: (
        '<tool_call>{"name": "calc", "arguments": {"e": ' + "[" * 500 + "]" * 500 + "}}</tool_call>"
    ),
    "a huge number": lambda: '<tool_call>{"name": "calc", "arguments": {"e": ' + "9" * 90_000 + "}}</tool_call>",
    "an infinite number": lambda: '<tool_call>{"name": "calc", "arguments": {"e": 1e999}}</tool_call>',
    "compact line": lambda: "calc(" + "(" * BIG + ")",
    "compact words": lambda: "a" * BIG + "(",
    "parameters": lambda: "<tool_call><function=calc>" + "<parameter=e>" * 7_000 + "</tool_call>",
    "spaces": lambda: "<tool_call><function=calc>" + " " * 90_000 + "</tool_call>",
    "unclosed names": lambda: "<tool_call>" + "<function=" * 9_000 + "</tool_call>",
    "no letters": lambda: "\0\ud800\n" * (BIG // 3),
    "lines": lambda: "\n" * BIG,
    "nul call": lambda: 'calc({"expression": "\0"})',
    "surrogate": lambda: '<tool_call>{"name": "\ud800", "arguments": {"\ud800": "\udfff"}}</tool_call>',
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_text_is_read_quickly(kind):
    written = HOSTILE[kind]()
    began = time.monotonic()
    for form in FORMATS.values():
        calls, text = form.parse(written, TOOLS)
        assert len(calls) <= MAX_CALLS + 1
        assert all(len(call.error) < 400 for call in calls)
        assert len(text) <= len(written)
    assert time.monotonic() - began < 20  # a quadratic reader needs hours


def test_further_calls_are_one_error():
    calls = FORMATS["hermes"].parse(WRITTEN["hermes"] * 100, TOOLS).calls
    assert [bool(call.error) for call in calls] == [False] * MAX_CALLS + [True]
    listed = FORMATS["nemotron_nano_v2"].render([ToolCall("calc")] * 100)
    assert [bool(c.error) for c in FORMATS["nemotron_nano_v2"].parse(listed).calls] == [False] * MAX_CALLS + [True]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>", "<think>", "</think>", "<function=calc>"]
            + [
                "</function>",
                "<parameter=expression>",
                "</parameter>",
                "calc(",
                ")",
                "\n",
                '{"name": "calc"',
                "}",
                "[",
                "]",
            ]
            + ["\0", "\ud800", '"', "1e400", "Infinity"]
        ),
        max_size=20,
    )
)
def test_any_text_is_read(parts):
    for form in FORMATS.values():
        for call in form.parse("".join(parts), TOOLS).calls:
            assert isinstance(call.name, str)
            assert isinstance(call.arguments, dict)
            assert all(isinstance(key, str) for key in call.arguments)


def test_json_that_is_none():
    assert load_json('{"a": [1, 2.5, null]}') == ({"a": [1, 2.5, None]}, "")
    for text in ("NaN", "-Infinity", "1e999", "{'a': 1}", "[" * 40 + "]" * 40, ""):
        value, error = load_json(text)
        assert value is None
        assert error
