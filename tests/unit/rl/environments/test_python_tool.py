import importlib.util
from dataclasses import dataclass

import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.rl.environments.python_tool import PythonTool
from bestiary.shared.rl.environments.tool_environment import play
from bestiary.shared.rl.protocols import Environment
from bestiary.shared.rl.tool_calls import ToolCall


@dataclass
class Ran:
    stdout: str = ""
    stderr: str = ""
    returncode: int = 0
    timed_out: bool = False
    harness_error: str = ""
    killed: str = ""


class FakeSandbox:
    """Answers by the script's text; no code is run in this process."""

    rung = "fake"

    def __init__(self, **scripts):
        self.scripts, self.seen, self.closed = scripts, [], 0

    def run_script(self, code, stdin=""):
        self.seen.append(code)
        return self.scripts.get(code, Ran("42\n"))

    def close(self):
        self.closed += 1


def example(answer="42"):
    return {"id": "q", "messages": [text_message("user", "6*7?")], "answer": answer, "verifier": "exact_text"}


def calling(environment, *codes):
    return environment.format.render([ToolCall("python", {"code": code}) for code in codes], environment.tools)


@pytest.mark.parametrize("form", ["hermes", "nemotron_nano_v2", "nemotron_3", "compact"])
def test_oracle_and_idler(form):
    sandbox = FakeSandbox()
    environment = PythonTool(form, sandbox=sandbox)
    assert isinstance(environment, Environment)
    code = 'x = 6\nprint(x * 7)  # "quoted" <b>'
    said, verdict = play(environment, example(), [calling(environment, code), "42"])
    assert (said, verdict.score) == (["42"], 1.0)
    assert sandbox.seen == [code]
    assert play(environment, example(), [""])[1].score == 0.0
    assert "sandbox fake" in environment.describe()
    assert "nothing is kept" in environment.prompt(example())["messages"][0]["content"][0]["value"]
    assert "exact_text 1" in environment.self_test([example()])
    environment.close()
    environment.close()
    assert sandbox.closed == 2


def test_what_the_policy_is_shown():
    scripts = {
        "long": Ran("first" + "x" * 50_000 + "last"),
        "fails": Ran("so far\n", "Traceback…\nZeroDivisionError: division by zero\n", 1),
        "hangs": Ran("", "", -9, True),
        "silent": Ran(),
        "noisy": Ran("", "y" * 50_000 + "TheError", 1),
    }
    environment = PythonTool(sandbox=FakeSandbox(**scripts), max_turns=20, max_calls=20)
    said = {name: play(environment, example(), [calling(environment, name), "42"])[0][0] for name in scripts}
    assert said["fails"] == "so far\nerror: exit code 1\nTraceback…\nZeroDivisionError: division by zero"
    assert said["hangs"] == "error: it took too long and was stopped"
    assert said["silent"] == "(it printed nothing)"
    assert said["long"].startswith("first")
    assert said["long"].endswith("last")
    assert said["noisy"].endswith("TheError")
    assert all(len(answer) <= 2100 for answer in said.values())


def test_limits():
    sandbox = FakeSandbox()
    environment = PythonTool(sandbox=sandbox, max_turns=3, max_calls=2)
    said, verdict = play(environment, example(), [calling(environment, "a", "b", "c")] * 9)
    assert said == ["42", "42"] + ["error: at most 2 calls can be made; answer now"] * 7
    assert verdict.score == 0.0
    assert sandbox.seen == ["a", "b"]
    for code in ("x" * 20_001, "x" * 10_000_000, "a\0b"):
        said, _ = play(environment, example(), [calling(environment, code), "42"])
        assert said[0].startswith("error: ")
        assert len(said[0]) < 400
    assert len(sandbox.seen) == 2


def test_a_failure_of_the_sandbox_is_not_the_policys():
    class Failing:
        def run_script(self, code, stdin=""):
            raise OSError("no more processes")

    for sandbox in (Failing(), FakeSandbox(a=Ran(harness_error="it did not start"))):
        environment = PythonTool(sandbox=sandbox)
        with pytest.raises((OSError, RuntimeError)):
            environment.reset(example(), 0).step(calling(environment, "a"))
    with pytest.raises(RuntimeError, match="says '41'"):
        PythonTool(sandbox=FakeSandbox(**{"print(6 * 7)": Ran("41")})).self_test([])


def _sandboxed():
    if importlib.util.find_spec("bestiary.shared.rl.sandbox") is None:
        pytest.skip("the sandbox is not installed")
    try:
        return PythonTool(max_turns=10)
    except ConfigError as error:
        pytest.skip(f"no safe sandbox here: {error}")


def test_real_scripts():
    environment = _sandboxed()
    try:
        turns = [
            calling(environment, "x = 6\nprint(x * 7)"),
            calling(environment, "print(x)"),
            calling(environment, "print('é' * 3)"),
            calling(environment, "print('x' * 10**8)"),
            "42",
        ]
        said, verdict = play(environment, example(), turns)
        assert said[0] == "42"
        assert "NameError" in said[1]  # nothing is kept between calls
        assert said[2] == "ééé"
        assert "it was stopped: more than" in said[3]
        assert verdict.score == 1.0
        environment.self_test([])
    finally:
        environment.close()
