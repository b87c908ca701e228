"""The workplace: calendar, mail, contacts and tasks, changed by tools and scored by the state they are left in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.environments.tool_environment import ToolEnvironment, call_tool, play
from bestiary.shared.rl.environments.workplace_tools import TOOLS
from bestiary.shared.rl.environments.workplace_world import DAYS, World, make_rows
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.tool_calls import ToolCall, without_thoughts

LONGEST_ANSWER = 2000
"""Characters of an answer to a question for a fact."""

FACTS: Mapping[str, re.Pattern[str]] = {
    "mail": re.compile(r"[\w.+-]{1,64}@[\w.-]{0,63}\w", re.ASCII),
    "day": re.compile("|".join(DAYS)),
    "time": re.compile(r"(?<!\d)\d\d:\d\d(?!\d)", re.ASCII),
    "number": re.compile(r"\d+", re.ASCII),
}
"""What a fact of each kind looks like in an answer."""


class Workplace(ToolEnvironment):
    """Requests of an office worker in a small world of four tables.

    The reward is 1 where the database is left as the example's calls (``meta["gold_calls"]``) leave it, in all tables:
    another change than those asked for gives 0. The numbers of new rows do not count. Where ``meta["fact"]`` is given,
    the answer must hold that fact and no other of its kind, so listing everything gives nothing.

    Paper: arXiv:2512.20848 (Nemotron 3 Nano), the Workplace Assistant: five databases, 26 tools and 690 tasks there.
    This one is ours and smaller, so its numbers compare with nothing published.

    Args:
        format: how calls are written.
        max_turns: turns of the policy after which an episode is cut.
        max_calls: calls of one episode.
        max_result: characters of an answer that the policy is shown.
        system: the text about the tools; None is the format's own.
        thinking: the chat template opens a thought in the prompt.
    """

    name = "workplace"
    version = "1"

    def __init__(
        self,
        format: str = "hermes",
        max_turns: int = 10,
        max_calls: int = 20,
        max_result: int = 2000,
        system: str | None = None,
        thinking: bool = False,
    ):
        super().__init__(TOOLS, format, max_turns, max_calls, max_result, system, thinking)

    def new_world(self, example: Example, seed: int) -> World:
        """The example's world (``meta["world"]``); where it names none, that of the seed."""
        return World(make_rows(int(example.get("meta", {}).get("world", seed))))

    def judge(self, example: Example, world: World, text: str) -> Verdict:
        """Compare the database with the one expected, and the answer with the fact."""
        meta = example.get("meta", {})
        # Neither tools nor verdicts touch the rows a world began with, so the copy is a second world of the same rows.
        expected = World(world.rows)
        try:
            for call in meta["gold_calls"]:
                answer, good = call_tool(self.tools, expected, ToolCall(call["name"], call["arguments"]))
                if not good:
                    return Verdict(0.0, "error", note=f"the expected call {call['name']} failed: {answer}"[:300])
            wanted, found = expected.state(), world.state()
        finally:
            expected.close()
        wrong = [table for table in wanted if wanted[table] != found[table]]
        parts = {"state": float(not wrong)}
        if fact := meta.get("fact"):
            parts["fact"] = float(self._states(text, fact))
        score = min(parts.values())
        note = f"not as expected: {', '.join(wrong)}" if wrong else "" if score else "the answer lacks the fact"
        return Verdict(score, parts=parts, note=note)

    def turns_of(self, example: Example) -> list[str]:
        """What a policy says that makes the expected calls, one a turn, and gives the answer."""
        calls = [ToolCall(call["name"], call["arguments"]) for call in example["meta"]["gold_calls"]]
        closed = "</think>" if self.thinking else ""
        said = [closed + self.format.render([call], self.tools) for call in calls]
        return [*said, closed + example["answer"]]

    def self_test(self, examples: Sequence[Example]) -> str:
        """Let the expected calls solve each example, and a policy that does nothing fail.

        Raises:
            BadDataError: for an example of another data set.
            ConfigError: if the expected calls do not score 1, or idleness does.
        """
        for example in examples:
            if "gold_calls" not in example.get("meta", {}) or "answer" not in example:
                raise BadDataError(
                    f"example {example.get('id')!r} is no task of the workplace: it needs meta.gold_calls and an "
                    "answer. Use dataset=workplace_tasks"
                )
            _, right = play(self, example, self.turns_of(example))
            _, idle = play(self, example, ["</think>" if self.thinking else ""])
            if right.score != 1.0 or idle.score == 1.0:
                raise ConfigError(
                    f"example {example['id']!r}: the expected calls score {right.score:g} ({right.note or 'no note'}) "
                    f"and doing nothing scores {idle.score:g}; they must score 1 and 0. max_turns is {self.max_turns}"
                )
        return f"workplace: the expected calls solve {len(examples)} examples, and idleness none"

    def _states(self, text: str, fact: Mapping[str, Any]) -> bool:
        answer = without_thoughts(text, self.thinking)
        if len(answer) > LONGEST_ANSWER:
            return False
        return all(set(FACTS[kind].findall(answer)) == {value} for kind, value in fact.items())
