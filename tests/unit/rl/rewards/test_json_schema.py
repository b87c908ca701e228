"""Structured output against schemas, by hand-worked cases and attacks."""

from __future__ import annotations

import json

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.rewards.json_schema import JsonSchema

pytest.importorskip("jsonschema")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "tags": {"type": "array"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def verifier():
    made = JsonSchema(workers=1, deadline_s=5.0)
    yield made
    made.close()


def of(schema):
    return {"id": "e", "meta": {"schema": schema}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "a", "age": 3}', 1),
        ('<think>{"x": 1}</think>\n{"name": "", "age": 0, "tags": []}\n', 1),
        ('Here it is:\n```json\n{"name": "a", "age": 3}\n```\nDone.', 1),
        ('```\n{"name": "a", "age": 3}\n```', 1),
        ('```json\n{"name": "a", "age": 3}\n```\n```json\n{}\n```', 0),
        ('{"name": "a"}', 0),
        ('{"name": "a", "age": -1}', 0),
        ('{"name": "a", "age": 3, "more": 1}', 0),
        ('{"name": "a", "age": 3, "age": 4}', 0),
        ('{"name": "a", "age": NaN}', 0),
        ('{"name": "a", "age": 1e999}', 0),
        ('{"name": "a", "age": 3,}', 0),
        ("{'name': 'a', 'age': 3}", 0),
        ('It is {"name": "a", "age": 3}', 0),
        ('{"name": "a", "age": 3, "tags": ' + "[" * 70 + "]" * 70 + "}", 0),
        ('{"name": "a", "age": ' + "9" * 5000 + "}", 0),
        ("", 0),
    ],
)
def test_answers(verifier, answer, expected):
    verdict = verifier.verify("", answer, of(SCHEMA))
    assert (verdict.score, verdict.status) == (expected, "ok")


def test_hostile_texts(verifier, hostile_texts):
    for name, text in hostile_texts.items():
        verdict = verifier.verify("", text, of(SCHEMA))
        assert verdict.score == 0, name
        assert verdict.status != "error", name


def test_a_catastrophic_pattern_is_the_answers_timeout():
    verifier = JsonSchema(workers=1, deadline_s=1.0)
    example = of({"type": "string", "pattern": "^(a+)+$"})
    assert verifier.verify("", '"aaa"', example).score == 1
    verdict = verifier.verify("", json.dumps("a" * 40 + "!"), example)
    assert (verdict.score, verdict.status) == (0, "timeout")
    assert verifier.verify("", '"aaa"', example).score == 1
    verifier.close()


def test_bad_schemas_are_found_before_the_run(verifier):
    verifier.check(of(SCHEMA))
    verifier.check(of(json.dumps(SCHEMA)))
    for schema in (None, {"type": "nope"}, 3, "{", {"minimum": "a"}):
        with pytest.raises(BadDataError, match="example 'e'"):
            verifier.check(of(schema))
    assert verifier.verify("", "{}", of({"type": "nope"})).status == "error"
    # Nothing is fetched for a reference: it cannot be followed, which is the schema's fault.
    assert verifier.verify("", "{}", of({"$ref": "http://127.0.0.1:9/schema"})).status == "error"


def test_the_gold_answer(verifier):
    assert verifier.gold_answer({"id": "e", "answer": "{}"}) == "{}"
    assert verifier.gold_answer({"id": "e", "answer": {"a": 1}}) == '{"a": 1}'
    assert verifier.gold_answer({"id": "e"}) is None
