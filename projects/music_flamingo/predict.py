"""Questions about audio files: free text, or a fixed record of facts."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bestiary.shared.audio.files import SUFFIXES, duration, read_audio
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example, select_rows
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import move
from bestiary.shared.language.generate import Generation, check_sampling
from bestiary.shared.language.media_processor import FeatureCache, scatter_media
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
            ``{"audio": FILE, "question": …}`` (paths as seen from the file). Of a clip longer than the front end's
            longest, its beginning is heard, with a warning.
        out_dir: ``answers.jsonl`` goes there, a line a question, or ``facts.jsonl``, a line a file.
        question: what is asked of each file; None is :data:`DESCRIBE`.
        facts: ask :data:`FACTS` instead and write one record a file, its fields always the same. A field whose answer
            has not the form of an answer is null, any other a text; what the model said of each is under ``said``.
        max_new_tokens: longest answer; None is the model's own.

    Returns:
        The file written.

    Raises:
        BadDataError: for a file that is not there or no audio, before any question is asked.
        ConfigError: for a question beside ``facts``, an empty question, or answers without length.
    """
    if facts and question is not None:
        raise ConfigError("facts=true asks its own questions: leave question= out")
    if question is not None and not question.strip():
        raise ConfigError("question= is empty: say what to ask, or leave it out")
    sampling = check_sampling(Sampling(model.max_new_tokens if max_new_tokens is None else max_new_tokens))
    asked = [row for path in inputs for row in questions_of(Path(path), question or DESCRIBE, facts)]
    if not asked:
        raise BadDataError(f"no audio file in {', '.join(map(str, inputs))}; endings are {', '.join(SUFFIXES)}")
    longest = seconds_heard(model)
    for audio in dict.fromkeys(row["audio"] for row in asked):
        read_audio(audio, 16000, 0.0, 0.1)  # a header may lie: something must come out
        if (length := duration(audio)) > longest:
            warnings.warn(f"{audio} has {length:g} s, and the model hears the first {longest:g} s", stacklevel=2)
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / ("facts.jsonl" if facts else "answers.jsonl")
    size = len(FACTS) if facts else BATCH
    # A file's name may hold bytes that are no characters.
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as handle:
        for start in range(0, len(asked), size):
            rows = asked[start : start + size]
            texts = answers(model, rows, sampling)
            lines = [record(rows, texts)] if facts else [answered(r, t) for r, t in zip(rows, texts, strict=True)]
            for line in lines:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    return [file]


def seconds_heard(model: Any) -> float:
    """The longest clip that the model's front end does not cut."""
    return model.encoder.front_end.max_windows * model.encoder.front_end.window_seconds


def questions_of(path: Path, question: str, facts: bool) -> Iterator[dict[str, str]]:
    """``{audio, question}`` rows of one input, with ``field`` where a record is asked for."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
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
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text = row["audio"], row.get("question", question)
            if not all(isinstance(value, str) and value.strip() for value in (audio, text)):
                raise TypeError("audio and question are texts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadDataError(
                f'{path}, line {number}: a line is like {{"audio": "song.wav", "question": "…"}} ({error!r})'
            ) from error
        yield {"audio": str(path.parent / audio), "question": text}


@torch.no_grad()
def answers(model: Any, rows: Sequence[dict[str, str]], sampling: Sampling) -> list[str]:
    """What the model says to each row. A clip is read and encoded once, however many rows ask about it."""
    front_end = model.encoder.front_end
    clips = list(dict.fromkeys(row["audio"] for row in rows))
    heard = {clip: read_audio(clip, front_end.rate, 0.0, seconds_heard(model)) for clip in clips}
    examples: list[Example] = []
    for at, row in enumerate(rows):
        content: Any = [
            {"type": "audio", "value": heard[row["audio"]], "rate": front_end.rate, "key": row["audio"]},
            {"type": "text", "value": row["question"]},
        ]
        examples.append({"id": f"{row['audio']}#{at}", "messages": [{"role": "user", "content": content}]})
    processor = model.processor()
    audio = replace(processor.modalities["audio"], cache=FeatureCache(sys.maxsize))
    processor = replace(processor, modalities={"audio": audio})
    batch = move(processor(examples, "prompt"), next(model.parameters()).device)
    places = [clips.index(row["audio"]) for row in rows]
    return Generation(model.backbone, batch, 1, sampling, inputs_embeds=embedded(model, batch, places)).rollout().texts


def embedded(model: Any, batch: Any, clips: Sequence[int]) -> torch.Tensor:
    """The embedded prompts (B, T, D), as the model embeds them, but each clip encoded once.

    Args:
        model: a MusicFlamingo.
        batch: prompts with one clip each.
        clips: the number of each row's clip, from 0 in the order of their first rows.
    """
    firsts = [clips.index(clip) for clip in range(max(clips) + 1)]
    media: Any = select_rows(batch, firsts)["media"]["audio"]  # type: ignore[typeddict-item]
    counts = torch.zeros(len(firsts), dtype=torch.long, device=media["counts"].device)
    counts.index_add_(0, media["owner"], media["counts"])
    tokens = model.encode_audio(media).split(counts.tolist())
    embeds = model.backbone.embed(batch["input_ids"])
    return scatter_media(embeds, batch["input_ids"], model.sound_id, torch.cat([tokens[clip] for clip in clips]))


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
