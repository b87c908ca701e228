"""MuChoMusic in its two layouts, and RUListening's variant."""

from __future__ import annotations

from collections import Counter

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.music_benchmarks.muchomusic import MuChoMusic, RULMuChoMusic
from bestiary.shared.rl.rewards.text import options_of

README = {  # the benchmark's own example of a row
    "id": 415600,
    "prompt": "Question: What rhythm pattern do the digital drums follow? Options: (A) Four on the floor. (B) Off-beat "
    "syncopation. The correct answer is: ",
    "answers": ["Pop music", "Reggae", "Latin rock", "Ska"],
    "answer_orders": [3, 0, 2, 1],
    "dataset": "sdd",
    "genre": "Reggae",
    "reasoning": ["genre and style"],
    "knowledge": [],
    "audio_path": "data/sdd/audio/00/415600.2min.mp3",
}


def prepared(**changes):
    return {**README, "audio_path": "data/sdd/audio/00/415600.2min.wav", **changes}


def test_prepared_prompts(tone, put, tmp_path, pieces):
    tone("data/sdd/audio/00/415600.2min.wav")
    put("muchomusic.json", [prepared(), prepared(answer_orders=[0, 1, 2, 3], reasoning=[], knowledge=["melody"])])
    source = MuChoMusic(tmp_path)
    source.check()
    first, second = source.held_out("test")
    audio, text = pieces(first)
    assert len(audio) == 1
    assert text == (
        "Question: What rhythm pattern do the digital drums follow?\n"
        "Options: (A) Pop music (B) Reggae (C) Latin rock (D) Ska\nThe correct answer is:"
    )
    assert (first["answer"], first["meta"]["answer_text"]) == ("B", "Reggae")
    assert first["meta"]["reasoning"] == ["genre and style"]
    assert (first["meta"]["kind"], second["meta"]["kind"]) == ("reasoning", "knowledge")
    assert second["answer"] == "A"
    assert first["id"] != second["id"]  # a track has several questions


def test_examples_before_the_question_are_not_the_question(tone, put, tmp_path, pieces):
    tone("415600.2min.wav")
    shots = "Question: Is it loud? Options: (A) yes The correct answer is: (A)\n Question: What now?\n Options: (A) x"
    put("muchomusic.json", [prepared(prompt=shots)])
    assert pieces(MuChoMusic(tmp_path).held_out("test")[0])[1].startswith("Question: What now?\n")


def test_faults_of_prepared_prompts(tone, put, tmp_path):
    tone("415600.2min.wav")
    rows = [
        prepared(answer_orders=[1, 2, 3, 4]),
        prepared(answers=["x"] * 4),
        prepared(audio_path="data/9.mp3"),
        prepared(prompt=""),
    ]
    put("muchomusic.json", rows)
    with pytest.raises(BadDataError) as told:
        MuChoMusic(tmp_path).check()
    for part in (
        "4 faults in 4 rows",
        "1-415600: it has no answer",
        "is not exactly one",
        "'data/9.mp3'",
        "asks nothing",
    ):
        assert part in str(told.value)


CSV = """question,correct_answer,distractor_1_answer,distractor_2_answer,distractor_3_answer,dataset,\
dataset_identifier,genre,music_knowledge,music_reasoning
Which drum?,Snare,Kick,Tabla,Conga,sdd,1004034.json,Rock,"['instrumentation']",
Which mood?,Sad,Glad,Mad,"Bad, or so",musiccaps,ZZ_y7-a_12.json,,,"[""mood""]"
"""


def test_the_public_csv(tone, put, tmp_path, pieces):
    tone("sdd/audio/34/1004034.2min.wav", 0.1)
    tone("musiccaps/audio/[ZZ_y7-a]-[30-40].wav", 0.2)
    put("muchomusic.csv", CSV)
    first, second = MuChoMusic(tmp_path).held_out("test")
    assert pieces(first)[0][0]["value"][0] == pytest.approx(0.1)
    assert pieces(second)[0][0]["value"][0] == pytest.approx(0.2)
    assert sorted(first["meta"]["options"]) == ["Conga", "Kick", "Snare", "Tabla"]
    assert options_of(first)[first["answer"]] == "Snare"
    assert options_of(second)[second["answer"]] == "Sad"
    assert first["meta"]["knowledge"] == ["instrumentation"]
    assert second["meta"]["reasoning"] == ["mood"]
    assert [e["meta"]["options"] for e in MuChoMusic(tmp_path).held_out("test")] == [
        e["meta"]["options"] for e in (first, second)
    ]


def test_orders_made_here_leave_no_hint(tone, put, tmp_path):
    tone("t.wav")
    head = CSV.splitlines()[0]
    put("muchomusic.csv", "\n".join([head, *[f"q{n},right,w1,w2,w3,sdd,t.json,,," for n in range(400)]]))
    letters = Counter(e["answer"] for e in MuChoMusic(tmp_path).held_out("test")[:400])
    assert set(letters) == set("ABCD")
    assert min(letters.values()) > 70  # of 100 expected; five standard deviations are 43
    other = [e["answer"] for e in MuChoMusic(tmp_path, seed=1).held_out("test")[:50]]
    assert other != [e["answer"] for e in MuChoMusic(tmp_path).held_out("test")[:50]]


RUL = {
    "1740": {
        "question": "What is the role of the piano?",
        "caption": "…",
        "correct_answer": "Support",
        "distractors": ["Lead", "Bass", "Rhythm", "None"],
        "PI": 0.98,
    },
    "7": {
        "question": "Why vintage?",
        "caption": "…",
        "correct_answer": "Effect",
        "distractors": ["Lo-fi", "Tape", "Vinyl", "Hiss"],
        "PI": 0.5,
    },
}


def test_rul_leaves_each_distractor_out_once(tone, put, tmp_path, pieces):
    for name in RUL:
        tone(f"audio/{name}.wav")
    put("RUL-MuchoMusic.json", RUL)
    examples = list(RULMuChoMusic(tmp_path).held_out("test"))
    assert [(e["meta"]["item"], e["meta"]["fold"]) for e in examples] == [(n, k) for n in RUL for k in range(4)]
    for example in examples:
        row = RUL[example["meta"]["item"]]
        left = row["distractors"][example["meta"]["fold"]]
        assert sorted(example["meta"]["options"]) == sorted({row["correct_answer"], *row["distractors"]} - {left})
        assert options_of(example)[example["answer"]] == row["correct_answer"]
    assert len({e["answer"] for e in examples}) > 1  # shuffled
    text = pieces(examples[0])[1]
    (a, b, c, d) = examples[0]["meta"]["options"]
    assert text == (
        "Provide your best guess of this question. Think step by step.\n\nQuestion: What is the role of the piano?\n\n"
        f"Options: (A) {a} (B) {b} (C) {c} (D) {d}\n\n"
        "Write out your guess in the format of [[Letter]], such as [[A]], [[B]], [[C]], [[D]]."
    )
    assert examples[4]["meta"]["perceptual_index"] == 0.5
    again = RULMuChoMusic(tmp_path).held_out("test")
    assert [e["meta"]["options"] for e in again] == [e["meta"]["options"] for e in examples]
    swapped = RULMuChoMusic(tmp_path, audio="swapped").held_out("test")
    assert {pieces(e)[0][0]["key"].rpartition("/")[2] for e in swapped[:4]} == {"7.wav"}


def test_rul_faults_are_told_once_a_question(tone, put, tmp_path):
    tone("1.wav")
    good = RUL["7"]
    rows = {"1": {**good, "distractors": ["Effect", "a", "b"]}, "2": good, "1b": {**good, "distractors": ["x"]}}
    tone("1b.wav")
    put("RUL-MuchoMusic.json", rows)
    with pytest.raises(BadDataError) as told:
        RULMuChoMusic(tmp_path).check()
    text = str(told.value)
    assert text.count("'Effect' is not exactly one of its options") == 1
    assert "2: there is no audio file '2'" in text
    assert "1b: it has 1 distractors" in text
