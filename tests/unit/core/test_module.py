"""BestiaryModule under a real Trainer: steps are whole steps, whatever they are cut into."""

import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.loader import RankSteps
from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.core.protocols import Loss, Output
from bestiary.shared.core.schedules import Constant, Cosine, Poly, WarmupStableDecay
from bestiary.shared.core.stages import quiet_lightning
from bestiary.shared.losses.causal_lm import CausalLM

VOCAB, STEPS, ROWS, LENGTH = 11, 5, 6, 7


class Toy(nn.Module):
    """A two-layer next-token model in float64."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8, dtype=torch.float64)
        self.norm = nn.LayerNorm(8, dtype=torch.float64)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, VOCAB, dtype=torch.float64)

    def forward(self, batch):
        return Output(self.head(self.drop(self.norm(self.embedding(batch["input_ids"])))))

    def wrap_policy(self):
        return set()


def batch(step, rows=range(ROWS)):
    """Rows that carry different numbers of labels: 1, 2, 3, …"""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=draw)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, row + 2 :] = -100
    rows = list(rows)
    return {
        "ids": [f"s{step}r{r}" for r in rows],
        "input_ids": ids[rows],
        "attention_mask": torch.ones_like(ids[rows]),
        "position_ids": torch.arange(LENGTH).expand(len(rows), -1),
        "labels": labels[rows],
        "seq_idx": None,
        "media": {},
    }


class Batches(torch.utils.data.Dataset):
    def __getitem__(self, k):
        return k

    def __len__(self):
        return STEPS * ROWS


def collate(numbers):
    return batch(numbers[0] // ROWS, [n % ROWS for n in numbers])


def fit(model=None, objective=None, optim=None, callbacks=(), steps=STEPS, schedule=None, **options):
    model = model or Toy()
    module = BestiaryModule(
        model,
        objective or CausalLM(),
        optim or functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        schedule or Constant(),
        steps=steps,
        **options,
    )
    module.make_loader = lambda start, rank, world: torch.utils.data.DataLoader(
        Batches(), batch_sampler=RankSteps(steps, ROWS, rank, world, start), collate_fn=collate
    )
    quiet_lightning()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    ).fit(module)
    return module


class EachStep(pl.Callback):
    """Remembers something after each step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(pl_module, trainer.optimizers[0]))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(steps=STEPS, clip=None, lr=lambda step: 0.1):
    """The same training in ten lines of plain PyTorch."""
    model, norms, losses = Toy(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        data = batch(step)
        logits = model(data).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters())).item())
        losses.append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.step()
    return model, norms, losses


def close(a, b):
    return ((a - b).norm() / b.norm()).item() < 1e-12


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 4, 99])
def test_accumulated_steps_equal_the_big_batch(micro_batch):
    log = EachStep(lambda m, o: (m.last_metrics["grad_norm"], m.last_metrics["loss"]))
    trained = fit(objective=CausalLM(micro_batch), callbacks=[log])
    reference, norms, losses = by_hand()
    assert close(weights(trained.model), weights(reference))
    assert log.seen == [
        (pytest.approx(n, rel=1e-12), pytest.approx(v, rel=1e-12)) for n, v in zip(norms, losses, strict=True)
    ]
    assert trained.position == STEPS


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_clip(micro_batch):
    _, norms, _ = by_hand()
    limit = sorted(norms)[2] / 2
    reference, norms, _ = by_hand(clip=limit)
    assert max(norms) > limit
    log = EachStep(lambda m, o: m.last_metrics["grad_norm"])
    trained = fit(objective=CausalLM(micro_batch), clip=limit, callbacks=[log])
    # clip_grad_norm_ adds 1e-6 to the norm in both.
    assert close(weights(trained.model), weights(reference))
    assert not close(weights(trained.model), weights(by_hand()[0]))
    assert log.seen == [pytest.approx(n, rel=1e-12) for n in norms]  # logged before clipping


class Poisoned(CausalLM):
    """Not finite at some steps, in one of the micro-batches."""

    def __init__(self, steps, value=math.nan, in_gradient=False):
        super().__init__(micro_batch=2)
        self.steps, self.value, self.in_gradient = steps, value, in_gradient

    def loss(self, model, batch, ctx):
        loss = super().loss(model, batch, ctx)
        if ctx.step in self.steps and batch["ids"][0].endswith("r2"):
            if self.in_gradient:
                loss.loss_sum.register_hook(lambda g: g * self.value)
            else:
                return Loss(loss.loss_sum * self.value, loss.num_terms)
        return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped(capsys, value, in_gradient):
    log = EachStep(
        lambda m, o: (
            weights(m.model),
            m.bad_steps,
            m.position,
            {k: v.clone() for s in o.state.values() for k, v in s.items()},
        )
    )
    trained = fit(objective=Poisoned({1, 3}, value, in_gradient), callbacks=[log])
    after, bad, position, momentum = zip(*log.seen, strict=True)
    assert bad == (0, 1, 1, 2, 2)
    assert position == (1, 2, 3, 4, 5)
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[2], after[3])
    assert not torch.equal(after[1], after[2])
    assert torch.equal(momentum[0]["momentum_buffer"], momentum[1]["momentum_buffer"])
    assert torch.isfinite(weights(trained.model)).all()
    said = capsys.readouterr().out
    assert "step 1: the loss or its gradient is not finite; step skipped (1 of at most 10); examples s1r0, s1r1" in said
    assert "s3r5" in said


def test_too_many_such_steps_end_the_run(capsys):
    with pytest.raises(UserError, match=r"(?s)step 2.*s2r0.*Too many such steps: lower recipe\.lr"):
        fit(objective=Poisoned({0, 2, 4}), max_bad_steps=2)


def test_groups_without_weight_decay():
    optim = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    trained = fit(optim=optim, no_decay=("*norm*", "*bias"))
    groups = trained.trainer.optimizers[0].param_groups
    names = {id(p): n for n, p in trained.model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays == {
        "embedding.weight": 0.5,
        "head.weight": 0.5,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.bias": 0.0,
    }


def test_frozen_parameters_are_left_alone():
    model = Toy()
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.clone()
    trained = fit(model, optim=functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    assert torch.equal(model.embedding.weight, before)
    held = [p for g in trained.trainer.optimizers[0].param_groups for p in g["params"]]
    assert all(p is not model.embedding.weight for p in held)


def test_the_schedule_is_applied_at_every_step():
    schedule = Cosine(warmup=2, final=0.1)
    log = EachStep(lambda m, o: (o.param_groups[0]["lr"], m.last_metrics["lr"]))
    trained = fit(schedule=schedule, callbacks=[log])
    expected = [0.1 * schedule(step, STEPS) for step in range(STEPS)]
    assert log.seen == [(pytest.approx(e, rel=1e-12),) * 2 for e in expected]
    assert close(weights(trained.model), weights(by_hand(lr=lambda step: expected[step])[0]))


def test_schedules_by_hand():
    assert [Constant(4)(s, 9) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [Constant()(s, 9) for s in (0, 8)] == [1, 1]
    cosine = Cosine(warmup=2, final=0.2)
    assert [cosine(s, 10) for s in (0, 1, 2)] == [0.5, 1, 1]
    assert cosine(6, 10) == pytest.approx(0.6)  # half way: the mean of 1 and 0.2
    assert cosine(10, 10) == pytest.approx(0.2)
    assert Poly(0.9)(50, 100) == pytest.approx(0.5**0.9)
    assert [Poly(1.0, every=10)(s, 100) for s in (0, 9, 10, 19, 99)] == pytest.approx([1, 1, 0.9, 0.9, 0.1])
    wsd = WarmupStableDecay(warmup=2, decay=0.5, final=0.5)
    assert [wsd(s, 8) for s in (0, 1, 3, 4, 6, 8)] == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5])
    # A quarter of the way through the decay the root is a half.
    root = WarmupStableDecay(warmup=2, decay=0.5, final=0.5, shape="minus_sqrt")
    assert [root(s, 8) for s in (0, 1, 3, 4, 5, 8)] == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5])
    with pytest.raises(ConfigError, match="linear or minus_sqrt, not 'cosine'"):
        WarmupStableDecay(shape="cosine")


@pytest.mark.parametrize(
    "schedule",
    [Constant(3), Cosine(3, 0.1), Poly(0.9), WarmupStableDecay(3), WarmupStableDecay(3, 0.4, 0.01, "minus_sqrt")],
)
def test_schedules_are_pure(schedule):
    forth = [schedule(s, 40) for s in range(40)]
    assert [schedule(s, 40) for s in reversed(range(40))][::-1] == forth
    assert all(0 <= f <= 1 for f in forth)


def test_noise_depends_on_the_step_alone():
    """Dropout's masks are the same whatever was drawn before, and differ from step to step."""

    class Draws(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.rand(batch_idx * 7 + self.extra)

    runs = []
    for extra in (0, 5):
        callback = Draws()
        callback.extra = extra
        runs.append(weights(fit(Toy(dropout=0.5), callbacks=[callback]).model))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], weights(fit(Toy(dropout=0.5), seed=1).model))


def test_metrics_are_means_over_the_whole_step():
    class Counted(CausalLM):
        def loss(self, model, batch, ctx):
            loss = super().loss(model, batch, ctx)
            right = (batch["labels"][:, 1:] != -100).sum()
            return Loss(loss.loss_sum, loss.num_terms, {"half": right * 0.5})

    log = EachStep(lambda m, o: m.last_metrics["half"])
    fit(objective=Counted(2), callbacks=[log])
    assert log.seen == [0.5] * STEPS


def test_a_step_without_terms_changes_nothing():
    class Nothing(CausalLM):
        def loss(self, model, batch, ctx):
            return super().loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, ctx)

    log = EachStep(lambda m, o: weights(m.model))
    fit(objective=Nothing(), callbacks=[log])
    assert all(torch.equal(w, weights(Toy())) for w in log.seen)
