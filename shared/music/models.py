"""Models of this repository as writers and listeners."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bestiary.shared.core.checkpoint import load_checkpoint
from bestiary.shared.core.device import pick_device
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.hub.load import load_pretrained
from bestiary.shared.language.causal_lm import CausalLM, move
from bestiary.shared.music.write import Complete
from bestiary.shared.rl.rewards.extract import after_think, last_tag

DESCRIBE = "Describe this music."


def load_model(checkpoint: str, device: str = "auto") -> Any:
    """A model that generates text: a run, a stage, or a folder in the layout of transformers (language models).

    Raises:
        ConfigError: if it does not generate text.
        BadDataError, MissingDataError: where there is no checkpoint.
    """
    folder = Path(checkpoint).expanduser()
    if (folder / "config.json").is_file() and not (folder / "structure.json").is_file():
        model: nn.Module = CausalLM(load_pretrained(folder))
    else:
        model, _ = load_checkpoint(folder)
    if not hasattr(model, "generate"):
        raise ConfigError(f"{checkpoint} holds a {type(model).__name__}, which does not generate text")
    return model.eval().to(pick_device(device))


def completer(model: Any, max_new_tokens: int = 1024, temperature: float = 0.7) -> Complete:
    """Prompt to answer; a prompt's noise is a function of how many came before, and one is answered at a time.

    Raises:
        ConfigError: at once, for a model that cannot read, for want of a tokenizer perhaps, or for no tokens.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        raise ConfigError(f"max_tokens is 1 or more, and temperature 0 or more, not {max_new_tokens}, {temperature:g}")
    lock, asked = threading.Lock(), iter(range(2**62))

    def example(prompt: str) -> Example:
        return {"id": "prompt", "messages": [text_message("user", prompt)], "meta": {}}

    def complete(prompt: str) -> str:
        with lock:
            return _generate(model, example(prompt), Sampling(max_new_tokens, temperature, seed=next(asked)))

    _try(model, example(DESCRIBE), "read")
    return complete


def listener(model: Any, question: str = DESCRIBE, max_new_tokens: int = 256) -> Callable[[np.ndarray, int], str]:
    """Samples (N,) and their rate to what a model with ears says of them, without its thoughts; greedy.

    Raises:
        ConfigError: at once, for a model that takes no audio.
    """

    def asked(samples: np.ndarray, rate: int) -> Example:
        audio: Any = {"type": "audio", "value": samples, "rate": rate}
        content: Any = [audio, {"type": "text", "value": question}]
        return {"id": "clip", "messages": [{"role": "user", "content": content}], "meta": {}}

    def listen(samples: np.ndarray, rate: int) -> str:
        text = after_think(_generate(model, asked(samples, rate), Sampling(max_new_tokens)))
        answer = last_tag(text)
        return " ".join((text if answer is None else answer).split())

    _try(model, asked(np.zeros(16000, np.float32), 16000), "hear")
    return listen


def _try(model: Any, example: Example, sense: str) -> None:
    """Refuse a model that does not take such examples: later, it would be the fault of each piece."""
    try:
        model.processor()([example], "prompt")
    except BadDataError as error:
        raise ConfigError(f"this {type(model).__name__} does not {sense}: {error}") from error


def _generate(model: Any, example: Example, sampling: Sampling) -> str:
    batch = model.processor()([example], "prompt")
    return model.generate(move(batch, next(model.parameters()).device), 1, sampling).texts[0]
