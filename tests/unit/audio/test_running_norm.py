"""Standardised channels, against means and deviations worked out over all that was seen."""

import torch

from bestiary.shared.audio.running_norm import RunningNorm


def test_channels_get_the_mean_and_deviation_of_all_batches_seen():
    torch.manual_seed(0)
    norm = RunningNorm(3)
    batches = [torch.randn(50, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([7.0, -20.0, 0.0]) for _ in range(4)]
    for batch in batches:
        out = norm(batch)
    mean = torch.stack([b.mean(0) for b in batches]).mean(0)
    variance = torch.stack([b.var(0) for b in batches]).mean(0)
    wanted = (batches[-1] - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(out, wanted)
    norm.eval()
    torch.testing.assert_close(norm(batches[-1]), wanted)
    torch.testing.assert_close(norm(batches[-1][:1]), wanted[:1])


def test_a_single_token_or_none_is_no_statistic():
    norm = RunningNorm(2)
    for count in (0, 1):
        tokens = torch.ones(count, 2)
        torch.testing.assert_close(norm(tokens), tokens, atol=1e-4, rtol=0)
    assert norm.seen.num_batches_tracked == 0


def test_the_encoder_before_it_gets_gradients_and_its_statistics_none():
    norm = RunningNorm(2)
    tokens = torch.randn(9, 2, requires_grad=True)
    norm(tokens).sum().backward()
    torch.testing.assert_close(tokens.grad, (norm.seen.running_var + norm.seen.eps).rsqrt().expand(9, 2))
    assert not list(norm.parameters())
