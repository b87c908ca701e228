"""Chat formats, as strings written by hand."""

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import text_message as m
from bestiary.shared.language.chat_templates import TEMPLATES, chatml, message_text, nemotron_h, nemotron_nano_v2


def text(segments):
    return "".join(s.text for s in segments)


def own(segments):
    return [s.text for s in segments if s.own]


TURNS = [m("system", "Be brief."), m("user", "2+2?"), m("assistant", "4"), m("user", "Sure?")]


def test_chatml():
    out = chatml([*TURNS, m("assistant", "Yes")])
    assert text(out) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    assert own(out) == ["4", "<|im_end|>", "Yes", "<|im_end|>"]
    assert text(chatml(TURNS[1:2], True)) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_nemotron_nano_v2():
    out = nemotron_nano_v2([*TURNS, m("assistant", "<think>\nHm.\n</think>\nYes")])
    assert text(out) == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\n2+2?\n<SPECIAL_11>Assistant\n4\n<SPECIAL_12>\n"
        "<SPECIAL_11>User\nSure?\n<SPECIAL_11>Assistant\n<think>\nHm.\n</think>\nYes\n<SPECIAL_12>\n"
    )
    assert own(out) == ["4", "\n<SPECIAL_12>", "<think>\nHm.\n</think>\nYes", "\n<SPECIAL_12>"]
    # What people wrote is never read as a special token.
    assert [s.text for s in out if not s.control] == ["Be brief.", "2+2?", "4", "Sure?", "<think>\nHm.\n</think>\nYes"]


def test_thoughts_of_earlier_turns_are_dropped():
    turns = [m("user", "a"), m("assistant", "<think>\nlong\n</think>\n\nb"), m("user", "c")]
    head = "<SPECIAL_10>System\n\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\nb\n<SPECIAL_12>\n<SPECIAL_11>User\nc\n"
    assert text(nemotron_nano_v2(turns, True)) == head + "<SPECIAL_11>Assistant\n<think>\n"
    trained = nemotron_nano_v2([*turns, m("assistant", "<think>\nx\n</think>\nd")])
    assert text(trained) == head + "<SPECIAL_11>Assistant\n<think>\nx\n</think>\nd\n<SPECIAL_12>\n"


@pytest.mark.parametrize(
    ("turns", "thinking", "on", "cleaned"),
    [
        ([m("user", "hi")], None, True, "\n<SPECIAL_11>User\nhi\n"),  # on by default
        ([m("system", "/no_think"), m("user", "hi")], None, False, "\n<SPECIAL_11>User\nhi\n"),
        ([m("system", "Be kind. /no_think"), m("user", "hi /think")], None, True, "Be kind.\n<SPECIAL_11>User\nhi\n"),
        ([m("user", "/think a /no_think")], None, False, "\n<SPECIAL_11>User\na\n"),  # the last one wins
        ([m("user", "/no_think a /think")], None, True, "\n<SPECIAL_11>User\na\n"),
        ([m("user", "/no_think a")], True, True, "\n<SPECIAL_11>User\na\n"),  # who asks beats what is written
        ([m("user", "a")], False, False, "\n<SPECIAL_11>User\na\n"),
    ],
)
def test_switches(turns, thinking, on, cleaned):
    end = "<SPECIAL_11>Assistant\n" + ("<think>\n" if on else "<think></think>")
    assert text(nemotron_nano_v2(turns, True, thinking)) == f"<SPECIAL_10>System\n{cleaned}{end}"


def test_a_switch_in_an_answer_is_no_switch():
    turns = [m("user", "how?"), m("assistant", "write /no_think"), m("user", "ok")]
    assert text(nemotron_nano_v2(turns, True)).endswith("<think>\n")


def test_tools():
    tools = [{"name": "add", "parameters": {"a": "int"}}]
    turns = [m("user", "1+1"), m("assistant", '<TOOLCALL>[{"name": "add"}]</TOOLCALL>'), m("tool", "2")]
    listed = '<AVAILABLE_TOOLS>[{"name": "add", "parameters": {"a": "int"}}]</AVAILABLE_TOOLS>'
    assert text(nemotron_nano_v2(turns, True, None, tools)) == (
        f"<SPECIAL_10>System\n{listed}\n<SPECIAL_11>User\n1+1\n"
        '<SPECIAL_11>Assistant\n<TOOLCALL>[{"name": "add"}]</TOOLCALL>\n<SPECIAL_12>\n'
        "<SPECIAL_11>User\n<TOOL_RESPONSE>2</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think>\n"
    )
    with_system = text(nemotron_nano_v2([m("system", "x"), *turns], False, None, tools))
    assert with_system.startswith(f"<SPECIAL_10>System\nx\n\n{listed}\n<SPECIAL_11>User\n")


def test_nemotron_h():
    turns = [m("system", "Be brief."), m("user", "/no_think hi")]
    tail = "<SPECIAL_11>User\n/no_think hi\n<SPECIAL_11>Assistant\n"  # that switch is another model's
    assert text(nemotron_h(turns, True, True)) == (
        "<SPECIAL_10>System\n{'reasoning': True}\nBe brief.\n" + tail + "<think>\n"
    )
    assert text(nemotron_h(turns, True, False)) == (
        "<SPECIAL_10>System\n{'reasoning': False}\nBe brief.\n" + tail + "<think></think>"
    )
    written = [m("system", "{'reasoning': False}"), turns[1]]
    assert text(nemotron_h(written, True)) == "<SPECIAL_10>System\n{'reasoning': False}\n" + tail + "<think></think>"
    assert text(nemotron_h(written, True, True)) == "<SPECIAL_10>System\n{'reasoning': True}\n" + tail + "<think>\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_no_text(name):
    with pytest.raises(BadDataError, match="unknown role 'robot'"):
        TEMPLATES[name]([{"role": "robot", "content": []}])
    with pytest.raises(BadDataError, match="text alone, and a message has image"):
        TEMPLATES[name]([{"role": "user", "content": [{"type": "image", "value": 1}]}])
    parts = {"role": "user", "content": [{"type": "text", "value": "a"}, {"type": "text", "value": "b"}]}
    assert message_text(parts) == "ab"


def test_a_path_is_no_switch():
    said = [("user", "open /home/me/thinkpad.txt /think"), ("tool", "see /no_think"), ("user", "and /no_think/ too")]
    turns = [{"role": r, "content": [{"type": "text", "value": t}]} for r, t in said]
    text = "".join(s.text for s in nemotron_nano_v2(turns, add_generation_prompt=True))
    assert "open /home/me/thinkpad.txt\n" in text
    assert "<TOOL_RESPONSE>see /no_think</TOOL_RESPONSE>" in text
    assert "and /no_think/ too" in text
    assert text.endswith("Assistant\n<think>\n")  # the tool's words switch nothing


def test_an_answer_without_a_thought_is_learned_as_it_is_asked_for():
    turns = [
        {"role": r, "content": [{"type": "text", "value": t}]}
        for r, t in (("user", "hi /no_think"), ("assistant", "yo"))
    ]
    learned = nemotron_nano_v2(turns)
    prompt = "".join(s.text for s in nemotron_nano_v2(turns[:1], add_generation_prompt=True))
    assert "".join(s.text for s in learned).startswith(prompt + "yo")
    assert "".join(s.text for s in learned if s.own) == "yo\n<SPECIAL_12>"
