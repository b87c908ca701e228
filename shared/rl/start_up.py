"""What is looked at before the first rollout: do prompts fit, and do the verifiers know a right answer."""

from __future__ import annotations

from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.loader import StageData


def context_of(model: Any) -> int | None:
    """The longest sequence a model was made for, in tokens, where its backbone says so."""
    config = getattr(getattr(getattr(model, "backbone", None), "lm", None), "config", None)
    return getattr(config, "max_position_embeddings", None)


def prompt_limit(max_len: int | None, context: int | None, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves room for a completion, or None without a limit."""
    known = [value for value in (max_len, context) if value is not None]
    return min(known) - max_new_tokens if known else None


def check_start(objective: Any, data: StageData) -> None:
    """Check a stage of rollouts, and say what it runs with.

    Args:
        objective: the GRPO objective.
        data: the stage's data.

    Raises:
        BadDataError: if none of the first prompts fits, or an example is no chat.
        ConfigError: if a gold answer does not score 1, or nonsense does.
    """
    count = max(objective.self_test, 1)
    examples = [data.source.train_example(k, data.stream, data.part) for k in range(count)]
    for example in examples:
        if "messages" not in example:
            raise BadDataError(f"example {example.get('id')!r} is no chat: reinforcement learning needs prompts")
    environment = objective.environment
    limit = objective.rollouts.max_prompt
    shown = [environment.prompt(example) for example in examples]
    lengths = data.processor([{k: v for k, v in e.items() if k != "answer"} for e in shown], "prompt")[  # type: ignore
        "attention_mask"
    ].sum(1)
    if limit is not None and int(lengths.min()) > limit:
        raise BadDataError(
            f"none of the first {count} prompts fits: the shortest has {int(lengths.min())} tokens, and max_len "
            f"{data.max_len} (the model's context is {objective.context}) leaves {limit} beside "
            f"sampling.max_new_tokens {objective.sampling.max_new_tokens}. Raise the stage's max_len, or lower "
            "max_new_tokens"
        )
    lines = []
    if objective.self_test and hasattr(environment, "self_test"):
        lines.append(environment.self_test(examples))
    describe = getattr(environment, "describe", None)
    if callable(describe):
        lines.append(str(describe()))
    long = int((lengths > limit).sum()) if limit is not None else 0
    if long:
        lines.append(f"{long} of the first {count} prompts have more than {limit} tokens; such prompts are left out")
    if data.rank == 0:
        for line in lines:
            print(f"{data.stream.stage}: {line}", flush=True)
