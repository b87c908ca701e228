"""Music Flamingo on a file of one's own questions: SFT and GRPO, and what is refused before any of it."""

import json

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
# Parts that need no fetching; Whisper tiny itself is run by the README's command.
TINY = [
    *("debug=fast", "debug.max_held_out=2", "backbone=qwen2_music_tiny", "backbone.config.num_hidden_layers=1"),
    *("encoder=af_whisper_tiny", "~encoder.fill", "encoder.width=32", "encoder.ffn=32", "encoder.layers=1"),
]


@pytest.fixture
def questions(tmp_path):
    """Two recordings of each split, without thoughts."""
    rows = []
    for split in ("train", "test"):
        for hertz in (220, 880):
            name = f"{split} {hertz}.wav"
            soundfile.write(tmp_path / name, 0.1 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16000), 16000)
            rows.append({"audio": name, "question": "Low or high?", "answer": "high", "split": split})
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "qa.jsonl"


@pytest.mark.parametrize("stages", [["sft,grpo"], ["sft", "grpo"]])
def test_answers_then_grpo(tool, questions, tmp_path, stages):
    """In one run, or GRPO from the run before, whose channels and adapters it goes on with."""
    words = ["+experiment=music_flamingo/own_questions", f"dataset.path={questions}", *TINY]
    for number, names in enumerate(stages):
        before = [f"init_from={tmp_path / str(number - 1)}"] if number else []
        run = [f"recipe.run=[{names}]", f"paths.run_dir={tmp_path / str(number)}"]
        job = tool("train", *words, *run, *before)
        assert job.returncode == 0, job.stdout + job.stderr
    for control in ("greedy", "silent/greedy", "swapped/greedy"):
        assert f"test/{control}/pass@1 " in job.stdout


def test_a_later_stage_without_data_is_refused_before_the_first(tool, questions, tmp_path):
    words = ["+project=music_flamingo", "dataset=audio_qa_jsonl", f"dataset.path={questions}"]
    run = ["recipe.run=[sft,cold_start]", f"paths.run_dir={tmp_path / 'run'}"]
    job = tool("train", *words, *run)
    assert job.returncode == 2, job.stderr
    assert "no row is to train on with thoughts: give rows think" in job.stderr
    other = "{_target_: bestiary.shared.data.audio_qa.AudioQAJsonl, path: none.jsonl}"
    stage = ["+recipe.stages.grpo.blend={own: {part: rl}, other: {part: rl, dataset: " + other + "}}"]
    job = tool("train", *words, "recipe.run=[sft,grpo]", "recipe.stages.grpo.data=null", *stage, run[1])
    assert job.returncode == 2, job.stderr
    assert "none.jsonl" in job.stderr
    assert not (tmp_path / "run").exists()
