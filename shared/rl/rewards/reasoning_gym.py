"""Answers to the tasks of reasoning-gym, scored by the tasks themselves in worker processes."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from bestiary.shared.core.errors import BadDataError, require
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, last_tag
from bestiary.shared.rl.rewards.workers import WorkerPool

UNUSABLE = {
    "composite": "it is a mixture of other tasks; give them as tasks: {name: {weight: 1}}",
    "game_of_life_halting": "its scoring takes nearly any text for a right answer",
    "coin_flip": "its scoring gives 1 to any beginning of the right number, so '0' is always right",
    "puzzle24": "its scoring takes any four numbers that make 24, whichever were given",
}
"""Tasks that must not be trained on, and why (reasoning-gym 0.1.25)."""

NO_GOLD = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
"""Tasks that know no right answer beforehand: the test of verifiers at start-up cannot look at them."""


class ReasoningGym:
    """The score that a task of reasoning-gym gives an answer.

    ``meta`` names the ``task``, the ``config`` of its generator and the ``entry`` that was generated, as
    :class:`~bestiary.shared.rl.tasks.reasoning_gym.ReasoningGymTask` makes them. The answer is the content of the last
    ``<answer>…</answer>`` behind the thoughts, or else the last line.

    By default the reward is 1 for a score of 1 and else 0. The scores in between are partial credit for a nearly right
    answer in some tasks, and in others a consolation that nonsense gets too: 0.01 to 0.05 for having answered at all
    (countdown, power_function, sentence_reordering and others), 0.2 to 0.3 for text that happens to overlap (acre,
    spell_backward, knights_knaves). A policy can live on those, so look at a task's own before using ``partial``.

    An answer runs no code: where a task would evaluate it as Python, only literals and arithmetic are understood. NaN
    and infinities are never right.

    Args:
        partial: give the task's own score.
        workers: worker processes.
        deadline_s: seconds for one answer; one that takes longer scores 0 with status ``timeout``.
        max_chars: longest answer; a longer one scores 0.
    """

    name = "reasoning_gym"

    def __init__(self, partial: bool = False, workers: int = 2, deadline_s: float = 10.0, max_chars: int = 10_000):
        require("reasoning_gym", "rl")
        self.version = f"1, reasoning-gym {version('reasoning-gym')}"
        self.partial, self.max_chars = partial, max_chars
        self.pool = WorkerPool("bestiary.shared.rl.rewards.reasoning_gym_child:score", workers, deadline_s)

    def check(self, example: Example) -> None:
        """Raise BadDataError where the task or its entry is missing, or the task cannot be used."""
        where, meta = f"example {example.get('id')!r}", example.get("meta") or {}
        if not isinstance(meta.get("task"), str) or not isinstance(meta.get("entry"), dict):
            raise BadDataError(
                f'{where} needs meta["task"] and meta["entry"], as the data set reasoning_gym makes them'
            )
        if meta["task"] in UNUSABLE:
            raise BadDataError(f"{where}: the task {meta['task']} cannot be used: {UNUSABLE[meta['task']]}")

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Score; ``gold`` is not used, the entry has what is needed."""
        meta: Any = example.get("meta") or {}
        if not isinstance(meta.get("entry"), dict):
            return Verdict(0.0, "error", note='no meta["entry"]')
        text = after_think(answer)
        tagged = last_tag(text)
        text = last_line(text) if tagged is None else tagged
        if len(text) > self.max_chars:
            return Verdict(0.0, note=f"longer than {self.max_chars} characters")
        known = meta["entry"].get("answer")
        text = known if isinstance(known, str) and text.strip() == known.strip() else text.strip()
        result = self.pool.call(meta.get("task"), meta.get("config") or {}, text, meta["entry"])
        if result.status == "error":
            return Verdict(0.0, "error", note=result.note)
        if result.status != "ok":
            return Verdict(0.0, "timeout", note=result.note)
        score, note = result.value
        return Verdict(float(score) if self.partial else float(score >= 1.0), note=note)

    def gold_answer(self, example: Example) -> str | None:
        """The entry's answer in its tag, where it has one."""
        known = ((example.get("meta") or {}).get("entry") or {}).get("answer")
        return None if known is None else f"<answer>{known}</answer>"

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.rstrip().rpartition("\n")[2]
