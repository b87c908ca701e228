"""Python as a tool: each call is a script in a sandbox of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.core.examples import Example
from bestiary.shared.rl.environments.tool_environment import Tool, ToolEnvironment, ToolError
from bestiary.shared.rl.environments.verdicts import Verifiers
from bestiary.shared.rl.protocols import Verdict, Verifier

MAX_CODE = 20_000
"""Longest script, in characters."""


class PythonTool(ToolEnvironment):
    """Questions that are answered with the help of short programs; the answer goes to a verifier.

    A call runs in a fresh process of the sandbox, which has no network and forgets all when it ends. What the script
    prints comes back, cut to ``max_result`` characters, and the end of its error where it fails.

    Args:
        format: how calls are written.
        max_turns: turns of the policy after which an episode is cut.
        max_calls: calls of one episode.
        max_result: characters of an answer that the policy is shown.
        system: the text about the tool; None is the format's own.
        thinking: the chat template opens a thought in the prompt.
        verifier: for all examples, built or by name; None takes the one that each example names.
        options: arguments of the verifiers by name.
        sandbox: a :class:`~bestiary.shared.rl.sandbox.Sandbox`; None makes one.
        allow_unsafe: let that one run without isolation where this machine has none.

    Raises:
        ConfigError: if this machine has no safe sandbox.
    """

    name = "python_tool"
    version = "1"

    def __init__(
        self,
        format: str = "hermes",
        max_turns: int = 6,
        max_calls: int = 8,
        max_result: int = 2000,
        system: str | None = None,
        thinking: bool = False,
        verifier: Verifier | str | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        sandbox: Any = None,
        allow_unsafe: bool = False,
    ):
        if sandbox is None:
            from bestiary.shared.rl.sandbox import Sandbox

            sandbox = Sandbox(allow_unsafe=allow_unsafe)
        self.sandbox = sandbox
        super().__init__([self._tool()], format, max_turns, max_calls, max_result, system, thinking)
        self.verifiers = Verifiers(verifier, options)

    def judge(self, example: Example, world: Any, text: str) -> Verdict:
        """Ask the verifier."""
        return self.verifiers.verify(example, text)

    def run(self, code: str) -> str:
        """What a script prints, or how it fails.

        Raises:
            ToolError: for a script that is too long.
            RuntimeError: if the sandbox itself fails.
        """
        if len(code) > MAX_CODE:
            raise ToolError(f"a script has at most {MAX_CODE} characters")
        result = self.sandbox.run_script(code)
        if getattr(result, "harness_error", ""):
            raise RuntimeError(f"the sandbox failed: {result.harness_error}")
        parts = [_middle(result.stdout, self.max_result // 2)]
        if result.timed_out:
            parts.append("error: it took too long and was stopped")
        elif result.killed:
            parts.append(f"error: it was stopped: {result.killed}")
        elif result.returncode:
            # The last lines say what went wrong; the ones before say where in a file that is gone.
            parts.append(f"error: exit code {result.returncode}\n{result.stderr[-self.max_result // 3 :].strip()}")
        return "\n".join(part for part in parts if part) or "(it printed nothing)"

    def self_test(self, examples: Sequence[Example]) -> str:
        """Test the sandbox, and the verifiers on these examples."""
        answer = self.run("print(6 * 7)")
        if answer != "42":
            raise RuntimeError(f"the sandbox was asked for print(6 * 7) and says {answer[:300]!r}")
        return self.verifiers.self_test(examples)

    def counters(self) -> dict[str, float]:
        """Calls and verdicts since the start."""
        return super().counters() | self.verifiers.counters()

    def describe(self) -> str:
        """One line for the log, with the rung of the sandbox."""
        return f"{super().describe()}; sandbox {getattr(self.sandbox, 'rung', 'of the user')}"

    def close(self) -> None:
        """Close the verifiers and the sandbox."""
        self.verifiers.close()
        close = getattr(self.sandbox, "close", None)
        if callable(close):
            close()

    def _tool(self) -> Tool:
        return Tool(
            name="python",
            description="Run a Python script and see what it prints. Each call is a new process: nothing is kept.",
            parameters={
                "type": "object",
                "properties": {"code": {"type": "string", "description": "the script; print what you want to see"}},
                "required": ["code"],
                "additionalProperties": False,
            },
            function=lambda world, arguments: self.run(arguments["code"]),
        )


def _middle(text: str, longest: int) -> str:
    """A text with its middle left out where it is longer than ``longest``: a script's last line matters most."""
    text = text.rstrip()
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n… ({len(text) - 2 * half} characters left out)\n{text[-half:]}"
