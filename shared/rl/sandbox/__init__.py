"""Runs code that a model wrote: no network, no files but a scratch folder, limits on time, memory and processes."""

from bestiary.shared.rl.sandbox.process import Outcome
from bestiary.shared.rl.sandbox.run import Call, CheckResult, Result, Sandbox, ScriptResult
from bestiary.shared.rl.sandbox.rungs import Limits

__all__ = ["Call", "CheckResult", "Limits", "Outcome", "Result", "Sandbox", "ScriptResult"]
