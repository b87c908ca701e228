"""MMAU and MMAU-Pro in their public layouts."""

from __future__ import annotations

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.music_benchmarks.mmau import MMAU, MMAUPro
from bestiary.shared.rl.rewards.registry import make_verifier, self_test


def row(name, **changes):
    return {
        "id": name,
        "audio_id": f"./test-mini-audios/{name}.wav",
        "question": "What is the key?",
        "choices": ["C major", "A minor", "G major", "Cm7"],
        "answer": "A minor",
        "dataset": "MusicBench",
        "task": "music",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Harmony",
        "difficulty": "hard",
        **changes,
    }


@pytest.fixture
def mini(tone, put, tmp_path):
    """A test-mini file of three items, one of them no music; returns the folder."""

    def make(*rows):
        rows = rows or (row("a"), row("b", answer="c major."), row("s", task="sound"))
        for at, one in enumerate(rows):
            if one.get("audio_id"):
                tone(str(one["audio_id"]), 0.1 * (at + 1))
        put("mmau-test-mini.json", list(rows))
        return tmp_path

    return make


def test_items_are_read_as_chat(mini, pieces):
    source = MMAU(mini())
    assert isinstance(source, DataSource)
    source.check()
    examples = source.held_out("test")
    assert [e["id"] for e in examples] == ["a", "b"]
    first = check_example(examples[0])
    (audio,), text = pieces(first)
    assert text == (
        "What is the key?\nChoose the correct option from the following options:\n"
        "(A) C major\n(B) A minor\n(C) G major\n(D) Cm7"
    )
    assert audio["rate"] == 16000
    np.testing.assert_allclose(audio["value"], np.full(1600, 0.1, np.float32))
    assert audio["value"].dtype == np.float32
    assert (first["answer"], first["verifier"]) == ("B", "multiple_choice")
    assert first["meta"] == {
        "options": ["C major", "A minor", "G major", "Cm7"],
        "answer_text": "A minor",
        "task": "music",
        "category": "Reasoning",
        "sub_category": "Harmony",
        "difficulty": "hard",
        "dataset": "MusicBench",
    }
    assert examples[1]["answer"] == "A"  # case, and the full stop, aside
    self_test({"multiple_choice": make_verifier("multiple_choice")}, list(examples))


def test_tasks_and_parts(mini):
    folder = mini()
    assert [e["id"] for e in MMAU(folder, task="sound").held_out("test")] == ["s"]
    assert len(MMAU(folder, task=None).held_out("test")) == 3
    source = MMAU(folder)
    assert source.held_out("val") == []
    with pytest.raises(ConfigError, match="mmau has no parts; part='rl'"):
        source.held_out("test", "rl")
    with pytest.raises(ConfigError, match="holds out test"):
        source.held_out("train")
    with pytest.raises(ConfigError, match="mmau is to test on, never to train on: evaluate a finished run"):
        source.train_example(0, Stream(0, "sft"))
    with pytest.raises(ConfigError, match="no row whose task is 'speech'; there are music, sound"):
        MMAU(folder, task="speech").check()


def test_options_that_differ_in_case_alone_are_told_apart(mini):
    options = ["CM7", "Cm7", "C7", "C"]
    (example,) = MMAU(mini(row("a", choices=options, answer="Cm7"))).held_out("test")
    assert example["answer"] == "B"


def test_an_option_that_is_a_letter_is_no_letter_of_an_option(mini):
    (example,) = MMAU(mini(row("a", choices=["D", "B", "A", "C"], answer="A"))).held_out("test")
    assert example["answer"] == "C"
    assert make_verifier("multiple_choice").verify(example["answer"], "(C)", example).score == 1


def test_all_faults_are_told_at_once(mini, tmp_path):
    rows = [
        row("a"),
        row("a"),
        row("no-audio", audio_id=""),
        row("no-answer", answer=None),
        row("other", answer="F minor"),
        row("one", choices=["A minor"]),
        row("twice", choices=["A minor", "a minor", "A Minor"], answer="A MINOR"),
        row("mute", question=" "),
        row("gone"),
        row("empty"),
        row("bytes"),
    ]
    folder = mini(*rows)
    (tmp_path / "test-mini-audios/gone.wav").unlink()
    (tmp_path / "test-mini-audios/empty.wav").write_bytes(b"")
    file = tmp_path / "mmau-test-mini.json"
    file.write_text(file.read_text().replace('"./test-mini-audios/bytes.wav"', '{"bytes": "…"}'))
    with pytest.raises(BadDataError) as told:
        MMAU(folder).check()
    text = str(told.value)
    assert "mmau-test-mini.json: 10 faults in 11 rows:" in text
    for part in (
        "a: this id stands there twice",
        "no-audio: no audio is named",
        "no-answer: it has no answer",
        "other: its answer 'F minor' is not exactly one of its options",
        "one: it has 1 options",
        "twice: its answer 'A MINOR' is not exactly one",
        "mute: it asks nothing",
        "gone: there is no audio file './test-mini-audios/gone.wav'",
        "empty: its audio",
        "bytes: its audio is no path but a dict",
        "dataset.leave_out=true",
    ):
        assert part in text
    source = MMAU(folder, leave_out=True)
    assert [e["id"] for e in source.held_out("test")] == ["a"]
    assert source.revision.endswith("-without10")


def test_a_long_report_is_cut(mini):
    with pytest.raises(BadDataError) as told:
        MMAU(mini(*[row(f"r{n}", answer="no") for n in range(30)])).check()
    text = str(told.value)
    assert "30 faults in 30 rows" in text
    assert "and 10 more" in text
    assert text.count("is not exactly one") == 20


def test_secret_answers(mini):
    rows = [{k: v for k, v in row(name).items() if k != "answer"} for name in ("a", "b")]
    folder = mini(*rows)
    with pytest.raises(BadDataError, match=r"no field for answer \(looked for answer, correct_answer\)"):
        MMAU(folder).check()
    examples = MMAU(folder, hidden=True).held_out("test")
    assert len(examples) == 2
    assert "answer" not in examples[0]
    assert "verifier" not in examples[0]


def test_a_file_of_another_kind_is_named(tmp_path, put):
    put("mmau-test-mini.json", [{"wav": "x", "query": "?", "task": "music"}])
    with pytest.raises(BadDataError) as told:
        MMAU(tmp_path).check()
    for part in ("no field for id", "audio (looked for audio_id, audio_path", "question", "Its fields are: wav, query"):
        assert part in str(told.value)
    put("mmau-test-mini.json", "{not json")
    with pytest.raises(BadDataError, match="cannot be read as json"):
        MMAU(tmp_path).check()
    put("mmau-test-mini.json", [1, 2])
    with pytest.raises(BadDataError, match="holds no list of records"):
        MMAU(tmp_path).check()


def test_what_is_missing_is_requested(tmp_path):
    with pytest.raises(MissingDataError, match="cannot be fetched"):
        MMAU(tmp_path / "nowhere").check()
    with pytest.raises(MissingDataError, match=f"^Put it in {tmp_path}$"):
        MMAU(tmp_path, request="Put it in {root}").check()


def test_controls_and_revision(mini, pieces):
    folder = mini(row("a"), row("b"), row("c"))
    real, silent, swapped = (MMAU(folder, audio=mode) for mode in ("real", "silent", "swapped"))
    assert silent.revision == f"{real.revision}-silent"
    assert not pieces(silent.held_out("test")[0])[0][0]["value"].any()
    own = [pieces(e)[0][0]["key"] for e in real.held_out("test")]
    other = [pieces(e)[0][0]["key"] for e in swapped.held_out("test")]
    assert sorted(own) == sorted(other)
    assert all(a != b for a, b in zip(own, other, strict=True))
    with pytest.raises(ConfigError, match=r"dataset.audio is real, silent, swapped, not 'none'"):
        MMAU(folder, audio="none")


def test_prompts(mini, pieces):
    text = pieces(MMAU(mini(row("a", question="{options}?")), prompt="Q {question} O {options}").held_out("test")[0])[1]
    assert text.startswith("Q {options}? O (A) C major")
    with pytest.raises(ConfigError, match=r"dataset.prompt needs \{options\} in it"):
        MMAU(mini(), prompt="{question}")


def test_audio_outside_the_folder_is_not_read(mini, tone, tmp_path):
    tone("out.wav")
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "mmau.json").write_text(f'[{{"id": "a", "audio_id": "{tmp_path}/out.wav", "question": "?", "choices": '
                                      '["x", "y"], "answer": "x", "task": "music"}]')  # fmt: skip
    with pytest.raises(BadDataError, match="there is no audio file"):
        MMAU(folder).check()


def pro(name, **changes):
    return {
        "id": name,
        "audio_path": [f"data/{name}.wav"],
        "question": "Which one?",
        "answer": "oboe",
        "choices": ["oboe", "flute"],
        "category": "music",
        "sub-cat": "timbre",
        "length_type": "short",
        "perceptual_skills": ["Instrumentation"],
        "reasoning_skills": [],
        **changes,
    }


PRO = (
    pro("a"),
    pro("two", audio_path=["data/a.wav", "data/b.wav"], choices=list("abcdefghij"), answer="j"),
    pro("open", choices=[], answer="It slows down."),
    pro("o", category="open", choices=None, answer="Because."),
    pro("i", category="instruction following", choices=None, answer=None),
    pro("s", category="sound"),
)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_mmau_pro(kind, tone, put, tmp_path, pieces):
    import json

    for at, name in enumerate(("a", "b", "open", "o", "i", "s")):
        tone(f"data/{name}.wav", 0.1 * at)
    if kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(list(PRO)), tmp_path / "test.parquet")
    else:
        put("test.jsonl", "\n".join(json.dumps(one) for one in PRO))
    source = MMAUPro(tmp_path)
    assert [e["id"] for e in source.held_out("test")] == ["a", "two"]
    example = source.held_out("test")[1]
    audio, text = pieces(example)
    assert len(audio) == 2
    assert text.endswith("(I) i\n(J) j")
    assert example["answer"] == "J"
    assert example["meta"]["form"] == "closed"
    assert source.held_out("test")[0]["meta"]["perceptual_skills"] == ["Instrumentation"]
    (held,) = MMAUPro(tmp_path, forms=["open"]).held_out("test", "open")
    assert (held["id"], held["answer"], "verifier" in held) == ("open", "It slows down.", False)
    assert pieces(held)[1] == "Which one?"
    everything = MMAUPro(tmp_path, category=None, forms=["closed", "open", "instructions"])
    assert [e["id"] for e in everything.held_out("test")] == ["a", "two", "open", "o", "i", "s"]
    assert [e["id"] for e in everything.held_out("test", "instructions")] == ["i"]
    assert "answer" not in everything.held_out("test", "instructions")[0]
    with pytest.raises(ConfigError, match="forms are some of closed, open, instructions"):
        MMAUPro(tmp_path, forms=["shut"])
