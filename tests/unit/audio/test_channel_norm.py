"""Standardised channels, against means and deviations worked out over all tokens."""

import pytest
import torch

from bestiary.shared.audio.channel_norm import ChannelNorm


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1.0, 5.0, 0.1]), torch.tensor([7.0, -20.0, 0.0])
    return [torch.randn(n, 3, generator=generator) * scale + shift + n for n in (50, 1, 20)]


def test_channels_get_mean_0_and_deviation_1_over_all_tokens(clips):
    norm = ChannelNorm(3)
    norm.fit(iter(clips))
    out = norm(torch.cat(clips))
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm(clips[1]), out[50:51])


def test_training_moves_nothing_and_a_second_fit_neither(clips):
    norm = ChannelNorm(3)
    norm.fit(clips)
    before = norm.eval()(clips[0])
    torch.testing.assert_close(norm.train()(clips[0]), before, rtol=0, atol=0)
    norm.fit([clips[2]])
    torch.testing.assert_close(norm(clips[0]), before, rtol=0, atol=0)
    other = ChannelNorm(3)
    other.load_state_dict(norm.state_dict())
    other.fit([clips[2]])
    torch.testing.assert_close(other(clips[0]), before, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [[], [torch.ones(1, 2)]])
def test_nothing_to_go_by_changes_nothing(tokens):
    norm = ChannelNorm(2)
    norm.fit(tokens)
    torch.testing.assert_close(norm(torch.ones(3, 2)), torch.ones(3, 2), atol=1e-4, rtol=0)
    assert not norm.fitted


def test_the_encoder_before_it_gets_gradients(clips):
    norm = ChannelNorm(3)
    norm.fit(clips)
    tokens = clips[0].requires_grad_()
    norm(tokens).sum().backward()
    torch.testing.assert_close(tokens.grad, (norm.variance + norm.eps).rsqrt().expand(50, 3))
    assert not list(norm.parameters())
