"""Talking to a language model: the turns so far, one answer at a time, and what a line typed by a person means."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bestiary.shared.core.build import build, nearest
from bestiary.shared.core.command_line import WITH_VALUE
from bestiary.shared.core.config import conf_dir, options
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.estimate import available_memory
from bestiary.shared.core.examples import Example, Message, text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import CausalLM, move
from bestiary.shared.language.generate import ThinkBudget, check_sampling

TEXTS = ("prompt", "system")
"""Arguments that are taken as they are: Hydra's grammar would trip over the punctuation of a sentence."""

COMMANDS = "/reset forgets the turns, /think and /no_think switch thoughts, /quit ends; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Timing:
    """How long an answer took.

    Attributes:
        tokens: of the answer, the end token included.
        first_s: seconds to the first of them. seconds: to the last.
        finish: ``stop``, ``length``, or ``interrupted``.
    """

    tokens: int
    first_s: float
    seconds: float
    finish: str

    def __str__(self) -> str:
        # The first token's time is that of reading the prompt.
        rest = (self.tokens - 1) / max(self.seconds - self.first_s, 1e-9) if self.tokens > 1 else 0.0
        speed = f", {rest:.1f} tokens/s" if rest else ""
        note = {"stop": "", "length": ", cut at max_new_tokens", "interrupted": ", stopped"}[self.finish]
        return f"[{self.tokens} tokens{speed}, first after {self.first_s:.2f} s{note}]"


class Chat:
    """A conversation with a model.

    Args:
        model: a CausalLM, or another model with ``processor()`` and ``generation(…)``.
        sampling: how answers are drawn; each turn draws other noise.
        system: the system prompt, or None for the template's own.
        thinking: whether the model should think; None is the template's default.
        budget: the most tokens of thought in an answer, or None.
        raw: each line is a text to go on with, without chat template or memory.

    Attributes:
        messages: the turns so far.
        timing: of the last answer.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        system: str | None = None,
        thinking: bool | None = None,
        budget: int | None = None,
        raw: bool = False,
    ):
        self.model, self.sampling, self.system = model, check_sampling(sampling), system
        self.thinking, self.raw = thinking, raw
        self.budget = None if budget is None else ThinkBudget(tokens=budget)
        self.messages: list[Message] = []
        self.timing: Timing | None = None
        self._asked = 0
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system prompt."""
        self.messages = [text_message("system", self.system)] if self.system else []

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a turn, piece by piece. Left early (or by Ctrl-C), what was said so far stays in the chat."""
        self.timing = None
        turn = text_message("user", text)
        self._asked += 1
        example: Example = {"id": str(self._asked), "meta": {"thinking": self.thinking}}
        if self.raw:
            example["text"] = text
        else:
            example["messages"] = [*self.messages, turn]
        batch = self.model.processor()([example], "prompt")
        batch = move(batch, next(self.model.parameters()).device)
        run = self.model.generation(batch, 1, self.sampling, think=self.budget)
        said, whole, began = "", False, time.perf_counter()
        try:
            for _, piece in run.stream():
                said += piece
                yield piece
            whole = True
        finally:
            ended, rollout = time.perf_counter(), run.rollout()
            finish = rollout.finish_reasons[0] if whole else "interrupted"
            first = (run.first_token_at or ended) - began
            self.timing = Timing(rollout.completion_ids.shape[1], first, ended - began, finish)
            if not self.raw and (whole or said):
                self.messages += [turn, text_message("assistant", said)]


def load_model(cfg: DictConfig, choices: Mapping[str, str]) -> nn.Module:
    """The model that ``conf/chat.yaml`` names, in eval mode on its device.

    Raises:
        ConfigError: if none or two are named, or one that does not generate text.
        BadDataError, MissingDataError: for a checkpoint or asset that is not there.
    """
    from bestiary.shared.core.checkpoint import load_checkpoint
    from bestiary.shared.core.device import pick_device
    from bestiary.shared.hub.load import load_pretrained

    chosen = choices.get("backbone", "none")
    if (cfg.checkpoint is None) == (chosen == "none"):
        raise ConfigError(
            "which model? give checkpoint=RUN_FOLDER or backbone=NAME, one of them; for example backbone=smollm2_135m\n"
            f"backbones: {', '.join(o for o in options('backbone') if o != 'none')}"
        )
    if cfg.checkpoint is not None:
        folder = Path(str(cfg.checkpoint)).expanduser()
        if (folder / "config.json").is_file() and not (folder / "structure.json").is_file():
            model = CausalLM(load_pretrained(folder))
        else:
            model, _ = load_checkpoint(cfg.checkpoint)
        if not hasattr(model, "generation"):
            raise ConfigError(f"{cfg.checkpoint} holds a {type(model).__name__}, which does not generate text")
    else:
        if cfg.backbone.get("kind") != "lm":
            raise ConfigError(f"backbone={chosen} is a mixer of segmentation nets: chat needs a language model")
        refuse_what_cannot_fit(cfg.backbone, cfg.device)
        model = CausalLM(build(cfg.backbone))
    return model.eval().to(pick_device(cfg.device))


def refuse_what_cannot_fit(backbone: DictConfig, device: str) -> None:
    """Count a backbone's weights before they are allocated.

    Raises:
        ConfigError: with the figures, if there is no room for them.
    """
    with torch.device("meta"):
        model = build(backbone)
    needed = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    there = available_memory("cpu" if device == "cpu" else "auto")
    if needed > there:
        raise ConfigError(
            f"this cannot fit: the weights take {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are there. "
            "backbone.dtype=bfloat16 halves them"
        )


def split_texts(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The arguments among :data:`TEXTS` with their values word for word, and the others, for Hydra.

    Raises:
        ConfigError: for an empty text, or an argument that ``conf/chat.yaml`` does not have.
    """
    file = conf_dir() / "chat.yaml"
    known = [str(key) for key in OmegaConf.load(file) if key != "defaults"] + ["backbone"]
    usage = file.read_text().splitlines()[0].removeprefix("# ")
    texts: dict[str, str] = {}
    rest = []
    for last, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, value = argument.partition("=")
        name = key.lstrip("+~").split(".")[0]
        if not argument.startswith("-") and last not in WITH_VALUE and (not equals or name not in known):
            wrong = f"there is no key {name!r}{nearest(name, known)}" if equals else f"{argument!r} is not key=value"
            raise ConfigError(f"{wrong}\nusage: {usage}")
        if equals and key in TEXTS:
            if not value.strip():
                raise ConfigError(f"{key}= is empty")
            texts[key] = value
        else:
            rest.append(argument)
    return texts, rest


def read_settings(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of :class:`Chat` that ``conf/chat.yaml`` holds.

    Raises:
        ConfigError: for a value of the wrong kind.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "max_new_tokens": (int,),
        "temperature": (int, float),
        "top_p": (int, float),
        "top_k": (int,),
        "min_p": (int, float),
        "seed": (int,),
    }
    for name, kind in kinds.items():
        if not isinstance(cfg[name], kind) or isinstance(cfg[name], bool):
            raise ConfigError(
                f"{name} must be a number{'' if float in kind else ' without a fraction'}, not {cfg[name]!r}"
            )
    for name, kind in (("think", bool), ("budget", int), ("raw", bool)):
        if not isinstance(cfg[name], kind) and not (cfg[name] is None and name != "raw"):
            raise ConfigError(
                f"{name} must be {'true or false' if kind is bool else 'a number of tokens'}, not {cfg[name]!r}"
            )
    stop = [cfg.stop] if isinstance(cfg.stop, str) else list(cfg.stop)
    sampling = Sampling(**{name: cfg[name] for name in kinds}, stop=tuple(map(str, stop)))
    if cfg.budget is not None and cfg.budget < 0:
        raise ConfigError(f"budget must be 0 or more tokens, not {cfg.budget}")
    if cfg.raw and (cfg.budget is not None or cfg.think is not None):
        raise ConfigError("raw=true continues a text, which has no thoughts: leave think and budget out")
    return {"sampling": check_sampling(sampling), "thinking": cfg.think, "budget": cfg.budget, "raw": cfg.raw}


def say(chat: Chat, text: str, out: TextIO, notes: TextIO) -> bool:
    """Write the answer to a text as it comes, then its timing to ``notes``; False where Ctrl-C stopped it."""
    stopped = False
    try:
        for piece in chat.answer(text):
            out.write(piece)
            out.flush()
    except KeyboardInterrupt:
        stopped = True
    out.write("\n")
    out.flush()
    print(chat.timing or "[stopped]", file=notes, flush=True)
    return not stopped


def converse(chat: Chat, lines: Iterable[str], out: TextIO, notes: TextIO) -> None:
    """Answer lines until they end, or one is ``/quit``. What cannot be answered is said in ``notes``.

    Args:
        chat: the conversation.
        lines: what a person types.
        out: where answers go.
        notes: where everything else goes.
    """
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
            print("[all forgotten]", file=notes, flush=True)
        elif text in ("/think", "/no_think"):
            chat.thinking = text == "/think"
            print(
                f"[thoughts {'on' if chat.thinking else 'off'}, where the template has a switch]",
                file=notes,
                flush=True,
            )
        elif text.startswith("/") and " " not in text and text[1:].replace("_", "").isalpha():
            print(f"there is no command {text}; {COMMANDS}", file=notes, flush=True)
        elif text:
            try:
                say(chat, text, out, notes)
            except BadDataError as error:  # a template may refuse a turn; the next one may do
                print(error, file=notes, flush=True)


def typed_lines(source: TextIO, notes: TextIO) -> Iterator[str]:
    """Lines of a terminal or a pipe; Ctrl-C at the prompt drops the line, Ctrl-D ends."""
    if not source.isatty():
        yield from source
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(/quit ends)", file=notes, flush=True)
        except EOFError:
            print(file=notes)
            return


def run_chat(cfg: DictConfig, choices: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """What ``tools/chat.py`` does: one answer where there is a prompt, otherwise a conversation on standard input.

    Answers alone go to standard output, so that a pipe gets nothing else.

    Args:
        cfg: of ``conf/chat.yaml``.
        choices: the option of each group.
        texts: from :func:`split_texts`.
    """
    settings = read_settings(cfg)
    prompt = texts.get("prompt")
    if prompt == "-":
        prompt = sys.stdin.read()
        if not prompt.strip():
            raise BadDataError("prompt=- reads standard input, and there was nothing")
    chat = Chat(load_model(cfg, choices), system=texts.get("system"), **settings)
    if prompt is not None:
        if not say(chat, prompt, sys.stdout, sys.stderr):
            sys.exit(130)
        return
    if sys.stdin.isatty():
        device = next(chat.model.parameters()).device
        size = sum(p.numel() for p in chat.model.parameters()) / 1e6
        print(f"{size:,.1f} M parameters on {device}. {COMMANDS}", file=sys.stderr)
    converse(chat, typed_lines(sys.stdin, sys.stderr), sys.stdout, sys.stderr)
