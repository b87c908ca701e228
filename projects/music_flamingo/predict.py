"""Questions about audio files: free text, or a fixed record of facts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bestiary.shared.audio.files import SUFFIXES, read_audio
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import move
from bestiary.shared.rl.rewards.extract import after_think, last_tag

DESCRIBE = "Describe this music."

FACTS = {
    "instrument": "Which instrument plays?",
    "time_signature": "What is the time signature?",
    "metre": "What is the metre?",
    "key_signature": "What is the key signature?",
    "key": "What is the key?",
    "tempo": "What is the tempo?",
    "texture": "How many voices are there?",
}
"""The fields of a record, and the question that each is the answer to. What is asked stands in the record's file."""

BATCH = 8


def predict(
    model: Any,
    inputs: Sequence[Path | str],
    out_dir: Path,
    question: str | None = None,
    facts: bool = False,
    max_new_tokens: int | None = None,
) -> list[Path]:
    """Answer a question about each audio file, or a fixed set of them.

    Args:
        model: a MusicFlamingo.
        inputs: audio files (wav, mp3, flac …), folders of them, or .jsonl files with lines
            ``{"audio": FILE, "question": …}`` (paths as seen from the file).
        out_dir: ``answers.jsonl`` goes there, a line a question, or ``facts.jsonl``, a line a file.
        question: what is asked of each file; None is :data:`DESCRIBE`.
        facts: ask :data:`FACTS` instead and write one record a file, its fields always the same. A field whose answer
            has not the form of an answer is null; what the model said of it stands under ``said``.
        max_new_tokens: longest answer; None is the model's own.

    Returns:
        The file written.

    Raises:
        BadDataError: for a file that is not there or no audio, before any question is asked.
        ConfigError: for a question beside ``facts``.
    """
    if facts and question is not None:
        raise ConfigError("facts=true asks its own questions: leave question= out")
    asked = [row for path in inputs for row in questions_of(Path(path), question or DESCRIBE, facts)]
    if not asked:
        raise BadDataError(f"no audio file in {', '.join(map(str, inputs))}; endings are {', '.join(SUFFIXES)}")
    for audio in dict.fromkeys(row["audio"] for row in asked):
        read_audio(audio, 16000, 0.0, 0.1)  # a header may lie: something must come out
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / ("facts.jsonl" if facts else "answers.jsonl")
    sampling = Sampling(max_new_tokens or model.max_new_tokens)
    fields = len(FACTS) if facts else 1
    with open(file, "w") as handle:
        for start in range(0, len(asked), fields if facts else BATCH):
            rows = asked[start : start + (fields if facts else BATCH)]
            texts = answers(model, rows, sampling)
            lines = [record(rows, texts)] if facts else [answered(r, t) for r, t in zip(rows, texts, strict=True)]
            for line in lines:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    return [file]


def questions_of(path: Path, question: str, facts: bool) -> Iterator[dict[str, str]]:
    """``{audio, question}`` rows of one input, with ``field`` where a record is asked for."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    elif path.suffix.lower() == ".jsonl":
        if facts:
            raise ConfigError(f"{path} brings its own questions: leave facts=true out")
        yield from read_questions(path, question)
        return
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise BadDataError(f"{file}: there is no such file")
        if facts:
            yield from ({"audio": str(file), "question": text, "field": name} for name, text in FACTS.items())
        else:
            yield {"audio": str(file), "question": question}


def read_questions(path: Path, question: str) -> Iterator[dict[str, str]]:
    """Rows of a .jsonl file; one without a question is asked ``question``."""
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text = row["audio"], row.get("question", question)
            if not (isinstance(audio, str) and isinstance(text, str)):
                raise TypeError("audio and question are texts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadDataError(
                f'{path}, line {number}: a line is like {{"audio": "song.wav", "question": "…"}} ({error!r})'
            ) from error
        yield {"audio": str(path.parent / audio), "question": text}


@torch.no_grad()
def answers(model: Any, rows: Sequence[dict[str, str]], sampling: Sampling) -> list[str]:
    """What the model says to each row."""
    rate = model.encoder.front_end.rate
    clips: dict[str, Any] = {}
    examples: list[Example] = []
    for at, row in enumerate(rows):
        if row["audio"] not in clips:
            clips[row["audio"]] = read_audio(row["audio"], rate)
        content: Any = [
            {"type": "audio", "value": clips[row["audio"]], "rate": rate},
            {"type": "text", "value": row["question"]},
        ]
        examples.append({"id": f"{row['audio']}#{at}", "messages": [{"role": "user", "content": content}]})
    batch = move(model.processor()(examples, "prompt"), next(model.parameters()).device)
    return model.generate(batch, 1, sampling).texts


def answered(row: dict[str, str], text: str) -> dict[str, Any]:
    """One line of answers.jsonl: the answer, and the thoughts before it where there are any."""
    answer, thoughts = split(text)
    return {"audio": row["audio"], "question": row["question"], "answer": answer, "thoughts": thoughts}


def record(rows: Sequence[dict[str, str]], texts: Sequence[str]) -> dict[str, Any]:
    """One line of facts.jsonl."""
    out: dict[str, Any] = {"audio": rows[0]["audio"]}
    for row, text in zip(rows, texts, strict=True):
        inside = last_tag(after_think(text), "answer")
        out[row["field"]] = inside.strip() or None if inside is not None else None
    return out | {"said": {row["field"]: text for row, text in zip(rows, texts, strict=True)}}


def split(text: str) -> tuple[str, str | None]:
    """The answer of a completion (what is in its tag, or all that follows the thoughts), and the thoughts."""
    rest = after_think(text)
    inside = last_tag(rest, "answer")
    thoughts = last_tag(text, "think")
    return (rest if inside is None else inside).strip(), thoughts.strip() if thoughts else None
