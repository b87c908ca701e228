"""What is written about a piece, and what of it is kept."""

import json
from collections import Counter

import pytest

from bestiary.shared.music.claims import claims
from bestiary.shared.music.filter import Judge, contradictions, fault
from bestiary.shared.music.prompts import ASPECTS, SKILLS
from bestiary.shared.music.records import Chord, Record, Value
from bestiary.shared.music.write import (
    Item,
    ModelWriter,
    TemplateWriter,
    ask_json,
    describe,
    facts_of,
    template_thoughts,
    write_thoughts,
)
from bestiary.shared.rl.rewards.metadata import Metadata

VALUES = {
    "Genre": "waltz",
    "BPM": 120.0,
    "Key": "F sharp minor",
    "Meter": "3/4",
    "Structure": "verse and chorus",
    "Instruments": ["flute", "electric guitar"],
    "Vocal character": "a low voice",
    "Lyric themes": ["rain", "trains"],
    "Theory": ["F sharp:min", "B:min", "C sharp:maj"],
    "Mix notes": "dry",
    "Dynamics": "rising",
}
CHORDS = [Chord(0, 4, "F sharp:min"), Chord(4, 6, "B:min"), Chord(6, 8, "C sharp:maj"), Chord(8, 12, "F sharp:min")]
RECORD = Record(
    12.0,
    {name: Value(value, "made", 0.5) for name, value in VALUES.items()},
    chords=CHORDS,
    transcript=" ".join(f"word{n}" for n in range(30)),
)


class Model:
    """Gives these answers in turn, and keeps the prompts."""

    def __init__(self, *answers):
        self.answers, self.prompts = list(answers), []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        answer = self.answers.pop(0)
        return answer if isinstance(answer, str) else json.dumps(answer)


CAPTION = {"caption": "A waltz in F sharp minor."}
QUESTION = {"skill": "harmony", "question": "Which chord?", "options": ["a", "b", "c", "d"], "answer": "c"}


# ------------------------------------------------------------------ templates


@pytest.mark.parametrize("names", [list(VALUES), ["Key", "BPM"], ["Theory", "Key"], ["Instruments"]])
def test_a_description_names_all_of_its_record(names):
    """As the reward for descriptions reads it: chords by their colons are not taken for keys."""
    record = Record(1.0, {name: RECORD.values[name] for name in names})
    item = TemplateWriter()(record, [], "x").items[0]
    assert item.task == "caption"
    example = {"id": "x", "meta": {"metadata": record.metadata()}}
    Metadata().check(example)
    assert Metadata().verify("", item.answer, example).score == 1.0
    assert all(claim.right for claim in claims(item.answer, record))


def test_template_questions_have_their_answers_in_the_record():
    written = TemplateWriter(questions=20)(RECORD, [], "x")
    asked = {item.question: item for item in written.items[1:]}
    assert {item.task for item in asked.values()} == set(SKILLS)
    for item in asked.values():
        assert len(item.options) == len(set(item.options)) == 4
        assert item.answer in item.options
        assert fault(item, RECORD) is None
    assert asked["What is the key?"].answer == "F sharp minor"
    assert asked["What is the tempo?"].answer == "120 bpm"
    assert asked["What is the time signature?"].answer == "3/4"
    assert asked["Which chord comes first?"].answer == "F sharp:min"
    assert asked["Which of these chords is heard longest in all?"].answer == "F sharp:min"
    assert asked["With which of these words do the lyrics begin?"].answer == "word0 word1 word2 word3"
    instrument = asked["Which of these instruments is heard?"]
    assert not {"guitar", "acoustic guitar", "flute"} & set(instrument.options) - {instrument.answer}
    (when,) = (item for item in asked.values() if item.task == "temporal")
    second = float(when.question.split()[3])
    assert when.answer == next(chord.name for chord in CHORDS if chord.start <= second < chord.end)


def test_the_same_name_gives_the_same_questions_and_options_stand_anywhere():
    first = [item.to_json() for item in TemplateWriter()(RECORD, [], "a").items]
    assert first == [item.to_json() for item in TemplateWriter()(RECORD, [], "a").items]
    places, ranks = Counter(), Counter()
    for n in range(200):
        for item in TemplateWriter()(RECORD, [], str(n)).items[1:3]:
            places[item.options.index(item.answer)] += 1
            if "tempo" in item.question:
                ranks[sorted(float(o.split()[0]) for o in item.options).index(120)] += 1
    assert min(places[n] for n in range(4)) > 60
    assert min(ranks[n] for n in range(4)) > 25


def test_nothing_is_written_of_nothing():
    assert TemplateWriter()(Record(3.0), [], "x").items == []
    assert describe(Record(3.0)) == template_thoughts(Record(3.0)) == ""
    assert len(TemplateWriter(questions=2)(RECORD, [], "x").items) == 3


# ------------------------------------------------------------------ a model


def test_a_model_is_told_the_facts_and_asked_for_six_aspects_and_five_skills():
    model = Model(CAPTION, {"questions": [QUESTION]})
    written = ModelWriter(model, questions=5)(RECORD, ["soft drums"], "x")
    assert [(item.task, item.answer) for item in written.items] == [("caption", CAPTION["caption"]), ("harmony", "c")]
    assert not written.dropped
    for prompt in model.prompts:
        assert "- Key: F sharp minor (made, confidence 0.50)" in prompt
        assert "Heard in part 1: soft drums" in prompt
        assert "4.0s B:min" in prompt
        assert "word29" in prompt
    assert all(text in model.prompts[0] for text in ASPECTS.values())
    assert len(ASPECTS) == 6
    assert all(text in model.prompts[1] for text in SKILLS.values())
    assert len(SKILLS) == 5
    assert '{"caption": "…"}' in model.prompts[0]
    assert '"questions": [{"skill": "temporal|attribute|harmony|lyrics|structure"' in model.prompts[1]


@pytest.mark.parametrize(
    "bad",
    [
        "A waltz.",
        '{"caption": "x"',
        {"caption": ""},
        {"caption": "x", "note": "y"},
        ["caption"],
        "3",
        'Sure: {"caption": "x"}',
    ],
)
def test_bad_output_is_asked_for_once_more_then_dropped(bad):
    model = Model(bad, CAPTION)
    assert ModelWriter(model, questions=0)(RECORD, [], "x").items[0].answer == CAPTION["caption"]
    model = Model(bad, bad, CAPTION)
    written = ModelWriter(model, questions=0)(RECORD, [], "x")
    assert written.items == []
    assert written.dropped == {"caption: not the JSON asked for": 1}
    assert len(model.prompts) == 2


def test_thoughts_and_a_fence_around_the_json_are_fine():
    fenced = "<think>hm {</think>\n```json\n" + json.dumps(CAPTION) + "\n```\n"
    assert ask_json(Model(fenced), "x", lambda value: value) == CAPTION


@pytest.mark.parametrize(
    "change",
    [
        {"skill": "other"},
        {"options": ["a", "b", "c"]},
        {"options": ["a", "b", "c", "C "]},
        {"options": "abcd"},
        {"answer": "e"},
        {"answer": None},
        {"question": ""},
    ],
)
def test_bad_questions_are_dropped_and_the_others_kept(change):
    model = Model(CAPTION, {"questions": [QUESTION, {**QUESTION, **change}, "x"]})
    written = ModelWriter(model)(RECORD, [], "x")
    assert len(written.items) == 2
    assert written.dropped == {"question: not in the form asked for": 2}
    none = Model(CAPTION, *[{"questions": [{**QUESTION, **change}]}] * 2)
    assert ModelWriter(none)(RECORD, [], "x").dropped == {"questions: not the JSON asked for": 1}


def test_the_right_option_of_a_model_stands_anywhere():
    """Models put it first, and who knows that hears nothing."""
    places = Counter()
    for n in range(200):
        asked = {"questions": [{**QUESTION, "options": ["c", "a", "b", "d"]}] * 2}
        items = ModelWriter(Model(CAPTION, asked))(RECORD, [], str(n)).items[1:]
        again = ModelWriter(Model(CAPTION, asked))(RECORD, [], str(n)).items[1:]
        assert items == again
        assert all(sorted(item.options) == ["a", "b", "c", "d"] for item in items)
        places.update(item.options.index(item.answer) for item in items)
    assert min(places[n] for n in range(4)) > 70


def test_half_a_character_is_no_text():
    """JSON can hold one, and no file of UTF-8 can."""
    half = '{"caption": "It sings \\ud83d."}'
    assert json.loads(half)["caption"].endswith("\ud83d.")
    assert ModelWriter(Model(half, CAPTION), questions=0)(RECORD, [], "x").items[0].answer == CAPTION["caption"]


def test_thoughts_of_a_model_are_steps():
    item = Item("harmony", "Which chord?", "c", ["a", "b", "c", "d"])
    model = Model({"steps": ["It begins\n low", "Then it is F sharp:min."]})
    assert write_thoughts(model, RECORD, item) == "It begins low.\nThen it is F sharp:min."
    assert "Which chord? (A) a (B) b (C) c (D) d" in model.prompts[0]
    assert write_thoughts(Model({"steps": "one"}, {"steps": []}), RECORD, item) is None
    model = Model({"steps": ["Low."]})
    assert write_thoughts(model, RECORD, item, ["soft drums"]) == "Low."
    assert "soft drums" in model.prompts[0]


def test_facts_of_nothing():
    assert facts_of(Record(3.0), []).endswith("- nothing\n")


# ------------------------------------------------------------------ filter


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Item("caption", "Describe.", "A waltz in F sharp minor at 120 bpm with flute."), None),
        (Item("caption", "Describe.", "It runs at 90 bpm."), "contradicts BPM"),
        (Item("caption", "Describe.", "A violin leads."), "contradicts Instruments"),
        (Item("attribute", "What is the key?", "F sharp minor"), None),
        (Item("attribute", "What is the key?", "A major"), "contradicts Key"),
        (Item("attribute", "What is the tempo?", "120"), None),
        (Item("attribute", "What is the tempo?", "90"), "contradicts BPM"),
        (Item("attribute", "What is the time signature?", "4/4"), "contradicts Meter"),
        (Item("harmony", "Which chord comes first?", "A major"), "contradicts Theory"),
        (Item("harmony", "Which chord comes first?", "C sharp major"), None),
        (Item("attribute", "Is the key A major or F sharp minor?", "F sharp minor"), "the question holds its answer"),
        (Item("attribute", "Is it in A major?", "no"), None),
        (Item("structure", "What comes after the flute?", "the flute"), "the question holds its answer"),
    ],
)
def test_rules_against_the_record(item, reason):
    assert fault(item, RECORD) == reason


def test_contradictions_say_what_is_wrong():
    (wrong,) = contradictions(Item("caption", "Describe.", "A waltz for flute in G major."), RECORD)
    assert (wrong.category, wrong.said) == ("Key", "G major")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([{"score": 7}], None),
        ([{"score": 6.9}], "the judge scored it low"),
        (["eight", {"score": 8}], None),
        (["eight", {"score": 11}], "the judge gave no score"),
        ([{"score": True}, {"score": "9"}], "the judge gave no score"),
    ],
)
def test_a_judge_scores_what_the_rules_keep(answers, reason):
    model = Model(*answers)
    item = Item("harmony", "Which chord comes first?", "F sharp:min", ["F sharp:min", "C:maj", "D:maj", "E:maj"])
    assert fault(item, RECORD, Judge(model)) == reason
    assert "Which chord comes first? F sharp:min / C:maj / D:maj / E:maj" in model.prompts[0]
    assert fault(Item("caption", "Describe.", "At 90 bpm."), RECORD, Judge(Model())) == "contradicts BPM"


def test_a_judge_is_told_what_the_writer_heard():
    """What only the initial captions say is not invented."""
    model = Model({"score": 9})
    assert fault(Item("caption", "Describe.", "Soft."), RECORD, Judge(model), ["soft drums"]) is None
    assert "Heard in part 1: soft drums" in model.prompts[0]


def test_a_judge_may_be_stricter():
    item = Item("caption", "Describe.", "Soft.")
    assert fault(item, RECORD, Judge(Model({"score": 8}), keep=9)) == "the judge scored it low"


def test_an_answer_is_not_found_inside_other_words():
    assert fault(Item("structure", "Is another note held?", "no"), RECORD) is None
