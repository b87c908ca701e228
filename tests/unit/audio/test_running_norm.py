"""Standardised channels, against means and deviations worked out over all that was seen."""

import pytest
import torch

from bestiary.shared.audio.running_norm import RunningNorm


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1.0, 5.0, 0.1]), torch.tensor([7.0, -20.0, 0.0])
    return [torch.randn(50, 3, generator=generator) * scale + shift for _ in range(4)]


def standard(tokens, seen):
    mean = torch.stack([b.mean(0) for b in seen]).mean(0)
    variance = torch.stack([b.var(0) for b in seen]).mean(0)
    return (tokens - mean) / (variance + 1e-5).sqrt()


def test_channels_get_the_mean_and_deviation_of_all_batches_of_steps_before(batches):
    norm = RunningNorm(3)
    for number, batch in enumerate(batches):
        torch.testing.assert_close(norm(batch), standard(batch, batches[:number] or [batch]))
        norm.after_step(True)
    norm.eval()
    torch.testing.assert_close(norm(batches[0]), standard(batches[0], batches))
    torch.testing.assert_close(norm(batches[0][:1]), standard(batches[0][:1], batches))
    assert norm.batches == 4


def test_within_a_step_nothing_moves(batches):
    """What is drawn (eval) and what is trained on (train) is the same until the optimiser has stepped."""
    norm = RunningNorm(3)
    norm(batches[0])
    norm.after_step(True)
    drawn = norm.eval()(batches[1])
    norm.train()
    for batch in batches[2:]:
        norm(batch)
    torch.testing.assert_close(norm(batches[1]), drawn, rtol=0, atol=0)
    norm.after_step(True)
    torch.testing.assert_close(norm.eval()(batches[1]), standard(batches[1], batches))


def test_a_skipped_step_leaves_nothing(batches):
    norm = RunningNorm(3)
    norm(batches[0])
    norm.after_step(True)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(batches[1] * float("nan"))
    norm.after_step(False)
    norm.after_step(True)  # nor does one that showed nothing
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert set(before) == {"mean", "variance", "batches"}


def test_batches_of_all_processes_count(batches, monkeypatch):
    norm, other = RunningNorm(3), RunningNorm(3)
    norm(batches[0])
    for batch in batches[1:]:
        other(batch)
    theirs = {0: other.fresh_batches, 2: other.fresh}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine: mine.add_(theirs[mine.ndim]))
    norm.after_step(True)
    torch.testing.assert_close(norm.eval()(batches[1]), standard(batches[1], batches))


def test_a_single_token_or_none_is_no_statistic():
    norm = RunningNorm(2)
    for count in (0, 1):
        tokens = torch.ones(count, 2)
        torch.testing.assert_close(norm(tokens), tokens, atol=1e-4, rtol=0)
    norm.after_step(True)
    assert norm.batches == 0


def test_the_encoder_before_it_gets_gradients_and_its_statistics_none():
    norm = RunningNorm(2)
    tokens = torch.randn(9, 2, requires_grad=True)
    norm(tokens)
    norm.after_step(True)
    norm(tokens).sum().backward()
    torch.testing.assert_close(tokens.grad, (norm.variance + norm.eps).rsqrt().expand(9, 2))
    assert not list(norm.parameters())
