"""tiny_talk: what it holds out it never trains on."""

import pytest

from bestiary.projects._examples.data import WORDS, TinyTalk
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import split_of


@pytest.fixture(scope="module")
def source():
    return TinyTalk(window=50, held_out_chats=40)


def solve(question):
    """The tasks, done here."""
    words = question.split()
    if words[0] == "say":
        return f"{words[1]} {words[2]}"
    if words[0] == "upper":
        return f"{words[1]} {words[2]}".upper()
    if words[0] == "swap":
        return f"{words[2]} {words[1]}"
    assert question.startswith("first letter of ")
    return f"{words[3][0]} {words[4][0]}"


def question(example):
    return example["messages"][-1]["content"][0]["value"]


def test_it_is_a_source(source):
    assert isinstance(source, DataSource)
    source.check()
    assert source.spec().task == "chat"
    assert source.revision == TinyTalk().revision


def test_answers_are_right(source):
    examples = [source.train_example(k, Stream(0, "chat"), "chat") for k in range(300)]
    examples += [*source.held_out("val", "chat"), *source.held_out("test")]
    for example in examples:
        check_example(example)
        assert example["answer"] == solve(question(example))
    assert {question(e).split()[0] for e in examples} == {"say", "upper", "first", "swap"}
    assert len(set(WORDS)) == len(WORDS)


def test_held_out_questions_are_never_trained_on(source):
    held = {question(e) for s in ("val", "test") for e in source.held_out(s, "chat")}
    assert len(held) == 80
    assert not held & {question(source.train_example(k, Stream(1, "chat"), "chat")) for k in range(3000)}


def test_held_out_text_is_never_trained_on(source):
    held = [e["text"] for s in ("val", "test") for e in source.held_out(s, "text")]
    assert len(held) > 4
    train = {n: t for n, t in source.topics.items() if split_of(n) == "train"}
    assert len(held) + len(train) == len(source.topics)
    joined = "\n\n".join(train.values())
    for k in range(100):
        text = source.train_example(k, Stream(0, "text"), "text")["text"]
        assert len(text) == 50
        assert text in joined


def test_samples_are_pure(source):
    for part in ("text", "chat"):
        one = [source.train_example(k, Stream(0, "s"), part) for k in range(30)]
        assert [TinyTalk(50).train_example(k, Stream(0, "s"), part) for k in reversed(range(30))] == one[::-1]
        assert [source.train_example(k, Stream(1, "s"), part) for k in range(30)] != one
    assert source.held_out("val", "chat") == TinyTalk(50, 40).held_out("val", "chat")
    assert TinyTalk(50, 10).held_out("val", "chat") == source.held_out("val", "chat")[:10]


def test_an_unknown_part(source):
    with pytest.raises(ConfigError, match="the parts text and chat, not 'speech'"):
        source.train_example(0, Stream(0, "s"), "speech")
    with pytest.raises(ConfigError, match="not 'speech'"):
        source.held_out("val", "speech")
