"""Sweep files: what is refused, what a grid holds, and that random values follow the distribution that W&B names."""

from __future__ import annotations

import copy
import itertools
import math
import statistics

import pytest
import yaml

from bestiary.shared.results.sweeps import DISTRIBUTIONS, SweepError, corners, read_sweep, render, trials

FILE = {
    "program": "tools/train.py",
    "method": "random",
    "metric": {"name": "val/x", "goal": "maximize"},
    "run_cap": 4,
    "parameters": {"recipe.lr": {"values": [0.1, 0.2]}},
    "command": ["${env}", "${interpreter}", "${program}", "+project=p", "${args_no_hyphens}"],
}


@pytest.fixture
def read(tmp_path):
    def make(text=None, **changes):
        data = copy.deepcopy(FILE) | changes
        path = tmp_path / "a_sweep.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v != "drop"}) if text is None else text)
        return read_sweep(path)

    return make


def draw(read, count=4000, **parameter):
    sweep = read(parameters={"p": parameter})
    return [values["p"] for values in itertools.islice(trials(sweep), count)], sweep.parameters[0]


def test_what_a_file_says(read):
    sweep = read(metric={"name": "val/loss", "goal": "minimize"})
    assert (sweep.name, sweep.method, sweep.metric, sweep.maximize, sweep.run_cap) == (
        "a_sweep", "random", "val/loss", False, 4
    )  # fmt: skip
    assert read(name="other").name == "other"


def test_a_grid_is_every_combination_in_order(read):
    sweep = read(
        method="grid",
        run_cap="drop",
        parameters={"a": {"values": [1, 2]}, "b": {"min": 3, "max": 4}, "c": {"value": "x"},
                    "d": {"distribution": "q_uniform", "min": 0, "max": 0.3, "q": 0.1}},
    )  # fmt: skip
    found = list(trials(sweep))
    assert len(found) == 2 * 2 * 4
    assert found[0] == {"a": 1, "b": 3, "c": "x", "d": 0.0}
    assert found[3]["d"] == 0.3
    assert found[-1] == {"a": 2, "b": 4, "c": "x", "d": 0.3}
    assert corners(sweep) == (found[0], found[-1])


def test_random_trials_depend_on_seed_number_and_name_alone(read):
    one = read(parameters={"a": {"min": 0.0, "max": 1.0}})
    two = read(parameters={"b": {"min": 0.0, "max": 1.0}, "a": {"min": 0.0, "max": 1.0}})
    first = [t["a"] for t in itertools.islice(trials(one), 5)]
    assert first == [t["a"] for t in itertools.islice(trials(two), 5)]
    assert first != [t["a"] for t in itertools.islice(trials(one, seed=1), 5)]
    assert all(t["a"] != t["b"] for t in itertools.islice(trials(two), 5))


def test_no_trial_comes_twice_and_a_small_space_ends(read):
    sweep = read(parameters={"a": {"values": [1, 2]}, "b": {"min": 1, "max": 3}})
    found = [tuple(t.values()) for t in trials(sweep)]
    assert sorted(found) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("parameter", "transform", "mean", "sd"),
    [
        ({"distribution": "uniform", "min": 2, "max": 5}, float, 3.5, 3 / math.sqrt(12)),
        ({"distribution": "log_uniform", "min": -3, "max": 1}, math.log, -1, 4 / math.sqrt(12)),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}, math.log10, -2.5, 3 / math.sqrt(12)),
        ({"distribution": "inv_log_uniform", "min": -3, "max": 1}, lambda x: math.log(1 / x), -1, 4 / math.sqrt(12)),
        ({"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 1e-1}, math.log10, -2.5, 3 / math.sqrt(12)),
        ({"distribution": "normal", "mu": 2, "sigma": 3}, float, 2, 3),
        ({"distribution": "log_normal", "mu": -1, "sigma": 0.5}, math.log, -1, 0.5),
        # Mean a / (a + b), variance a b / ((a + b)^2 (a + b + 1)).
        ({"distribution": "beta", "a": 2, "b": 6}, float, 0.25, math.sqrt(12 / 64 / 9)),
    ],
    ids=lambda value: value.get("distribution") if isinstance(value, dict) else None,
)
def test_a_distribution_has_its_mean_and_spread(read, parameter, transform, mean, sd):
    values, known = draw(read, **parameter)
    seen = [transform(v) for v in values]
    assert statistics.fmean(seen) == pytest.approx(mean, abs=4 * sd / math.sqrt(len(seen)))
    assert statistics.stdev(seen) == pytest.approx(sd, rel=0.08)
    if "min" in parameter:
        low, high = sorted(known.ends())
        assert low <= min(values)
        assert max(values) <= high
    # The same in steps of q: round(X / q) * q.
    if not parameter["distribution"].startswith("inv_"):
        stepped, _ = draw(read, 20, **{**parameter, "distribution": "q_" + parameter["distribution"], "q": 0.01})
        assert all(v == pytest.approx(round(v / 0.01) * 0.01) for v in stepped)


def test_quantised_values_are_the_rounded_ones_and_whole_by_default(read):
    plain, _ = draw(read, 60, distribution="uniform", min=0, max=1000)
    fives, _ = draw(read, 30, distribution="q_uniform", min=0, max=1000, q=5)
    assert fives == list(dict.fromkeys(round(v / 5) * 5 for v in plain))[:30]  # none comes twice
    whole, _ = draw(read, 30, distribution="q_uniform", min=0, max=1000)
    assert whole == list(dict.fromkeys(round(v) for v in plain))[:30]
    assert all(isinstance(v, int) for v in whole)


def test_categories_and_their_odds(read):
    for name in ("categorical", "categorical_w_probabilities"):
        odds = {"distribution": name, "values": ["a", "b"], "probabilities": [0.9, 0.1]}
        sweep = read(parameters={"p": odds, "q": {"min": 0.0, "max": 1.0}})
        found = [t["p"] for t in itertools.islice(trials(sweep), 3000)]
        assert found.count("b") / 3000 == pytest.approx(0.1, abs=0.025)
    whole, _ = draw(read, 6, min=1, max=6)
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]


def test_bayes_needs_the_server(read):
    with pytest.raises(SweepError, match=r"bayes .* needs W&B's server .*method: random"):
        list(trials(read(method="bayes")))


def test_all_names_of_wandb():
    assert {f"q_{n}" for n in ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")} < set(
        DISTRIBUTIONS
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameter": {}}, "unknown key 'parameter'; did you mean 'parameters'"),
        ({"method": "randm"}, "did you mean 'random'"),
        ({"metric": {"name": "test/x", "goal": "maximize"}}, "never on the test part"),
        ({"metric": {"name": "val/x", "goal": "max"}}, "metric.goal must be maximize or minimize"),
        ({"run_cap": 0}, "run_cap must be a whole number"),
        ({"parameters": {}}, "nothing to sweep"),
        ({"command": "drop"}, "which Hydra cannot read"),
        ({"command": [*FILE["command"][:-1], "${args}"]}, r"must end with \$\{args_no_hyphens\}"),
        ({"command": ["${program}", "${args_no_hyphens}"]}, r"one \+project="),
        ({"command": ["${prog}", "+project=p", "${args_no_hyphens}"]}, "did you mean 'program'"),
        ({"command": ["x.py", "+project=p", "${args_no_hyphens}"]}, r"\$\{program\} once"),
        ({"parameters": {"+project": {"value": "a"}}}, r"without \+ or ~"),
        ({"parameters": {"a": {"values": [1, None]}}}, "the word None"),
        ({"parameters": {"a": {"value": {"b": 1}}}}, "a mapping as a value"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}}}, "is nested"),
        ({"parameters": {"a": {"vals": [1]}}}, "did you mean 'values'"),
        ({"parameters": {"a": {"values": []}}}, "at least one entry"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [0.5, 0.6]}}}, "add up to 1"),
        ({"parameters": {"a": {"min": 1}}}, "lacks max"),
        ({"parameters": {"a": {"min": 2.0, "max": 1.0}}}, "a min above its max"),
        ({"parameters": {"a": {"distribution": "log_uniform_value", "min": 1, "max": 2}}}, "log_uniform_values"),
        ({"parameters": {"a": {"distribution": "log_uniform_values", "min": -5, "max": 2}}}, "not its logarithm"),
        ({"parameters": {"a": {"distribution": "uniform", "min": "1e-4", "max": 1}}}, "YAML reads 1e-4 as a text"),
        ({"parameters": {"a": {"distribution": "normal", "mu": 0, "sigma": 0}}}, "sigma must be above 0"),
        ({"method": "grid", "parameters": {"a": {"min": 0.1, "max": 1.0}}}, "a grid needs a list of values"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(read, changes, message):
    with pytest.raises(SweepError, match=message) as error:
        read(**changes)
    assert "a_sweep.yaml: " in str(error.value)
    assert error.value.exit_code == 2


def test_a_file_that_is_no_yaml(read):
    with pytest.raises(SweepError, match="not valid YAML"):
        read(text="a: [")


def test_a_command_is_rendered_as_the_agent_does(monkeypatch):
    monkeypatch.setenv("WHERE", "/data")
    command = [
        "${env}",
        "${interpreter}",
        "${program}",
        "x=${envvar:WHERE}/${envvar:NOT_SET}",
        "a${env}",
        "${args_no_hyphens}",
    ]
    assert render(command, "t.py", {"a.b": 1e-05, "c": "d", "e": [1, 2]}) == [
        "/usr/bin/env", "python", "t.py", "x=/data/NOT_SET", "a${env}", "a.b=1e-05", "c=d", "e=[1, 2]"
    ]  # fmt: skip
