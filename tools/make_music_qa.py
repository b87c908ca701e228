#!/usr/bin/env python
r"""Make questions, descriptions and thoughts about your own music, for dataset=audio_qa_jsonl.

    python tools/make_music_qa.py FOLDER --out DIR                                        # templates, no model
    python tools/make_music_qa.py FOLDER --out DIR --think
    python tools/make_music_qa.py FOLDER --out DIR --writer local --checkpoint RUN
    python tools/make_music_qa.py FOLDER --out DIR --writer endpoint --base-url http://localhost:8000/v1 --model NAME \
        --judge --think --workers 8

Four stages: initial captions by a model that hears (--listener), metadata (tempo, beats, key, chords), descriptions and
questions, and a filter; --think adds chains of thought, checked step by step. Beside NAME.wav, NAME.txt is its words
and NAME.json what you know of it ({"Instruments": ["flute"], "Genre": "waltz", …}). Run it again after an interruption:
what is done is kept. A file that is no audio is reported and passed over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bestiary.shared.core.command_line import short_answers

WRITERS = ("template", "endpoint", "local")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="searched for wav, flac, mp3, ogg, opus, aiff")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    out.add_argument("--writer", choices=WRITERS, default="template", help="who writes; template needs no model")
    out.add_argument("--questions", type=int, help="the most a piece (default: 8 from templates, 5 from a model)")
    out.add_argument("--judge", action="store_true", help="let the writer's model score what the rules keep")
    out.add_argument("--think", action="store_true", help="add chains of thought")
    out.add_argument("--listener", metavar="RUN", help="a checkpoint that hears, for initial captions")
    out.add_argument("--tools", help="of librosa,madmom,essentia (default: all that are installed)")
    out.add_argument("--workers", type=int, default=1, help="pieces at once")
    local = out.add_argument_group("--writer local")
    local.add_argument("--checkpoint", metavar="RUN", help="a run, or a folder in the layout of transformers")
    endpoint = out.add_argument_group("--writer endpoint (OpenAI-compatible)")
    endpoint.add_argument("--base-url", metavar="URL", help="for example http://localhost:8000/v1")
    endpoint.add_argument("--model", metavar="NAME", help="its name there")
    endpoint.add_argument("--key-env", metavar="VARIABLE", help="environment variable that holds the API key")
    endpoint.add_argument("--timeout", type=float, default=120.0, help="seconds without a byte of an answer")
    endpoint.add_argument("--retries", type=int, default=5, help="tries after the first")
    out.add_argument("--temperature", type=float, default=0.7, help="of a model that writes")
    out.add_argument("--max-tokens", type=int, default=2048, help="longest answer of a model that writes")
    return out


def model_of(given: argparse.Namespace) -> Callable[[str], str] | None:
    """The language model that was asked for, or None for templates."""
    from bestiary.shared.core.errors import ConfigError

    def need(*names: str) -> None:
        for name in names:
            if getattr(given, name) is None:
                raise ConfigError(f"--writer {given.writer} needs --{name.replace('_', '-')}")

    for name, writer in {**dict.fromkeys(("base_url", "model", "key_env"), "endpoint"), "checkpoint": "local"}.items():
        if getattr(given, name) is not None and given.writer != writer:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --writer {writer}, not {given.writer}")
    if given.questions is not None and given.questions < 0:
        raise ConfigError(f"--questions is 0 or more, not {given.questions}")
    if given.writer == "template":
        if given.judge:
            raise ConfigError("--judge needs a model: --writer endpoint or local")
        return None
    if given.writer == "local":
        need("checkpoint")
        from bestiary.shared.music.models import completer, load_model

        return completer(load_model(given.checkpoint), given.max_tokens, given.temperature)
    need("base_url", "model")
    from bestiary.shared.music.endpoint import Endpoint

    return Endpoint(
        given.base_url,
        given.model,
        given.key_env,
        timeout=given.timeout,
        retries=given.retries,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
    )


def main() -> None:
    """Run the stages and print one report."""
    given = parser().parse_args()
    with short_answers():
        from bestiary.shared.music.extract import check_tools
        from bestiary.shared.music.filter import Judge
        from bestiary.shared.music.pipeline import Pipeline
        from bestiary.shared.music.write import ModelWriter, TemplateWriter, template_thoughts, write_thoughts

        complete = model_of(given)
        count = {} if given.questions is None else {"questions": given.questions}
        options: dict[str, Any] = {}
        if complete is None:
            options["writer"] = TemplateWriter(**count)
            if given.think:
                options["thinker"] = lambda record, item, captions: template_thoughts(record) or None
        else:
            options["writer"] = ModelWriter(complete, **count)
            options["judge"] = Judge(complete) if given.judge else None
            if given.think:
                options["thinker"] = lambda *told: write_thoughts(complete, *told)
        if given.listener is not None:
            from bestiary.shared.music.models import listener, load_model

            options["listener"] = listener(load_model(given.listener))
        tools = check_tools(None if given.tools is None else [name.strip() for name in given.tools.split(",")])
        names = (
            "writer",
            "questions",
            "judge",
            "think",
            "listener",
            "checkpoint",
            "base_url",
            "model",
            "temperature",
            "max_tokens",
        )
        settings = {"version": 1, "tools": tools, **{name: getattr(given, name) for name in names}}
        pipeline = Pipeline(
            given.folder.expanduser(),
            given.out.expanduser(),
            tools=tools,
            workers=given.workers,
            settings=settings,
            say=lambda text: print(text, file=sys.stderr, flush=True),
            **options,
        )
        try:
            print(pipeline.run())
        except KeyboardInterrupt:
            print("stopped: the same command goes on from here", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
