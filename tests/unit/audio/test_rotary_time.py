"""Rotary time against the formula, written out with complex numbers, and against transformers' class."""

import cmath
import math

import pytest
import torch

from bestiary.shared.audio.rotary_time import RotaryTime
from bestiary.shared.core.errors import ConfigError


def turned(x: list[float], window: int, place: int, d: int, tokens: int, step: float) -> list[float]:
    """One token by the formula: pairs of adjacent channels are complex numbers, multiplied by e^(i angle)."""
    size = int(0.2 * d)
    time = window * tokens * step + place * step
    out = list(x)
    for axis, position in ((0, window / 1200), (1, 2 * math.pi * place / 1200)):
        for k in range(size // 2):
            frequency = 1200 ** (-2 * k / size)
            angle = -2 * math.pi * time * position * frequency
            at = axis * size + 2 * k
            z = complex(x[at], x[at + 1]) * cmath.exp(1j * angle)
            out[at], out[at + 1] = z.real, z.imag
    return out


@pytest.mark.parametrize(("window", "place"), [(0, 0), (0, 1), (0, 74), (1, 0), (3, 20)])
def test_a_token_is_turned_as_the_formula_says(window, place):
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTime(40, step_seconds=0.08, tokens_per_window=75)
    out = rotary(x, torch.tensor([window]), torch.tensor([place]))
    wanted = torch.tensor(turned(x[0].tolist(), window, place, 40, 75, 0.08))
    torch.testing.assert_close(out[0], wanted, atol=2e-5, rtol=0)


def test_the_rest_of_the_channels_and_the_first_token_pass():
    x = torch.randn(6, 1280)
    out = RotaryTime(1280)(x, torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 749, 0, 0, 5]))
    assert torch.equal(out[:, 512:], x[:, 512:])
    assert torch.equal(out[0], x[0])
    # In the first window the axis of windows does nothing.
    assert torch.equal(out[:3, :256], x[:3, :256])
    assert not torch.equal(out[1, 256:512], x[1, 256:512])
    torch.testing.assert_close(out.norm(dim=1), x.norm(dim=1))


def test_it_is_transformers_class_at_the_papers_size():
    modeling = pytest.importorskip("transformers.models.musicflamingo.modeling_musicflamingo")
    config = pytest.importorskip("transformers").MusicFlamingoConfig()
    peer = modeling.MusicFlamingoRotaryEmbedding(config)
    windows = 40
    times = (torch.arange(windows)[:, None] * 750 + torch.arange(750)) * 0.04
    with torch.no_grad():
        cos, sin = peer(times, seq_len=750)
    x = torch.randn(windows, 750, 1280, generator=torch.Generator().manual_seed(1))
    wanted = modeling.apply_rotary_time_emb(x, cos, sin)
    window = torch.arange(windows).repeat_interleave(750)
    out = RotaryTime(1280)(x.flatten(0, 1), window, torch.arange(750).repeat(windows))
    # In the last minutes angles are so large that float32 leaves them a few thousandths; early ones must agree closely.
    assert out[:750].sub(wanted[0]).abs().max() < 2e-5
    assert out.sub(wanted.flatten(0, 1)).abs().max() < 0.05


def test_the_dtype_stays():
    x = torch.randn(3, 40).bfloat16()
    assert RotaryTime(40)(x, torch.zeros(3).long(), torch.arange(3)).dtype is torch.bfloat16


@pytest.mark.parametrize("options", [{"width": 4, "share": 0.9}, {"width": 40, "tokens_per_window": 1300}])
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(ConfigError, match="rotary time"):
        RotaryTime(**options)
