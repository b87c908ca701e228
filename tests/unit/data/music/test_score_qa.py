"""The source: what each part holds, that only right answers score, and that nothing of a test is trained on."""

import re

import numpy as np
import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import compose
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.music.clips import Clip
from bestiary.shared.data.music.questions import (
    ANSWERS,
    QUESTIONS,
    TIME_TASKS,
    answers,
    ask_choice,
    baselines,
    chance,
    describe,
    words,
)
from bestiary.shared.data.music.score_qa import CLASSES, KINDS, STAGES, ScoreQA
from bestiary.shared.language.word_tokenizer import PIECE, word_list
from bestiary.shared.rl.rewards.format import Format
from bestiary.shared.rl.rewards.format_and_answer import FormatAndAnswer
from bestiary.shared.rl.rewards.metadata import Metadata
from bestiary.shared.rl.rewards.registry import make_verifier, self_test
from bestiary.shared.rl.rewards.text import ExactText

STREAM = Stream(0, "sft", 4)
ALL_TASKS = ("instrument", "metre", "key_signature", "key", "tempo", "texture", "chord")


@pytest.fixture
def make(small_music):
    def source(**changes):
        options = {"train_clips": 12, "held_out_clips": 8, "seconds": 1.5, "time_seconds": 4.0, "workers": 0}
        return ScoreQA(**{**options, **changes})

    return source


def text_of(example):
    return example["messages"][0]["content"][1]["value"]


def test_it_is_a_source(small_music):
    data = build(compose(["+project=_examples", "dataset=score_qa"])[0].dataset)
    assert isinstance(data, DataSource)
    data.check()
    assert (data.spec().task, data.spec().modalities) == ("chat", ("audio",))
    assert not list(small_music.glob("music/*clips*"))  # made, described and checked without rendering


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    data = ScoreQA()
    with pytest.raises(MissingDataError, match=r"Get it with: python tools/fetch\.py timgm6mb$"):
        data.check()
    with pytest.raises(MissingDataError, match=r"no soundfont .*mine\.sf2"):
        ScoreQA(soundfont=str(tmp_path / "mine.sf2")).check()
    (tmp_path / "mine.sf2").write_bytes(b"")
    with pytest.raises(MissingDataError, match=r"python tools/fetch\.py tinysoundfont$"):
        ScoreQA(soundfont=str(tmp_path / "mine.sf2")).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_clips": 0}, "train_clips must be 1 or more, not 0"),
        ({"seconds": 0.5}, "seconds must be between"),
        ({"time_seconds": 3}, "seconds must be between"),
        ({"tasks": ["meter"]}, "no task 'meter'.*there are: instrument, metre"),
        ({"tasks": ["entry"]}, "no task 'entry'"),
        ({"tasks": []}, "tasks names none"),
        ({"kinds": {"caption": 1.0}}, "kinds gives weights to some of questions, choice, captions, time"),
        ({"kinds": {"time": 0.0}}, "kinds gives weights"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        ScoreQA(**options)


def test_parts_that_are_not_there(make):
    for part in ("sfd", "rl/question", "questions"):
        with pytest.raises(ConfigError, match="score_qa has no part"):
            make().held_out("val", part)
        with pytest.raises(ConfigError, match="score_qa has no part"):
            make().train_example(0, STREAM, part)
    with pytest.raises(ConfigError, match="holds out val and test, not 'train'"):
        make().held_out("train")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_part_is_well_formed(make, stage, kind):
    data = make(tasks=ALL_TASKS)
    part = f"{stage}/{kind}"
    held = data.held_out("test", part)
    seconds = 4.0 if kind == "time" and stage != "attributes" else 1.5
    for example in [*(data.train_example(k, STREAM, part) for k in range(12)), *held]:
        check_example(example)
        (message,) = example["messages"]
        audio = message["content"][0]
        assert (message["role"], audio["type"], audio["rate"]) == ("user", "audio", 16000)
        assert (audio["value"].shape, audio["value"].dtype) == ((round(seconds * 16000),), np.float32)
        assert np.abs(audio["value"]).max() > 0.01
        assert re.fullmatch(r"score_qa/[0-9a-f]{16}/\d+", audio["key"])
        assert len(message["content"]) == (1 if stage == "attributes" else 2)
        assert ("verifier" in example) == (stage == "rl")
        assert {"tune", "tradition", "classes"} <= set(example["meta"])
        assert (example["answer"] == "") == (stage == "attributes")
        if stage == "think":
            assert Format(answer="answer").verify("", example["answer"], example).score == 1.0
    assert len({example["id"] for example in held}) == len(held)
    assert [e["id"] for e in held[2:5]] == [held[i]["id"] for i in (2, 3, 4)]


def test_a_clip_has_one_key_and_clips_have_different_ones(make):
    data = make()
    by_key: dict[str, np.ndarray] = {}
    examples = [*data.held_out("val", "rl"), *data.held_out("test", "rl"), *data.held_out("test", "rl/time")]
    for example in examples:
        audio = example["messages"][0]["content"][0]
        known = by_key.setdefault(audio["key"], audio["value"])
        assert np.array_equal(known, audio["value"])
    assert len(by_key) == 24
    sounds = [value.tobytes() for value in by_key.values()]
    assert len(set(sounds)) == 24


def test_right_answers_and_only_they_score(make):
    data = make(tasks=ALL_TASKS, held_out_clips=20)
    plain = {name: make_verifier(name) for name in ("exact_text", "multiple_choice", "metadata")}
    combined = FormatAndAnswer()
    seen = set()
    for kind in KINDS:
        held = list(data.held_out("test", f"rl/{kind}"))
        self_test(plain, held)
        self_test({"format_and_answer": combined}, held, only="format_and_answer")
        thinking = {e["id"].removeprefix("think-"): e["answer"] for e in data.held_out("test", f"think/{kind}")}
        for example in held:
            seen.add(example["meta"]["task"])
            # The chain of the same question ends in the answer that is rewarded.
            assert combined.verify(example["answer"], thinking[example["id"]], example).score == combined.best
            task = example["meta"]["task"]
            for wrong in ANSWERS.get(task, []) if kind in ("questions", "time") else []:
                said = f"<think>so</think><answer>{wrong}</answer>"
                score = combined.verify(example["answer"], said, example).score
                assert (score == combined.best) == (wrong == example["answer"])
    assert seen == {*ALL_TASKS, *TIME_TASKS, "caption"}


def test_no_two_answers_look_alike_to_the_verifier():
    """Punctuation is left out when answers are compared, so F# must not be spelt like F."""
    verifier = ExactText(ignore_case=True, ignore_punctuation=True, ignore_spaces=True)
    clip = Clip([], 12.0, "", "", {}, classes={"key_signature": 3})
    for task in (*ANSWERS, "chord", "entry"):
        found = answers(clip, task)
        assert len({verifier._plain(answer) for answer in found}) == len(found)


def test_descriptions_name_their_record_and_no_other(make):
    data = make(held_out_clips=8)
    held = data.held_out("test", "rl/captions")
    metadata = Metadata(answer_tag="answer")
    others = []
    for index, example in enumerate(held):
        metadata.check(example)
        assert metadata.verify("", f"<answer>{example['answer']}</answer>", example).score == 1.0
        neighbour = held[(index + 1) % len(held)]["answer"]
        others.append(metadata.verify("", f"<answer>{neighbour}</answer>", example).score)
    assert max(others) < 1.0
    assert np.mean(others) < 0.7


@pytest.mark.parametrize("sharps", range(12))
def test_a_description_of_any_key_and_chord_scores(sharps):
    """Keys and chords with sharps and flats, where a verifier that drops signs would hear another."""
    clip = Clip([], 6.0, "", "", {"metre": "duple"}, classes={"key_signature": sharps})
    common = {"Instruments": ["flute"], "Structure": "four voices", "Meter": "4/4", "BPM": "92"}
    signature = ANSWERS["key_signature"][sharps]
    verifier = Metadata()
    for record in (
        *({"Genre": "chorale", "Theory": chord} for chord in answers(clip, "chord")),
        *({"Genre": "air", "Key": key} for key in ANSWERS["key"]),
    ):
        clip.record = {**common, "Key signature": signature, **record}
        text = describe(clip, np.random.default_rng(0))
        example = {"id": "x", "meta": {"metadata": clip.record}}
        verdict = verifier.verify("", text, example)
        assert verdict.score == 1.0, (text, verdict)


def test_choices(make):
    data = make(tasks=ALL_TASKS)
    places = []
    for example in [*data.held_out("test", "rl/choice"), *data.held_out("val", "rl/choice")]:
        meta = example["meta"]
        options = meta["options"]
        assert list(options) == list("ABCD")[: len(options)]
        assert len(set(options.values())) == len(options)
        assert all(f"({letter}) {option}" in text_of(example) for letter, option in options.items())
        assert len(options) == {"metre": 3, "tempo": 3, "texture": 2}.get(meta["task"], 4)
        places.append(example["answer"])
    assert set(places) == set("ABCD")


def test_choices_hold_no_second_right_answer_and_all_that_is_heard():
    rng = np.random.default_rng(0)
    labels = {"chord": "D flat major", "last_instrument": "flute", "entry": "9 seconds"}
    entries = [("piano", 0), ("organ", 4), ("flute", 9)]
    clip = Clip([], 12.0, "", "", labels, classes={"key_signature": 9}, entries=entries, entering="flute")
    right = []
    for _ in range(60):
        chords = ask_choice(clip, "chord", rng).options
        assert "C sharp major" not in chords.values()
        asked = ask_choice(clip, "last_instrument", rng)
        assert {"piano", "organ", "flute"} <= set(asked.options.values())
        right.append(asked.answer)
        seconds = ask_choice(clip, "entry", rng)
        assert all(3 <= int(option.split()[0]) <= 9 for option in seconds.options.values())
        assert "flute enter" in seconds.text
    assert set(right) == set("ABCD")


def test_attributes_are_the_labels(make):
    data = make()
    asked = make(tasks=("instrument", "metre", "key_signature", "tempo", "texture"))
    classes = {e["id"]: e["meta"]["classes"] for e in data.held_out("test", "attributes")}
    assert len(classes) == 8
    for example in asked.held_out("test"):
        name = "-".join(example["id"].split("-")[:2])
        task = example["meta"]["task"]
        assert CLASSES[task][classes[name][task]] == example["answer"]


def test_thoughts_are_the_record(make):
    for example in make().held_out("val", "think"):
        record = example["meta"]["metadata"]
        instrument, signature = record["Instruments"][0], record["Key signature"]
        chain = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", example["answer"])
        said = re.fullmatch(r"instrument (.*), metre (.*), key signature (.*)", chain[1])
        assert (said[1], said[3]) == (instrument, signature)
        assert (
            said[2] == {"2": "duple", "4": "duple", "3": "triple", "6": "compound", "9": "compound"}[record["Meter"][0]]
        )
        assert chain[2] in said.groups()


def test_sample_k_depends_on_nothing_else(make):
    one, two = make(), make()
    ahead = [two.train_example(k, STREAM, "rl") for k in (7, 3)]
    for k, expected in ((3, ahead[1]), (7, ahead[0])):
        found = one.train_example(k, STREAM, "rl")
        assert (found["id"], text_of(found), found["answer"]) == (expected["id"], text_of(expected), expected["answer"])
        assert np.array_equal(*(e["messages"][0]["content"][0]["value"] for e in (found, expected)))
    numbers = [one.train_example(k, STREAM, "rl")["id"].split("-")[1] for k in range(12)]
    assert sorted(map(int, numbers)) == list(range(12))
    assert numbers != [one.train_example(k, Stream(1, "sft", 4), "rl")["id"].split("-")[1] for k in range(12)]


def test_kinds_come_by_their_weights(make):
    data = make(kinds={"questions": 1.0, "captions": 3.0, "time": 0.0})
    tasks = [data.train_example(k, STREAM, "sft")["meta"]["task"] for k in range(120)]
    assert 70 < tasks.count("caption") < 108
    assert set(tasks) <= {"caption", "instrument", "metre", "key_signature"}
    # A part that names its kind has no other, and attributes are of clips of one instrument.
    assert {data.train_example(k, STREAM, "sft/time")["meta"]["task"] for k in range(20)} <= set(TIME_TASKS)
    assert all(make(kinds={"time": 1.0}).train_example(k, STREAM, "attributes")["meta"]["classes"] for k in range(4))


def test_only_what_is_asked_for_is_asked(make):
    """Chords are known of chorales alone: a clip of which none is known gives its place to one that has one."""
    data = make(tasks=["chord"], train_clips=40)
    assert {data.train_example(k, STREAM, "rl")["meta"]["task"] for k in range(20)} == {"chord"}
    assert len(data.held_out("test")) == sum("chord" in data.clip("clip", "test", n).labels for n in range(8))
    without = make(tasks=["chord"], train_clips=1)
    if "chord" not in without.clip("clip", "train", 0).labels:
        with pytest.raises(ConfigError, match="of 1 clips none has a known answer to chord"):
            without.train_example(0, STREAM, "rl")


def test_no_tune_is_on_two_sides(make):
    data = make(train_clips=60, held_out_clips=30)
    tunes = {
        split: {
            tune
            for kind in ("clip", "time_clip")
            for number in range(data.counts[split])
            for tune in data.clip(kind, split, number).tune.split(" + ")
        }
        for split in ("train", "val", "test")
    }
    assert all(tunes.values())
    assert not tunes["train"] & (tunes["val"] | tunes["test"])
    assert not tunes["val"] & tunes["test"]


def test_the_revision_names_what_is_held_out(small_music, tmp_path):
    font = tmp_path / "f.sf2"
    font.write_bytes(b"x")
    changes = [{}, {"seed": 1}, {"seconds": 5.0}, {"held_out_clips": 4}, {"tasks": ["metre"]}, {"soundfont": str(font)}]
    assert len({ScoreQA(**change).revision for change in changes}) == len(changes)
    assert ScoreQA(workers=1).revision == ScoreQA().revision


def test_words_are_all_there(make):
    known = set(words())
    data = make(tasks=ALL_TASKS, held_out_clips=20)
    for kind in KINDS:
        for stage in ("think", "sft"):
            for example in data.held_out("test", f"{stage}/{kind}"):
                for piece in PIECE.findall(text_of(example) + " " + example["answer"]):
                    assert piece.strip() in known | {""}, piece
    assert {"0", "250", "compound", "<think>", "</answer>", "half", "air", "strathspey"} <= known
    assert known <= set(word_list("music"))  # the tokenizer that small models read them with
    for ways in QUESTIONS.values():
        assert 1 <= len(ways) <= 3


def test_baselines_by_hand():
    clips = [
        Clip([], 6.0, "", "", {"metre": metre, "texture": texture})
        for metre, texture in (("duple", "4"), ("duple", "4"), ("triple", "4"), ("compound", "1"), ("compound", "1"))
    ]
    found = baselines([*clips, Clip([], 6.0, "", "", {})], "metre")
    assert found == {"chance": pytest.approx(1 / 3), "majority": 0.4, "texture": 0.8}
    assert chance(clips[0], "instrument") == 1 / 8
    assert chance(clips[0], "instrument", choice=True) == 1 / 4
    assert chance(clips[0], "metre", choice=True) == pytest.approx(1 / 3)
    assert chance(Clip([], 12.0, "", "", {}), "entry") == 1 / 7  # 3 to 9
    with pytest.raises(BadDataError, match="none of 1 clips"):
        baselines(clips[:1], "chord")
