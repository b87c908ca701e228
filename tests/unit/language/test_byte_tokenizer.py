"""The byte tokenizer and the processor over it."""

import random

import pytest
import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import check_example, select_rows, text_message
from bestiary.shared.language.byte_tokenizer import ROLES, ByteTokenizer
from bestiary.shared.language.processor import TextProcessor

PAD, EOS, SYSTEM, USER, ASSISTANT, TOOL = range(256, 262)


def unicode_texts():
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    return ["", "plain", "\x00\n", *("".join(map(chr, rng.choices(points, k=n))) for n in (1, 2, 30, 300))]


@pytest.mark.parametrize("text", unicode_texts(), ids=lambda text: str(len(text)))
def test_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode([PAD, *ids, EOS]) == text


def test_specials():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 262
    assert (tokenizer.pad_id, tokenizer.eos_id) == (PAD, EOS)
    assert tokenizer.encode("<eos>") == list(b"<eos>")  # never read from text
    assert tokenizer.add_tokens(["<image>", "<pad>", "<audio>"]) == [262, PAD, 263]
    assert tokenizer.add_tokens(["<audio>"]) == [263]
    assert tokenizer.vocab_size == 264
    assert tokenizer.decode([0xC3, 0x41]) == "\ufffdA"


def test_chat_by_hand():
    messages = [text_message("system", "s"), text_message("user", "u"), text_message("assistant", "ok")]
    ids, own = ByteTokenizer().chat(messages)
    assert ids == [SYSTEM, ord("s"), EOS, USER, ord("u"), EOS, ASSISTANT, ord("o"), ord("k"), EOS]
    assert own == [False] * 7 + [True] * 3
    prompt, none = ByteTokenizer().chat(messages[:2], add_generation_prompt=True)
    assert prompt == ids[:7]
    assert not any(none)


def test_every_turn_of_the_assistant_is_learnt_and_no_other():
    turns = [text_message(role, role[0]) for role in ("user", "assistant", "tool", "assistant", "user")]
    ids, own = ByteTokenizer().chat(turns)
    assert [i for i, o in zip(ids, own, strict=True) if o] == [ord("a"), EOS, ord("a"), EOS]


def test_chat_refuses():
    with pytest.raises(BadDataError, match="unknown role 'robot'; roles are system, user"):
        ByteTokenizer().chat([text_message("robot", "x")])
    image = {"role": "user", "content": [{"type": "image", "value": None}, {"type": "text", "value": "x"}]}
    with pytest.raises(BadDataError, match=r"text alone.*image"):
        ByteTokenizer().chat([image])
    assert len(ROLES) == 4


@pytest.fixture
def processor():
    return TextProcessor(ByteTokenizer())


TEXTS = [{"id": "a", "text": "abc"}, {"id": "b", "text": "x"}]
CHATS = [
    {"id": "c", "messages": [text_message("user", "hi")], "answer": "yes"},
    {"id": "d", "messages": [text_message("user", "h")], "answer": "n"},
]


def test_training_pads_right(processor):
    batch = processor(TEXTS, "train")
    assert batch["input_ids"].tolist() == [[97, 98, 99, EOS], [120, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[97, 98, 99, EOS], [120, EOS, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 1, 1]]
    assert batch["ids"] == ["a", "b"]
    assert batch["seq_idx"] is None
    assert batch["media"] == {}
    assert all(batch[k].dtype == torch.int64 for k in ("input_ids", "labels", "attention_mask", "position_ids"))


def test_chats_are_learnt_where_the_assistant_speaks(processor):
    batch = processor(CHATS, "train")
    assert batch["input_ids"][0].tolist() == [USER, *b"hi", EOS, ASSISTANT, *b"yes", EOS]
    assert batch["labels"][0].tolist() == [-100] * 5 + [*b"yes", EOS]
    assert batch["labels"][1].tolist() == [-100] * 4 + [ord("n"), EOS] + [-100] * 3
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_prompts_pad_left_and_hold_no_answer(processor):
    batch = processor(CHATS, "prompt")
    assert batch["input_ids"].tolist() == [[USER, *b"hi", EOS, ASSISTANT], [PAD, USER, *b"h", EOS, ASSISTANT]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert (batch["labels"] == -100).all()
    # Text as a prompt is to be continued: no end.
    assert processor(TEXTS, "prompt")["input_ids"].tolist() == [[97, 98, 99], [PAD, PAD, 120]]


def test_max_len():
    processor = TextProcessor(ByteTokenizer(), max_len=3)
    assert processor(TEXTS, "train")["input_ids"].tolist() == [[97, 98, 99], [120, EOS, PAD]]
    # A prompt loses its beginning: its end says who speaks next.
    assert processor(CHATS[:1], "prompt")["input_ids"].tolist() == [[ord("i"), EOS, ASSISTANT]]
    with pytest.raises(BadDataError, match="example 'c' has no token to learn within max_len 3"):
        processor(CHATS, "train")
    assert processor(CHATS, "eval")["input_ids"].shape == (2, 3)


def test_what_is_no_text(processor):
    with pytest.raises(BadDataError, match="'x' is neither text nor chat"):
        processor([{"id": "x", "image": 1}], "train")
    with pytest.raises(BadDataError, match="'x' is empty"):
        processor([{"id": "x", "text": ""}], "prompt")
    with pytest.raises(BadDataError, match="no token to learn"):
        processor([{"id": "x", "text": ""}], "train")


def test_rows_are_selected_with_their_media(processor):
    batch = processor(CHATS, "train")
    features = torch.arange(6.0).view(3, 2)
    batch["media"] = {
        "image": {"features": features, "owner": torch.tensor([0, 1, 1]), "counts": torch.tensor([4, 5, 6])}
    }
    part = select_rows(batch, [1])
    assert part["ids"] == ["d"]
    assert torch.equal(part["input_ids"], batch["input_ids"][1:])
    media = part["media"]["image"]
    assert torch.equal(media["features"], features[1:])
    assert media["owner"].tolist() == [0, 0]
    assert media["counts"].tolist() == [5, 6]
    turned = select_rows(batch, [1, 0])["media"]["image"]
    assert turned["owner"].tolist() == [0, 0, 1]
    assert turned["counts"].tolist() == [5, 6, 4]


def test_examples_are_checked():
    for example, words in (
        ({"text": "x"}, "no id"),
        ({"id": "a"}, "has none"),
        ({"id": "a", "text": "x", "messages": []}, "exactly one"),
        ({"id": "a", "image": torch.zeros(1, 2, 2), "label": torch.zeros(1, 2, 3)}, "does not fit image"),
    ):
        with pytest.raises(BadDataError, match=words):
            check_example(example)
    assert check_example(TEXTS[0]) is TEXTS[0]
