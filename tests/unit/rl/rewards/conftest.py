"""Rows as a shaping sees them, and texts that hostile completions are made of."""

from __future__ import annotations

import pytest

from bestiary.shared.rl.protocols import ScoredRow, Verdict


@pytest.fixture
def scored_rows():
    """`scored_rows([["text", …], …], tokens=[[3, …], …], prompt="…")` gives groups of rows."""

    def make(texts, tokens=None, prompt="a question"):
        content = [{"type": "text", "value": prompt}]
        example = {"id": "e", "meta": {}, "messages": [{"role": "user", "content": content}]}
        return [
            [
                ScoredRow(example, text, tokens[p][g] if tokens else len(text), "stop", Verdict(0.0))
                for g, text in enumerate(group)
            ]
            for p, group in enumerate(texts)
        ]

    return make


@pytest.fixture(scope="session")
def hostile_texts() -> dict[str, str]:
    """Answers that a verifier must outlive: a megabyte each, one of ten; a quadratic search of one takes an hour."""
    size = 1_000_000
    return {
        "empty": "",
        "nul": "\0" * 1000,
        "surrogates": "\ud800\udfff" * 1000,
        "digits": "9" * 10 * size,
        "spaces": " " * size,
        "boxes": "\\boxed{" * (size // 7),
        "braces": "\\boxed{" + "{" * size,
        "tags": "<answer>" * (size // 8),
        "closing tags": "</answer>" * (size // 9),
        "thoughts": "</think>" * (size // 8),
        "fences": "```json\n" * (size // 8),
        "brackets": "[" * size,
        "nested json": '{"a":' * (size // 5),
        "letters": "answer is A or " * (size // 15),
        "commas": "1," * (size // 2),
        "huge exponent": "\\boxed{1e999999999}",
        "huge fraction": "\\boxed{" + "9" * 5000 + "/7}",
        "foreign": "漢字" * (size // 8),
        "not a number": "<answer>nan</answer>",
        "combining": "é" + "\u0301" * 100_000,
    }
