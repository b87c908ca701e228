"""A reward model that learns from pairs, and what is scored with it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from bestiary.shared.core.build import build
from bestiary.shared.core.checkpoint import Structure, build_model, save_checkpoint
from bestiary.shared.core.config import compose
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.evaluate import evaluate
from bestiary.shared.core.protocols import EvalProtocol, Model, StepContext
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.losses.bradley_terry import BradleyTerry
from bestiary.shared.rl.protocols import Shaping
from bestiary.shared.rl.rewards.reward_model import PairAccuracy, RewardModel, RewardModelScorer

pytest.importorskip("transformers")


def structure():
    cfg, choices = compose(["+project=_examples", "model=reward_model", "recipe=reward_model"])
    parts = {name: build_free(cfg[name]) for name in ("model", "backbone", "encoder")}
    parts["backbone"]["config"].update(num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    return Structure("_examples", choices, [], DataSpec(task="chat").to_dict(), parts)


def build_free(node):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


@pytest.fixture(scope="module")
def fresh():
    return build_model(structure())


def pairs(count, seed):
    """Of two answers the longer is preferred; they differ by two letters and more."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        short = int(rng.integers(2, 10))
        long = short + int(rng.integers(2, 10))
        one, two = ("".join(rng.choice(list("abcdefgh"), n)) for n in (long, short))
        question = {"role": "user", "content": [{"type": "text", "value": "".join(rng.choice(list("xyz"), 4))}]}
        found.append({"id": f"p{seed}-{i}", "messages": [question], "answer": one, "meta": {"rejected": two}})
    return found


def test_it_is_a_model_whose_rows_are_pairs(fresh):
    assert isinstance(fresh, RewardModel)
    assert isinstance(fresh, Model)
    examples = pairs(3, 0)
    batch = fresh.processor()(examples, "train")
    assert batch["ids"] == [name for e in examples for name in (e["id"], f"{e['id']}/rejected")]
    ids, _ = fresh.backbone.tokenizer.chat([*examples[1]["messages"], assistant(examples[1]["meta"]["rejected"])])
    assert batch["input_ids"][3][: len(ids)].tolist() == ids
    assert int(batch["attention_mask"][3].sum()) == len(ids)
    assert fresh(batch).logits.shape == (6, 1)
    assert fresh.processor()([{k: v for k, v in examples[0].items() if k != "meta"}], "eval")["ids"] == ["p0-0"]


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "value": text}]}


def test_examples_that_are_no_pairs(fresh):
    process = fresh.processor()
    (example,) = pairs(1, 0)
    with pytest.raises(BadDataError, match=r"'p0-0' has no meta\[\"rejected\"\]"):
        process([example | {"meta": {}}], "train")
    with pytest.raises(BadDataError, match="'p0-0' has no answer"):
        process([{k: v for k, v in example.items() if k != "answer"}], "train")
    with pytest.raises(ConfigError, match="completes no prompts"):
        process([example], "prompt")
    with pytest.raises(ConfigError, match="writes no text"):
        fresh.generate(process([example], "train"))


def test_padding_changes_no_reward(fresh):
    """A row's reward is that of its last token, alone or beside longer rows, padded right or left."""
    examples = pairs(4, 1)
    answers = [example["answer"] for example in examples]
    together = fresh.score(examples, answers)
    alone = torch.cat([fresh.score([e], [a]) for e, a in zip(examples, answers, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.score(examples, answers, batch_size=3), alone, rtol=1e-4, atol=1e-5)
    batch = fresh.processor()([examples[0] | {"meta": {}}], "eval")
    left = dict(batch)
    for name, fill in (("input_ids", 256), ("attention_mask", 0), ("position_ids", 0)):
        left[name] = torch.cat([torch.full((1, 5), fill), batch[name]], 1)
    torch.testing.assert_close(fresh(left).logits[0], alone[:1], rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(fresh):
    """Or data-parallel training would wait for it."""
    fresh.zero_grad()
    loss = BradleyTerry().loss(fresh, fresh.processor()(pairs(2, 2), "train"), StepContext("s", 0))
    loss.loss_sum.backward()
    assert [name for name, p in fresh.named_parameters() if p.grad is None] == []
    fresh.zero_grad()


class Held:
    def held_out(self, split, part=None):
        return pairs(100, 99)


@pytest.fixture(scope="module")
def trained():
    """40 pairs, 15 times over."""
    torch.set_num_threads(1)
    model = build_model(structure())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    process, objective, examples = model.processor(), BradleyTerry(micro_batch=10), pairs(40, 3)
    order = np.random.default_rng(0)
    for step in range(60):
        chosen = order.choice(40, 10, replace=False)
        batch = process([examples[i] for i in chosen], "train")
        optimizer.zero_grad()
        for part in objective.micro_batches(batch):
            loss = objective.loss(model, part, StepContext("reward_model", step))
            (loss.loss_sum / 10).backward()
        optimizer.step()
    return model


def test_it_learns_what_is_preferred(trained):
    protocol = PairAccuracy()
    assert isinstance(protocol, EvalProtocol)
    found = evaluate(trained, Held(), protocol)
    assert found["pairs"] == 100
    assert found["pair_accuracy"] >= 0.9
    # A fresh model knows nothing of it: with the answers swapped, the shares add up to 1.
    swapped = [e | {"answer": e["meta"]["rejected"], "meta": {"rejected": e["answer"]}} for e in pairs(100, 99)]
    with torch.no_grad():
        assert protocol(trained, swapped)["pair_accuracy"] == pytest.approx(1 - found["pair_accuracy"])


def test_the_scorer_reads_what_follows_the_thoughts(trained, scored_rows):
    texts = [["ab", "abcdabcdabcd"], ["<think>abcdefghabcdefgh</think>ab", "ab"], ["abcdabcdab", "\ud800" * 9]]
    scorer = RewardModelScorer(model=trained, batch_size=2)
    assert isinstance(scorer, Shaping)
    rewards = torch.zeros(3, 2, dtype=torch.float64)
    rewards[2, 0] = math.nan
    found = scorer(rewards, scored_rows(texts, prompt="xyzx"))
    assert found.shape == (3, 2)
    assert found.dtype == torch.float64
    assert found[0, 1] > found[0, 0]
    assert found[1, 0] == pytest.approx(float(found[1, 1]), abs=1e-5) == pytest.approx(float(found[0, 0]), abs=1e-5)
    assert found[2, 0].isnan()
    assert found[2, 1].isfinite()


def test_a_checkpoint_is_a_scorer(trained, tmp_path, scored_rows):
    save_checkpoint(tmp_path / "rm", trained, structure())
    rows, rewards = scored_rows([["ab", "abcdef"]]), torch.zeros(1, 2, dtype=torch.float64)
    loaded = RewardModelScorer(str(tmp_path / "rm"), device="cpu")(rewards, rows)
    torch.testing.assert_close(loaded, RewardModelScorer(model=trained)(rewards, rows))
    with pytest.raises(ConfigError, match="needs checkpoint=RUN"):
        RewardModelScorer()
    with pytest.raises(BadDataError):
        RewardModelScorer(str(tmp_path / "none"))(rewards, rows)


def test_predict_scores_lines(trained, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "xyz", "answer": "ab"}\n\n{"prompt": "xyz", "answer": "abcdabcdabcd"}\n')
    (out,) = trained.predict([file], tmp_path / "out")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["ab", "abcdabcdabcd"]
    assert lines[1]["score"] > lines[0]["score"]
    file.write_text('{"prompt": "xyz"}\n')
    with pytest.raises(BadDataError, match="every line must be JSON like"):
        trained.predict([file], tmp_path / "out")


def test_the_recipe_is_whole():
    cfg, _ = compose(["+project=_examples", "model=reward_model", "recipe=reward_model", "recipe.micro_batch=4"])
    objective = build(cfg.recipe.stages.reward_model.objective)
    assert isinstance(objective, BradleyTerry)
    assert objective.micro_batch == 4
    assert isinstance(build(cfg.recipe.evaluations.pairs.protocol), PairAccuracy)
