"""The protocols of audio on a model that says what it is told to."""

from __future__ import annotations

import json

import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.evaluate import evaluate
from bestiary.shared.core.protocols import EvalProtocol, Rollout
from bestiary.shared.metrics.audio_qa import UNREAD, AudioQA, confusion, macro_f1
from bestiary.shared.metrics.audio_records import StructuredF1
from bestiary.shared.metrics.pass_at import interval


class Says(torch.nn.Module):
    """A model that answers each example with its ``meta["said"]``; it counts its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []
        self.temperature = 0.0

    def processor(self):
        def process(examples, mode):
            assert mode == "prompt"
            return {"ids": [e["id"] for e in examples], "said": [e["meta"]["said"] for e in examples], "media": {}}

        return process

    def generate(self, batch, n, sampling):
        assert (n, sampling.temperature) == (1, self.temperature)
        self.batches.append(batch["ids"])
        rows = len(batch["ids"])
        reasons = ["length" if len(t) > sampling.max_new_tokens else "stop" for t in batch["said"]]
        ids = torch.zeros(rows, 1, dtype=torch.long)
        return Rollout(ids, torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 1), batch["said"], reasons)


def asked(
    said, answer="A", options=("Man", "Woman", "A child", "Robot"), name=None, verifier="multiple_choice", **meta
):
    meta = {"said": said, "options": list(options), **meta}
    out = {"id": name or said or "-", "answer": answer, "meta": meta, "messages": []}
    return out if verifier is None else {**out, "verifier": verifier}


def test_accuracy_by_hand():
    examples = [
        asked("A", "A", task="music"),
        asked("B", "A", task="music", name="wrong"),
        asked("dunno", "A", task="sound", skills=["pitch", "tempo"]),
        asked("(C)", "C", task="sound", skills=["pitch"]),
        asked("whatever", "text", verifier=None, name="for a judge"),
    ]
    model, protocol = Says(), AudioQA("letter", max_new_tokens=6, batch_size=2, by=["task", "skills"], label="qa")
    assert isinstance(protocol, EvalProtocol)
    values = protocol(model, examples)
    low, high = interval([1, 0, 0, 1], 1)
    assert values == {
        "qa/prompts": 5,
        "qa/unscored": 1,
        "qa/truncated_share": 1 / 5,
        "qa/accuracy": 2 / 4,
        "qa/accuracy/low": low,
        "qa/accuracy/high": high,
        "qa/followed": 3 / 4,
        "qa/accuracy/task=music": 1 / 2,
        "qa/accuracy/task=sound": 1 / 2,
        "qa/accuracy/skills=pitch": 1 / 2,
        "qa/accuracy/skills=tempo": 0,
    }
    # Wilson's 95 % interval of 2 in 4, from the formula's published table.
    assert (low, high) == (pytest.approx(0.150, abs=1e-3), pytest.approx(0.850, abs=1e-3))
    assert [len(ids) for ids in model.batches] == [2, 2, 1]


def test_nothing_that_can_be_scored_is_no_number():
    values = AudioQA()(Says(), [asked("A", verifier=None)])
    assert values == {"prompts": 1, "unscored": 1, "truncated_share": 0}


def folds(item, *said, gold="Oboe"):
    rows = []
    for fold, text in enumerate(said):
        options = [gold, f"w{fold}", "w8", "w9"]
        options = options[fold % 4 :] + options[: fold % 4]  # the gold letter moves
        text = text.replace("GOLD", "ABCD"[options.index(gold)]).replace("W8", "ABCD"[options.index("w8")])
        rows.append(asked(text, "ABCD"[options.index(gold)], options, name=f"{item}-{fold}", item=item, fold=fold))
    return rows


def test_folds_are_averaged_and_voted_on():
    rows = [
        *folds("x", "[[GOLD]]", "[[GOLD]]", "[[W8]]", "nothing"),  # 2 of 4, and most say oboe
        *folds("y", "[[W8]]", "[[W8]]", "[[GOLD]]", "[[W8]]"),  # 1 of 4, most say w8
        *folds("z", "[[GOLD]]", "[[GOLD]]", "[[GOLD]]", "[[GOLD]]"),
    ]
    values = AudioQA("rul", by=["fold"])(Says(), rows)
    assert values["accuracy"] == pytest.approx(7 / 12)
    assert values["vote"] == pytest.approx(2 / 3)
    assert values["followed"] == pytest.approx(11 / 12)
    assert (values["accuracy/low"], values["accuracy/high"]) == interval([0.5, 0.25, 1.0], 4)
    assert [values[f"accuracy/fold={k}"] for k in range(4)] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3])


def test_confusion_and_macro_f1_by_hand():
    labels = ["bass", "flute", "reed"]
    pairs = [("bass", "bass"), ("bass", "flute"), ("flute", "flute"), ("flute", "what?"), ("bass", "reed")]
    rows = [asked(said, gold, labels=labels, name=str(at)) for at, (gold, said) in enumerate(pairs)]
    protocol = AudioQA("label")
    table = confusion(protocol.answer(Says(), rows))
    assert table == {"bass": {"bass": 1, "flute": 1, "reed": 1}, "flute": {UNREAD: 1, "flute": 1}}
    # bass: precision 1/1, recall 1/3, F1 1/2; flute: precision 1/2, recall 1/2, F1 1/2.
    assert macro_f1(table) == pytest.approx(0.5)
    values = protocol(Says(), rows)
    assert values["macro_f1"] == pytest.approx(0.5)
    assert values["accuracy"] == pytest.approx(2 / 5)
    sklearn = pytest.importorskip("sklearn.metrics")
    golds, said = zip(*pairs, strict=True)
    assert values["macro_f1"] == pytest.approx(sklearn.f1_score(golds, said, labels=["bass", "flute"], average="macro"))


def test_answers_are_written(tmp_path):
    file = tmp_path / "deep" / "answers.json"
    values = AudioQA("letter", answers_file=file)(Says(), [asked("B", "B"), asked("öh", "A", verifier=None)])
    whole = json.loads(file.read_text())
    assert whole["values"] == values
    assert whole["protocol"] == {"name": "audio_qa", "version": "1", "matcher": "letter"}
    assert [(r["id"], r["model_prediction"], r["choice"], r["right"]) for r in whole["answers"]] == [
        ("B", "B", "B", True),
        ("öh", "öh", None, None),
    ]


def test_a_benchmark_whose_audio_is_taken_away_is_asked_the_same(tmp_path):
    """Reader, control and protocol together: a model that hears falls to nothing when it hears silence or another."""
    import numpy as np
    import soundfile

    from bestiary.shared.data.music_benchmarks.nsynth import NSynth

    (tmp_path / "audio").mkdir()
    notes = {}
    for pitch in (10, 20, 30):
        name = f"bass_synthetic_000-{pitch:03}-050"
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.full(800, pitch / 100, np.float32), 16000, "FLOAT")
        labels = {"instrument_source_str": "synthetic", "instrument_family_str": "bass", "pitch": pitch}
        notes[name] = labels
    (tmp_path / "examples.json").write_text(json.dumps(notes))

    class Hears(Says):
        def processor(self):
            def process(examples, mode):
                levels = [float(e["messages"][0]["content"][0]["value"].mean()) for e in examples]
                return {"ids": [e["id"] for e in examples], "said": [f"{100 * v:.0f}" for v in levels], "media": {}}

            return process

    found = {}
    for audio in ("real", "silent", "swapped"):
        source = NSynth(tmp_path, audio=audio)
        found[audio] = evaluate(Hears(), source, AudioQA("numeric"), part="pitch")["accuracy"]
    assert found == {"real": 1.0, "silent": 0.0, "swapped": 0.0}


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="no matcher 'leter'; did you mean 'letter'"):
        AudioQA("leter")
    with pytest.raises(ConfigError, match="1 or more"):
        AudioQA(batch_size=0)
    with pytest.raises(ConfigError, match="1 or more"):
        StructuredF1(max_new_tokens=0)


def test_structured_f1_by_hand():
    vocabulary = {"Instruments": ["oboe", "flute", "harp", "bass", "double bass"]}
    records = [
        {"BPM": 120, "Key": "A minor", "Instruments": ["oboe", "harp"], "Genre": "waltz"},
        {"BPM": "90", "Key": "C major", "Instruments": "double bass", "Genre": "jazz"},
    ]
    captions = [
        "<think>jazz</think>A waltz at 121 bpm in A minor for oboe and flute.",
        "Swing in C major, or C minor, at 60 bpm or 91 bpm, with a double bass.",
    ]
    rows = [
        {"id": str(at), "messages": [], "meta": {"said": said, "metadata": record, "vocabulary": vocabulary}}
        for at, (said, record) in enumerate(zip(captions, records, strict=True))
    ]
    protocol = StructuredF1(label="caption", batch_size=1)
    assert isinstance(protocol, EvalProtocol)
    values = protocol(Says(), rows)
    f1 = {"bpm": 2 * (2 / 3) / (1 + 2 / 3), "key": 2 * (2 / 3) / (1 + 2 / 3), "instruments": 2 / 3}
    assert values == pytest.approx(
        {
            "caption/prompts": 2,
            "caption/recall/bpm": 1,
            "caption/recall/key": 1,
            "caption/recall/instruments": 2 / 3,  # of oboe, harp, double bass; "bass" in "double bass" is nobody's
            "caption/recall/genre": 1 / 2,
            "caption/recall/mean": (1 + 1 + 2 / 3 + 1 / 2) / 4,
            "caption/precision/bpm": 2 / 3,  # 121, 91, and 60, which is wrong
            "caption/precision/key": 2 / 3,
            "caption/precision/instruments": 2 / 3,  # oboe, double bass, and flute, which is not there
            "caption/precision/mean": 2 / 3,  # what else a genre could be is not known
            **{f"caption/f1/{name}": value for name, value in f1.items()},
            "caption/f1/mean": sum(f1.values()) / 3,
        }
    )
    only = StructuredF1(["Key"])(Says(), rows)
    assert set(only) == {
        "prompts",
        *(f"{kind}/{name}" for kind in ("precision", "recall", "f1") for name in ("key", "mean")),
    }
    with pytest.raises(BadDataError, match="no meta"):
        StructuredF1(["Metre"])(Says(), rows)


def test_a_caption_that_names_nothing():
    row = {"id": "x", "messages": [], "meta": {"said": "", "metadata": {"Key": "A minor"}}}
    assert StructuredF1()(Says(), [row]) == {
        "prompts": 1,
        **{f"{kind}/{name}": 0.0 for kind in ("precision", "recall", "f1") for name in ("key", "mean")},
    }


def test_two_ways_to_say_one_tempo_are_both_right():
    said = "From 119 bpm to 122 bpm."
    row = {"id": "x", "messages": [], "meta": {"said": said, "metadata": {"BPM": 120}}}
    values = StructuredF1()(Says(), [row])
    assert (values["precision/bpm"], values["recall/bpm"]) == (1, 1)


def test_captions_are_greedy_unless_a_temperature_is_given():
    row = {"id": "x", "messages": [], "meta": {"said": "90 bpm", "metadata": {"BPM": 90}}}
    model = Says()
    greedy = StructuredF1()(model, [row])
    model.temperature = 0.7  # it refuses any other
    assert StructuredF1(temperature=0.7)(model, [row]) == greedy
