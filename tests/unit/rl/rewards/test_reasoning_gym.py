"""The tasks' own scoring in worker processes: every task knows its gold answer, and no trick passes for one."""

from __future__ import annotations

import json

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.protocols import Verifier
from bestiary.shared.rl.rewards.reasoning_gym import NO_GOLD, UNUSABLE, ReasoningGym, last_line
from bestiary.shared.rl.rewards.registry import make_verifier, self_test
from bestiary.shared.rl.tasks.reasoning_gym import ReasoningGymTask

gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

TASKS = [name for name in gym.factory.DATASETS if name not in UNUSABLE]
SLOW = {"knight_swap", "futoshiki", "acre", "arc_agi", "rearc"}
STREAM = Stream(0, "grpo", 4)


@pytest.fixture(scope="module")
def verifier():
    made = make_verifier("reasoning_gym", workers=1, deadline_s=5.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def partial():
    made = ReasoningGym(partial=True, workers=1)
    yield made
    made.close()


_made: dict[tuple[str, int], list] = {}


def examples(task, count=2):
    if (task, count) not in _made:
        data = ReasoningGymTask(task, size=40, held_out=1, allow_no_gold=True)
        _made[task, count] = [data.train_example(k, STREAM) for k in range(count)]
    return _made[task, count]


def score(verifier, answer, example):
    verdict = verifier.verify(example.get("answer", ""), answer, example)
    assert verdict.status == "ok", verdict
    return verdict.score


# ------------------------------------------------------------------ every task


@pytest.mark.parametrize("task", TASKS)
def test_gold_is_right_and_nonsense_is_not(verifier, task):
    count = 1 if task in SLOW else 2
    for example in examples(task, count):
        gold = verifier.gold_answer(example)
        assert (gold is None) == (task in NO_GOLD)
        if gold is not None:
            assert score(verifier, f"<think>or <answer>0</answer>?</think>\n{gold}", example) == 1.0
        for wrong in ("zzz wrong", "", "<answer></answer>", "<answer>zzz wrong</answer>"):
            assert score(verifier, wrong, example) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_more_items_of_every_task(verifier, partial, task):
    for example in examples(task, 15):
        gold = verifier.gold_answer(example)
        if gold is not None:
            assert score(verifier, gold, example) == 1.0
            assert score(partial, gold, example) == 1.0
        for wrong in ("zzz wrong", "0 0 0", "[[[", "{}", "-1e400", "9" * 3000, "((((" * 500, "\0", "\ud800"):
            assert 0.0 <= score(partial, wrong, example) <= 1.0


def test_the_start_up_test_passes(verifier):
    shown = [examples(task)[0] for task in ("chain_sum", "mini_sudoku", "rush_hour")]
    report = self_test({"reasoning_gym": verifier}, shown)
    assert report.tested["reasoning_gym"] == 2
    assert report.without_gold["reasoning_gym"] == 1
    assert isinstance(verifier, Verifier)
    assert "reasoning-gym 0." in verifier.version


# ------------------------------------------------------------------ attacks


def payloads(path):
    call = f"__import__('pathlib').Path('{path}').touch()"
    return [
        call,
        f"[{call}]",
        f"[[{call}]]",
        f"[c for c in str({call})]",
        f"x + {call}",
        f"(lambda: {call})()",
        f'{{"a": {call}}}',
        f"().__class__.__base__.__subclasses__() or {call}",
    ]


def test_no_answer_runs_code(verifier, tmp_path):
    """Nine tasks hand an answer to eval or to sympy's parser; the file would be there if one still did."""
    target = tmp_path / "ran"
    for task in set(TASKS) - SLOW:
        for answer in payloads(target):
            assert score(verifier, f"<answer>{answer}</answer>", examples(task)[0]) == 0.0
            assert not target.exists(), (task, answer)


def test_the_attack_works_where_nothing_guards(tmp_path):
    """Otherwise the test above says nothing."""
    found = set()
    for task in ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "simple_integration"):
        dataset = gym.create_dataset(task, seed=1, size=1)
        for number, answer in enumerate(payloads(tmp_path / task)):
            dataset.score_answer(answer, dataset[0])
            if (tmp_path / task).exists():
                found.add(task)
                break
            assert number >= 0
    assert len(found) == 6


def test_literals_and_expressions_are_still_read(verifier, partial):
    """What the guards let through: partial credit for a list, and another form of the same expression."""
    queens = examples("n_queens")[0]
    board = [line.split() for line in queens["answer"].splitlines()]
    assert score(partial, f"<answer>{board!r}</answer>", queens) == 0.5
    assert score(verifier, f"<answer>{board!r}</answer>", queens) == 0.0
    for example in examples("simple_integration", 4):
        other = f"<answer>{example['answer'].replace('+ C', '')} + 5 - C*2**0</answer>"
        assert score(verifier, other, example) == 1.0
    countdown = examples("countdown")[0]
    assert score(verifier, f"<answer>({countdown['answer']})</answer>", countdown) == 1.0


def test_an_integral_that_is_left_to_do_is_no_answer(verifier):
    for example in examples("simple_integration"):
        metadata = example["meta"]["entry"]["metadata"]
        text = f"<answer>Integral({metadata['integrand']}, {metadata['variable']})</answer>"
        assert score(verifier, text, example) == 0.0


def test_numbers_that_countdown_does_not_count(verifier):
    """All given numbers times 0, and the target by digits that are not counted as used, or by a name."""
    for example in examples("countdown"):
        metadata = example["meta"]["entry"]["metadata"]
        nothing = "0*" if 0 in metadata["numbers"] else ""
        spent = f"({'-'.join(map(str, metadata['numbers']))})*(exp(1e0)-exp(1e0))"
        for trick in (f"{spent} + {metadata['target']}e0", f"{nothing}{spent} + {metadata['target']}*log(E)"):
            assert score(verifier, f"<answer>{trick}</answer>", example) == 0.0


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-Infinity", "nan + nanj", "[NaN]"])
def test_nan_is_never_right(verifier, text):
    for example in examples("complex_arithmetic"):
        assert score(verifier, f"<answer>{text}</answer>", example) == 0.0


def test_nan_sorts_nothing(verifier):
    for example in examples("number_sorting"):
        count = len(json.loads(example["answer"].replace("'", '"')))
        assert score(verifier, f"<answer>[{', '.join(['NaN'] * count)}]</answer>", example) == 0.0
        assert score(verifier, f"<answer>{example['answer']}</answer>", example) == 1.0


def test_why_tasks_are_unusable():
    """The holes are there; where a new version of reasoning-gym has mended one, the task can be let in."""
    constant = {"game_of_life_halting": "zzz wrong", "coin_flip": "0", "puzzle24": "8*3*1*1"}
    for task, answer in constant.items():
        dataset = gym.create_dataset(task, seed=5, size=6)
        assert sum(dataset.score_answer(answer, dataset[i]) >= 1 for i in range(6)) >= 3, task


# ------------------------------------------------------------------ hostile answers


def test_it_outlives_hostile_texts(verifier, hostile_texts):
    for text in hostile_texts.values():
        for answer in (text, f"<answer>{text}</answer>"):
            for task in ("chain_sum", "simple_integration"):
                verdict = verifier.verify("", answer, examples(task)[0])
                assert verdict.score == 0.0
                assert verdict.status in ("ok", "timeout")


def test_what_never_ends_is_a_timeout(tmp_path):
    quick = ReasoningGym(workers=1, deadline_s=1.0)
    try:
        example = examples("polynomial_multiplication")[0]
        verdict = quick.verify("", "<answer>9**9**9**9**9</answer>", example)
        assert (verdict.score, verdict.status) == (0.0, "timeout")
        assert quick.verify("", quick.gold_answer(example), example).score == 1.0  # and it goes on
    finally:
        quick.close()


# ------------------------------------------------------------------ what is read


def test_where_the_answer_stands(verifier):
    example = examples("chain_sum")[0]
    gold = example["answer"]
    right = [f"so\n{gold}", f"so\n{gold}\n\n ", f"<answer>1</answer> no: <answer> {gold}\n</answer> yes", gold]
    wrong = [f"{gold}\nthat is it", f"<answer>{gold}</answer><answer>zzz</answer>", f"<think>{gold}</think>"]
    assert [score(verifier, text, example) for text in right] == [1.0] * 4
    assert [score(verifier, text, example) for text in wrong] == [0.0] * 3
    assert last_line("a\nb  \n\n") == "b"


def test_partial_credit_is_the_tasks_own(verifier, partial):
    example = examples("power_function")[0]
    assert score(partial, "<answer>zzz wrong</answer>", example) == 0.01  # for having said something
    assert score(verifier, "<answer>zzz wrong</answer>", example) == 0.0
    assert score(partial, f"<answer>{example['answer']}</answer>", example) == 1.0


def test_examples_that_cannot_be_scored(verifier):
    with pytest.raises(BadDataError, match=r'needs meta\["task"\]'):
        verifier.check({"id": "a", "meta": {"task": "chain_sum"}})
    with pytest.raises(BadDataError, match="puzzle24 cannot be used: its scoring"):
        verifier.check({"id": "a", "meta": {"task": "puzzle24", "entry": {}}})
    assert verifier.verify("", "1", {"id": "a"}).status == "error"
