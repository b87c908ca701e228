import contextlib
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.rl.environments.calculator import Calculator, calculate
from bestiary.shared.rl.environments.tool_environment import ToolError, play
from bestiary.shared.rl.protocols import Environment
from bestiary.shared.rl.tool_calls import ToolCall


def example(question="12*7", answer="84"):
    return {
        "id": question,
        "messages": [text_message("user", f"{question}=")],
        "answer": answer,
        "verifier": "exact_text",
    }


# ------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        ("4821*37+905", "179282"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("1/3", "0.333333333333"),
        ("6/3", "2"),
        ("0.1+0.2", "0.3"),
        ("1/3*3", "1"),
        (" 12 × 7 − 4 ÷ 2 ", "82"),
        ("--5", "5"),
        ("0**0", "1"),
        ("(-1)**99999999", "-1"),
        ("0**99999999", "0"),
        ("123456789123456789*987654321987654321", "121932631356500531347203169112635269"),
        ("+".join("1" * 100), "100"),
        ("(" * 149 + "1" + ")" * 149, "1"),
    ],
)
def test_arithmetic_by_hand(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "9**9**9**9**9",
        "2**99999",
        "(2**999)**(2**999)",
        "0.5**99999999999",
        "(9**999)*(9**999)*(9**999)*(9**999)",
        "2**0.5",
        "(-8)**(1/3)",
        "1/0",
        "1//0",
        "1%0",
        "0**-1",
        "",
        " ",
        "2+",
        "abs(1)",
        "__import__('os')",
        "a",
        "1e9",
        "1_000",
        "0x10",
        "'a'*9",
        "[1]*9",
        "(1)(2)",
        "(1,)",
        "()",
        "...",
        "1 2",
        "007",
        "1\n+2",
        "1;2",
        "1<2",
        "2@2",
        "~1",
        "(" * 150 + "1" + ")" * 149,
        "-" * 299 + "1",
        "1" * 301,
        "1" * 10_000_000,
        "1\0",
        "\ud800",
        "١+١",
        "1 if 1 else 2",
    ],
)
def test_what_is_refused(expression):
    with pytest.raises(ToolError):
        calculate(expression)


def _tree(inner):
    return st.one_of(
        st.tuples(st.sampled_from("+-*/"), inner, inner),
        st.tuples(st.sampled_from(["//", "%"]), inner, inner),
        st.tuples(st.just("neg"), inner),
    )


def _written(tree):
    if isinstance(tree, int):
        return str(tree)
    if tree[0] == "neg":
        return f"(-{_written(tree[1])})"
    return f"({_written(tree[1])}{tree[0]}{_written(tree[2])})"


def _worth(tree):
    """A second reader of the same trees, which never sees their text."""
    if isinstance(tree, int):
        return Fraction(tree)
    if tree[0] == "neg":
        return -_worth(tree[1])
    a, b = _worth(tree[1]), _worth(tree[2])
    if tree[0] in "+-*":
        return {"+": a + b, "-": a - b, "*": a * b}[tree[0]]
    whole = (a / b).__floor__()
    return {"/": a / b, "//": Fraction(whole), "%": a - b * whole}[tree[0]]


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.integers(0, 999), _tree, max_leaves=8))
def test_arithmetic_is_exact(tree):
    try:
        worth = _worth(tree)
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="division by zero"):
            calculate(_written(tree))
        return
    found = calculate(_written(tree))
    if worth.denominator == 1:
        assert found == str(worth)
    else:
        assert float(found) == pytest.approx(float(worth), rel=1e-11)


@settings(max_examples=500, deadline=None)
@given(st.text("0123456789+-*/%(). ", max_size=60) | st.text(max_size=30))
def test_any_text_has_a_value_or_an_error(text):
    with contextlib.suppress(ToolError):
        assert len(calculate(text)) < 1100


# ------------------------------------------------------------------ episodes


@pytest.mark.parametrize("form", ["compact", "hermes", "nemotron_nano_v2", "nemotron_3"])
def test_oracle_and_idler(form):
    environment = Calculator(form)
    assert isinstance(environment, Environment)
    name = environment.tools[0].name
    call = environment.format.render([ToolCall(name, {"expression": "12*7"})], environment.tools)
    assert play(environment, example(), [call, "84"])[0] == ["84"]
    assert play(environment, example(), [call, "84"])[1].score == 1.0
    assert play(environment, example(), ["84"])[1].score == 1.0
    for turns in ([""], ["83"], [call, ""], [call, "the answer"], [call]):
        assert play(environment, example(), turns)[1].score == 0.0
    assert environment.counters()["tools/calls"] == 5.0
    assert environment.counters()["tools/errors"] == 0.0
    environment.close()
    environment.close()


def test_who_calls_for_ever_is_cut():
    environment = Calculator(max_turns=4, max_calls=2)
    said, verdict = play(environment, example(), ["calc(12*7)"] * 100)
    assert said == ["84", "84"] + ["error: at most 2 calls can be made; answer now"] * 2
    assert (verdict.score, verdict.note) == (0.0, "the episode was cut before an answer")


def test_a_call_is_no_answer():
    """The answer inside a call does not count, though a lenient verifier would find it there."""
    environment = Calculator("hermes", verifier="numeric", max_turns=1)
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "84"}}</tool_call>'
    assert play(environment, example(), [f"84 {call}"])[1].score == 0.0


def test_errors_are_answered_and_the_episode_goes_on():
    environment = Calculator("hermes", max_turns=10)

    def said(body):
        turns = [f"<tool_call>{body}</tool_call>", "84"]
        answers, verdict = play(environment, example(), turns)
        assert verdict.score == 1.0
        return answers

    assert said('{"name": "calculator", "arguments": {"expression": "9**9**9"}}') == ["error: the result is too large"]
    assert said('{"name": "shell", "arguments": {}}') == ["error: there is no tool 'shell'; there is: calculator"]
    assert "is not of type 'string'" in said('{"name": "calculator", "arguments": {"expression": 3}}')[0]
    assert "required" in said('{"name": "calculator", "arguments": {}}')[0]
    assert "unexpected" in said('{"name": "calculator", "arguments": {"expression": "1", "b": 1}}')[0]
    assert said("{")[0].startswith("error: the call is no JSON")
    assert "no text" in said('{"name": "calculator", "arguments": {"expression": "1\\u0000"}}')[0]
    assert "no text" in said('{"name": "calculator", "arguments": {"expression": "\\ud800"}}')[0]
    big = '{"name": "calculator", "arguments": {"expression": "' + "1" * 10_000_000 + '"}}'
    assert all(len(answer) < 400 for answer in said(big))
    long_name = '{"name": "' + "x" * 50_000 + '", "arguments": {}}'
    assert all(len(answer) < 400 for answer in said(long_name))
    deep = '{"name": "calculator", "arguments": {"expression": ' + "[" * 500 + "]" * 500 + "}}"
    assert said(deep) == ["error: the call is no JSON that can be read: it is nested too deeply"]
    assert environment.counters()["tools/errors"] == environment.counters()["tools/calls"]


def test_several_calls_of_a_turn_are_answered_in_order():
    environment = Calculator("hermes")
    calls = [ToolCall("calculator", {"expression": f"{i}+1"}) for i in range(3)]
    turn = environment.reset(example(), 0).step(environment.format.render(calls))
    assert not turn.done
    assert [m["role"] for m in turn.messages] == ["tool"] * 3
    assert [m["content"][0]["value"] for m in turn.messages] == ["1", "2", "3"]


def test_thoughts_are_not_calls():
    environment = Calculator(thinking=True, max_turns=3)
    turns = ["I could use it:\ncalc(12*7)", "84"]
    assert play(environment, example(), turns)[0] == []  # the first turn is all thought, and ends the episode
    assert play(environment, example(), ["hm</think>calc(12*7)", "84"])[0] == ["84"]


def test_the_system_turn():
    asked = example()
    assert Calculator("compact").prompt(asked) == asked
    shown = Calculator("hermes").prompt(asked)
    assert [m["role"] for m in shown["messages"]] == ["system", "user"]
    assert '"name": "calculator"' in shown["messages"][0]["content"][0]["value"]
    assert shown["answer"] == "84"
    assert asked == example()
    with_system = {**asked, "messages": [text_message("system", "Be brief."), *asked["messages"]]}
    shown = Calculator("compact", system="calc() works").prompt(with_system)
    assert "".join(c["value"] for c in shown["messages"][0]["content"]) == "Be brief.\n\ncalc() works"
    assert len(with_system["messages"][0]["content"]) == 1


def test_bad_settings():
    with pytest.raises(ConfigError, match="max_turns must be 1 or more"):
        Calculator(max_turns=0)
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        Calculator("Hermes")


def test_equal_turns_get_equal_answers():
    environment = Calculator(max_turns=5)
    draw = random.Random(0)
    turns = [f"calc({draw.randint(0, 99)}*{draw.randint(0, 99)})" for _ in range(4)]
    assert play(environment, example(), [*turns, "84"]) == play(environment, example(), [*turns, "84"], seed=7)
