"""Trajectories: tokens as drawn, tool turns masked, worlds shared, failures kept to their row."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.rl.protocols import Turn, Verdict
from bestiary.shared.rl.reward_pool import RewardPool
from bestiary.shared.rl.rollouts import NativeEngine, Rollouts, continuation, numbered

CPU = torch.device("cpu")
# A random policy seldom ends a turn of itself: here any letter does.
LETTERS = tuple(map(chr, range(33, 127)))


@pytest.fixture
def rollouts(llama):
    made = []

    def make(environment, model=None, **options):
        model = model or llama()
        engine, pool = NativeEngine(), RewardPool(2, 5.0)
        engine.begin(model, 0)
        processor = model.processor()
        made.append(pool)
        return Rollouts(engine, environment, pool, processor, processor.tokenizer, **options)

    yield make
    for pool in made:
        pool.close()


FOUR = Sampling(4, 1.0)


def play(rollouts, examples, n=2, sampling=FOUR):
    tickets = [(i, e["id"], e) for i, e in enumerate(examples)]
    groups, finish = rollouts.play(tickets, n, sampling, CPU)
    finish()
    return groups


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_how_many_prompts_are_drawn_together_changes_nothing(rollouts, chats, scored, at_once):
    examples = chats("one", "a second question", "3")
    whole = play(rollouts(scored(lambda text, example: len(text))), examples)
    parts = play(rollouts(scored(lambda text, example: len(text)), prompts_at_once=at_once), examples)
    assert [[r.ids for r in g.rows] for g in whole] == [[r.ids for r in g.rows] for g in parts]
    assert [g.scores for g in whole] == [g.scores for g in parts]
    for group in whole:
        for row in group.rows:
            assert len(row.ids) == len(row.own) == len(row.logprobs) <= 4
            assert group.scores[row.sample] == len(row.turns[-1])


def test_rewards_are_computed_while_the_next_completions_are_drawn(rollouts, chats, scored):
    """The first prompt's verifier waits for the second prompt's completion: it can only end if both run at once."""
    second = threading.Event()

    def score(text, example):
        if example["id"] == "q0":
            return 1.0 if second.wait(4) else 0.0
        return 1.0

    class Watched(scored):
        def reset(self, example, seed):
            if example["id"] == "q1":
                second.set()
            return super().reset(example, seed)

    groups = play(rollouts(Watched(score), prompts_at_once=1), chats("one", "two"))
    assert [g.scores for g in groups] == [[1.0, 1.0], [1.0, 1.0]]


class Echo:
    """Says back what the policy said, until it has spoken ``turns`` times."""

    name, version = "echo", "1"

    def __init__(self, turns, max_turns=4, fail=()):
        self.turns, self.max_turns, self.fail = turns, max_turns, fail
        self.seeds, self.closed = [], 0

    def prompt(self, example):
        return example

    def reset(self, example, seed):
        self.seeds.append((example["id"], seed))
        return EchoEpisode(self, example)

    def close(self):
        pass


class EchoEpisode:
    def __init__(self, world, example):
        self.world, self.example, self.heard = world, example, []

    def step(self, text):
        self.heard.append(text)
        if self.example["id"] in self.world.fail:
            raise OSError("the world is broken")
        if len(self.heard) >= self.world.turns:
            return Turn()
        return Turn([text_message("tool", "T" + "".join(c for c in text if c.isascii() and c.isalnum()))], done=False)

    def verify(self, text):
        return Verdict(float(len(self.heard)), note=text)

    def close(self):
        self.world.closed += 1


def test_tool_turns_are_masked_and_the_policy_s_tokens_kept_as_drawn(rollouts, llama, chats):
    world = Echo(3)
    model = llama()
    groups = play(rollouts(world, model), chats("x", "longer y"), sampling=Sampling(100, 1.0, seed=3, stop=LETTERS))
    tokenizer = ByteTokenizer()
    for group in groups:
        for row in group.rows:
            assert len(row.turns) == 3
            assert row.verdict.score == 3
            assert not row.truncated or len(row.turns[-1]) > 0
            # What is masked is exactly what the template puts between two turns.
            runs = _runs(row)
            assert [own for own, _ in runs] == [True, False] * 2 + [True]
            for (_, said), (_, put) in zip(runs[::2], runs[1::2], strict=False):
                text = "T" + "".join(c for c in tokenizer.decode(said) if c.isascii() and c.isalnum())
                tail = tokenizer.chat([text_message("tool", text)], True)[0]
                assert put == ([] if said[-1] == tokenizer.eos_id else [tokenizer.eos_id]) + tail
            assert all(score == 0 for score, own in zip(row.logprobs, row.own, strict=True) if not own)
    # The log-probabilities are those of the whole sequence, tool turns in it.
    for group in groups:
        for row in group.rows:
            logits = model.eval().backbone.lm(input_ids=torch.tensor([group.prompt_ids + row.ids])).logits[0]
            logp = torch.log_softmax(logits, -1)[len(group.prompt_ids) - 1 : -1]
            found = logp.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
            own = torch.tensor(row.own)
            torch.testing.assert_close(found[own], torch.tensor(row.logprobs)[own], rtol=1e-3, atol=1e-4)
    assert world.closed == 4
    # Both samples of a prompt met the same world, different prompts different ones.
    seeds = dict(world.seeds)
    assert len(world.seeds) == 4
    assert len(set(world.seeds)) == 2
    assert len(set(seeds.values())) == 2


def _runs(row):
    runs = []
    for token, own in zip(row.ids, row.own, strict=True):
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(token)
    return runs


def test_an_endless_episode_is_cut_and_counts_as_truncated(rollouts, chats):
    groups = play(rollouts(Echo(100, max_turns=2)), chats("x"), sampling=Sampling(100, 1.0, stop=LETTERS))
    assert [(len(r.turns), r.truncated, r.verdict.score) for r in groups[0].rows] == [(2, True, 2.0)] * 2


def test_a_broken_world_costs_its_rows_alone(rollouts, chats):
    groups = play(rollouts(Echo(2, fail=("q0",))), chats("x", "y"))
    assert {r.verdict.status for r in groups[0].rows} == {"error"}
    assert "the world is broken" in groups[0].rows[0].verdict.note
    assert {r.verdict.status for r in groups[1].rows} == {"ok"}


def test_prompts_that_do_not_fit_are_left_out_and_named(rollouts, chats, scored):
    made = rollouts(scored(lambda text, example: 1.0), max_prompt=12)
    groups = play(made, chats("short", "a very long question indeed", "tiny"))
    assert [g.example["id"] for g in groups] == ["q0", "q2"]
    assert made.too_long == ["q1"]
    assert made.batch_of(groups, CPU)["ids"] == ["q0", "q2"]
    assert play(made, chats("also far too long to fit")) == []
    assert "raise the stage's max_len" in made.complaint()


def test_the_answer_is_not_shown(rollouts, chats, scored):
    made = rollouts(scored(lambda text, example: float(example["answer"] == "secret")))
    (group,) = play(made, chats("x", answer="secret"))
    assert made.tokenizer.decode(group.prompt_ids) == "x"
    assert group.scores == [1.0, 1.0]


def test_a_prompt_that_comes_twice_draws_twice(rollouts, chats, scored):
    (example,) = chats("x")
    names = numbered(["q0", "q0", "z", "q0"])
    assert names == ["q0", "q0~2", "z", "q0~3"]
    made = rollouts(scored(lambda text, example: 1.0))
    groups, finish = made.play([(i, n, example) for i, n in enumerate(names)], 2, Sampling(8, 1.0), CPU)
    finish()
    assert len({tuple(r.ids) for g in groups for r in g.rows}) > 4


@given(st.lists(st.sampled_from(["q", "q~2", "z", "q~3"])), st.lists(st.sampled_from(["q", "q~2", "z"])))
def test_names_are_unique_and_stay_when_more_prompts_are_drawn(first, more):
    names = numbered(first + more)
    assert len(set(names)) == len(names)
    assert names[: len(first)] == numbered(first)


TOOL = [text_message("tool", "result")]


def test_continuation_of_bytes_by_hand():
    tokenizer = ByteTokenizer()
    tool, assistant = (tokenizer.add_tokens([n])[0] for n in ("<tool>", "<assistant>"))
    expected = [tool, *b"result", tokenizer.eos_id, assistant]
    assert continuation(tokenizer, TOOL, tokenizer.eos_id) == expected
    assert continuation(tokenizer, TOOL, ord("x")) == [tokenizer.eos_id, *expected]


def test_a_template_that_hides_the_assistant_s_words_is_refused():
    class Blind(ByteTokenizer):
        def chat(self, messages, add_generation_prompt=False, thinking=None):
            ids, own = super().chat(messages, add_generation_prompt)
            return ids, [False] * len(own)

    with pytest.raises(ConfigError, match="one turn alone"):
        continuation(Blind(), TOOL, 0)
