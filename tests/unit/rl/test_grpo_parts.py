"""The small parts of a step: prompts, warnings, metrics, records, pass@k, the watchdog, the shuffled control."""

import itertools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError, UserError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.core.streams import Stream, uniform_keys, uniforms
from bestiary.shared.metrics.pass_at import PassAt, interval, unbiased
from bestiary.shared.rl.controllers.base import Controller
from bestiary.shared.rl.controllers.pass_rates import PassRates
from bestiary.shared.rl.grpo import GRPO
from bestiary.shared.rl.losses import make_rule
from bestiary.shared.rl.prompts import Prompts
from bestiary.shared.rl.protocols import ScoredRow, Verdict
from bestiary.shared.rl.records import Records, read_records, recorded_example
from bestiary.shared.rl.rewards.controls import Shuffled
from bestiary.shared.rl.rollouts import Group, Trajectory
from bestiary.shared.rl.step_metrics import FlatSteps, step_metrics


class Numbered:
    """Example k is ``e<k>``."""

    def train_example(self, k, stream, part=None):
        return {"id": f"e{k}", "messages": [text_message("user", str(k))], "answer": str(k)}


def prompts(controllers, source=None):
    data = SimpleNamespace(source=source or Numbered(), stream=Stream(0, "grpo", 4), part="rl")
    return Prompts(data, controllers, PassRates())


def test_prompts_follow_a_cursor_and_what_controllers_let_pass():
    class Even(Controller):
        def admit(self, step, example, record, rng):
            return int(example["answer"]) % 2 == 0

    made = prompts([Even()])
    assert [e["id"] for e in made.draw(0, 3)] == ["e0", "e2", "e4"]
    assert made.cursor == 5
    assert [e["id"] for e in made.draw(1, 2)] == ["e6", "e8"]


def test_a_filter_that_lets_nothing_pass_ends_the_run_with_advice():
    class No(Controller):
        def admit(self, step, example, record, rng):
            return False

    with pytest.raises(UserError, match="give it harder"):
        prompts([No()]).draw(0, 1)


def test_text_is_no_prompt():
    source = SimpleNamespace(train_example=lambda k, stream, part: {"id": "x", "text": "abc"})
    with pytest.raises(BadDataError, match="is no chat"):
        prompts([], source).draw(0, 1)


def group(scores, lengths=None, index=0, status="ok", truncated=False):
    example = {"id": f"q{index}", "messages": [text_message("user", "hi")], "answer": "1", "meta": {"a": 1}}
    rows = []
    for sample, score in enumerate(scores):
        n = (lengths or [3] * len(scores))[sample]
        row = Trajectory(example, sample, [1] * n, [True] * n, [-0.5] * n, [0.3] * n, [f"t{sample}"], truncated)
        row.verdict = Verdict(score, status, {"format": 1.0})
        rows.append(row)
    return Group(index, example, f"q{index}", [7, 8], rows)


def test_metrics_by_hand():
    groups = [group([1.0, 0.0], [2, 4]), group([1.0, 1.0], [6, 6], 1)]
    scores = torch.tensor([[1.0, 0.0], [1.0, math.nan]])
    found = step_metrics(groups, scores, scores * 2)
    assert found["score"] == pytest.approx(2 / 3)
    assert found["reward"] == pytest.approx(4 / 3)
    assert found["no_spread_share"] == 0.5
    assert (found["length"], found["length_min"], found["length_max"]) == (4.5, 2, 6)
    assert found["adjusted_entropy"] == pytest.approx(0.3)
    assert found["part/format"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"error_share": 1.0}, "error of the harness"),
        ({"truncated_share": 1.0}, "max_new_tokens"),
        ({"score": 1.0}, "harder"),
        ({"score": 0.0}, "easier prompts"),
        ({"score": 0.5}, "temperature"),
    ],
)
def test_equal_rewards_for_many_steps_get_one_warning_that_says_what_to_change(change, words):
    flat = FlatSteps(3)
    metrics = {"no_spread_share": 1.0, "error_share": 0.0, "truncated_share": 0.0, "score": 0.5} | change
    said = [flat.see("grpo", step, metrics) for step in range(7)]
    assert [s is not None for s in said] == [False, False, True, False, False, True, False]
    assert words in said[2]
    assert flat.see("grpo", 7, metrics | {"no_spread_share": 0.9}) is None
    assert flat.count == 0


def test_records_come_back_and_what_came_after_a_checkpoint_goes(tmp_path):
    records = Records(tmp_path / "completions.jsonl")
    records.write(0, [group([1.0, 0.0])], [[1.0, math.nan]], [[0.7, 0.0]], {"temperature": 1.0})
    size = records.size
    records.write(1, [group([1.0, 1.0], index=1)], [[1.0, 1.0]], [[0.0, 0.0]], {})
    assert [line["step"] for line in read_records(records.file)] == [0, 1]
    records.rewind(size)
    (line,) = read_records(records.file)
    assert [row["reward"] for row in line["rows"]] == [1.0, None]
    assert line["rows"][0]["ids"] == [1, 1, 1]
    example = recorded_example(line)
    assert example["messages"] == [text_message("user", "hi")]
    assert (example["answer"], example["meta"]) == ("1", {"a": 1})
    with open(records.file, "ab") as handle:
        handle.write(b'{"step": 1, "ro')
    assert len(list(read_records(records.file))) == 1


def test_lone_surrogates_and_ten_megabytes_are_recorded(tmp_path):
    records = Records(tmp_path / "c.jsonl", tokens=False)
    strange = group([1.0])
    strange.rows[0].turns = ["\ud800\x00" + "x" * 10_000_000]
    records.write(0, [strange], [[1.0]], [[0.0]], {})
    (line,) = read_records(records.file)
    assert len(line["rows"][0]["turns"][0]) > 10_000_000
    assert "ids" not in line["rows"][0]


def test_pass_at_k_against_all_subsets():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert unbiased(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_intervals():
    low, high = interval([1.0] * 5 + [0.0] * 5, 1)  # Wilson's for 5 of 10, from its table
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert interval([0.0] * 20, 1)[0] == 0
    assert interval([0.0] * 20, 1)[1] > 0.1
    low, high = interval([0.25, 0.75], 4)
    assert high - low == pytest.approx(2 * 1.959964 * 0.25)


def test_pass_at_counts_what_the_environment_says(llama, chats, scored):
    verdicts = {"q0": Verdict(1.0), "q1": Verdict(0.5), "q2": Verdict(1.0, "error")}
    examples = chats("a", "b", "c")
    for example, kind in zip(examples, ("x", "y", "x"), strict=True):
        example["meta"] = {"kind": kind, "place": "here"}
    by = ["kind", "place"]
    protocol = PassAt(environment=scored(lambda text, e: verdicts[e["id"]]), sampling=Sampling(3), by=by, label="g")
    found = protocol(llama().eval(), examples)
    assert found["g/pass@1"] == pytest.approx(1 / 3)
    assert found["g/errors"] == 1
    assert (found["g/pass@1/kind=x"], found["g/pass@1/kind=y"]) == (0.5, 0.0)
    assert found["g/pass@1/place=here"] == found["g/pass@1"]
    examples[1]["meta"] = {}
    assert [name for name in protocol(llama().eval(), examples) if "kind" in name] == ["g/pass@1/kind=x"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"samples": 2, "k": [3]}, "between 1 and"), ({"samples": 4}, "greedy policy are one"), ({"k": []}, "between 1")],
)
def test_pass_at_mistakes(options, words):
    with pytest.raises(ConfigError, match=words):
        PassAt(**options)


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
    rewards = torch.arange(12.0).view(3, 4)
    rows = [[ScoredRow({}, f"{i}{j}", 1, "stop", Verdict(0.0)) for j in range(4)] for i in range(3)]
    first = Shuffled()(rewards, rows)
    assert sorted(first.flatten().tolist()) == list(range(12))
    assert not torch.equal(first, rewards)
    assert torch.equal(first, Shuffled()(rewards, rows))
    assert not torch.equal(first, Shuffled(1)(rewards, rows))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples_per_prompt": 1}, "leaves nothing to compare"),
        ({"sampling": Sampling(4, 0.0)}, "same completion every time"),
        ({"updates": 0}, "updates must be 1"),
        ({"engine": SimpleNamespace(name="far", exact=False)}, "set rule.correction"),
    ],
)
def test_impossible_settings_are_refused(llama, options, words):
    with pytest.raises(ConfigError, match=words):
        GRPO(llama(), **options)


def test_one_sample_is_allowed_without_a_baseline_and_dropout_is_switched_off(llama):
    model = llama()
    model.drop = torch.nn.Dropout(0.3)
    GRPO(model, samples_per_prompt=1, rule=make_rule("reinforce", baseline="none"))
    assert model.drop.p == 0.0


def test_the_reference_is_the_policy_that_the_stage_began_with(llama):
    model = llama()
    objective = GRPO(model, rule=make_rule("grpo", kl=0.1))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    first, now = next(objective.reference.parameters()), next(model.parameters())
    assert not torch.equal(first, now)
    assert not any(p.requires_grad for p in objective.reference.parameters())


def test_a_gap_between_sampler_and_trainer_ends_the_run(llama):
    objective = GRPO(llama())
    objective._check_gap(0.005)
    with pytest.raises(UserError, match="not the one that is trained"):
        objective._check_gap(0.02)
    with pytest.raises(UserError, match="inf"):
        objective._check_gap(math.inf)


def test_the_watchdog_writes_all_stacks_when_nothing_moves():
    code = """
import time
from bestiary.shared.rl.watchdog import Watchdog
def stuck_here():
    time.sleep(1.5)
dog = Watchdog(0.3 / 60)
dog.beat(); stuck_here(); dog.rest(); print("on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "stuck_here" in done.stderr
    assert done.stdout.strip() == "on"


def test_draws_are_uniform_and_independent_of_each_other():
    keys = uniform_keys(3, [f"p{i // 8}" for i in range(4096)], [i % 8 for i in range(4096)])
    assert len(set(keys.tolist())) == 4096
    draws = [uniforms(keys, t) for t in range(8)]
    for values in draws:
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(values.mean() - 0.5) < 0.02
        # Kolmogorov's distance at 4,096 draws stays below 0.03 but for one time in a thousand.
        ordered = sorted(values.tolist())
        assert max(abs(v - i / 4096) for i, v in enumerate(ordered)) < 0.03
    for a, b in itertools.combinations(draws, 2):
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 0.06
    other = uniforms(uniform_keys(4, ["p0"] * 4096, range(4096)), 0)
    assert abs(((draws[0] - 0.5) * (other - 0.5)).mean() * 12) < 0.06


def test_json_survives(tmp_path):
    """Metadata that JSON does not know is written as text, not lost with the step."""
    odd = group([1.0])
    odd.example["meta"] = {"when": {1, 2}}
    records = Records(tmp_path / "c.jsonl")
    records.write(0, [odd], [[1.0]], [[0.0]], {})
    assert json.loads(records.file.read_text())["meta"] == {"when": "{1, 2}"}
