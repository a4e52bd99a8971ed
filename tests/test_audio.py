"""experiments/audio: the lapped transform, densities and codes of waveforms, what is heard."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from cnf.data import Images

FOLDER = Path(__file__).parent.parent / "experiments" / "audio"
MODULES = ("digits", "spectra", "baselines")
RATE = 4_000


@pytest.fixture(scope="module")
def audio():
    """Its modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in MODULES}
    from cnf.transforms.preprocessing import PREPROCESSING

    for name in ("local-cosine", "arcsinh"):
        del PREPROCESSING._entries[name]
    for name in MODULES:
        sys.modules.pop(name, None)


def tone(frequency, amplitude=127.0, n=2, length=2_048):
    t = torch.arange(length, dtype=torch.float64) / RATE
    return (128 + amplitude * (2 * math.pi * frequency * t).sin()).expand(n, -1)


def test_a_coefficient_is_a_windowed_cosine(audio):
    """The basis of the MDCT with a sine window, of block 2 of five, with its overlaps."""
    cosines, size, k, block = audio["spectra"].LocalCosine((2, 4, 5)), 8, 3, 2
    z = torch.zeros(8, 5, dtype=torch.float64)
    z[k, block] = 1.0
    x, _ = cosines.forward(z.reshape(2, 4, 5))
    n = np.arange(-size // 2, 3 * size // 2)
    window = np.sin(np.pi / (2 * size) * (n + size // 2 + 0.5))
    wave = window * math.sqrt(2 / size) * np.cos(np.pi / size * (n + 0.5) * (k + 0.5))
    expected = np.zeros(40)
    expected[block * size + n] = wave
    assert x.flatten().numpy() - 128 == pytest.approx(expected, abs=1e-12)


def test_lapped_transform_is_orthogonal_and_inverted(audio):
    cosines = audio["spectra"].LocalCosine((2, 4, 3))
    x = 255 * torch.rand(4, 2, 4, 3, dtype=torch.float64)
    z, ladj = cosines.inverse(x)
    jacobian: torch.Tensor = torch.autograd.functional.jacobian(
        lambda v: cosines.inverse(v)[0], x[0]
    ).reshape(24, 24)
    assert torch.allclose(jacobian @ jacobian.T, torch.eye(24, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(cosines.forward(z)[0], x, atol=1e-10)
    assert torch.equal(ladj, torch.zeros(4, dtype=torch.float64))


def test_ladj_of_arcsinh_is_autograd_slogdet(audio):
    curve = audio["spectra"].Arcsinh((1, 2, 2), scale=3.0)
    x = torch.tensor([[[-200.0, -0.1], [2.0, 40.0]]], dtype=torch.float64)
    z, ladj = curve.inverse(x)
    jacobian: torch.Tensor = torch.autograd.functional.jacobian(
        lambda v: curve.inverse(v)[0], x
    ).reshape(4, 4)
    assert ladj == pytest.approx(jacobian.det().abs().log().item(), abs=1e-12)
    again, back = curve.forward(z)
    assert torch.allclose(again, x) and back == pytest.approx(-ladj.item(), abs=1e-12)


def test_density_of_a_digit_is_that_of_a_multivariate_normal(audio):
    """Of an orthonormal transform of the samples; digit 1 is louder, and both are in one call."""
    labels, generator = torch.arange(4_000) % 2, torch.Generator().manual_seed(0)
    scale = 5.0 + 10 * labels[:, None, None, None]
    x = 128 + scale * torch.randn(4_000, 1, 2, 4, generator=generator)
    x = x.round().to(torch.uint8)
    cosines = audio["spectra"].LocalCosine((1, 2, 4))
    model = audio["baselines"].PerDigit(
        Images(x, labels=labels.numpy()), cosines, {"name": "ledoit-wolf"}, seed=0
    )
    found = model.log_prob(x, labels, torch.Generator().manual_seed(1))
    draws = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(1)}
    noisy = x.double() + torch.rand(x.shape, **draws)
    y = cosines.inverse(noisy)[0].flatten(1).numpy()
    for k, scale in enumerate((5.0, 15.0)):
        own, learned = y[labels == k], model.models[k]
        normal = stats.multivariate_normal(learned.location_, learned.covariance_)
        assert found[labels == k].numpy() == pytest.approx(normal.logpdf(own), abs=1e-9)
        assert learned.covariance_.diagonal() == pytest.approx(scale**2, rel=0.15)


def test_predictor_codes_noise_by_its_entropy_and_a_tone_by_less(audio):
    """Five equally probable levels take log2 5 = 2.32 bits, however they are predicted."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(126, 131, (60, 1_000)).astype(np.uint8))
    code = audio["baselines"].Predictor(noise[:50], order=4, classes=4)
    assert np.exp2(-code.bits).sum(1) == pytest.approx(1.0)  # Kraft's inequality
    assert code.code_length(noise[50:]).mean() / 1_000 == pytest.approx(math.log2(5), abs=0.02)
    tones = torch.cat([tone(f, n=1, length=500) for f in (150, 200)]).round().to(torch.uint8)
    code = audio["baselines"].Predictor(tones, order=4, classes=4)
    assert code.code_length(tones).mean() / 500 < 2.5


def test_waveform_begins_with_the_sound_and_ends_in_silence(audio):
    quiet = np.zeros(22_050)
    quiet[11_025:16_537] = 1_000 * np.sin(np.arange(5_512) * 2 * np.pi * 200 / 22_050)
    x = audio["digits"].of_whole_numbers(quiet, RATE, 2_048, np.zeros(2_048))
    assert x.dtype == np.uint8 and len(x) == 2_048
    assert x.max() == 128 + audio["digits"].PEAK and (x[1_010:] == 128).all()
    assert np.abs(x[:10].astype(int) - 128).max() > 2


def test_missing_espeak_is_named_with_its_remedy(audio, monkeypatch):
    monkeypatch.setattr(audio["digits"].shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="apt-get install espeak-ng"):
        audio["digits"].speak("one", "en+m1", 50, 160)


def test_measures_of_sound_have_known_values(audio):
    """A full-scale sine has power 1 in its bin and is 3 dB below a square wave."""
    spectra, sine = audio["spectra"], tone(500, 128.0)
    power = spectra.spectrogram(sine, 64)[0]
    assert power[:, 16].argmax() == 16 and power[16, 16] == pytest.approx(1.0, abs=1e-6)
    assert spectra.loudness(sine) == pytest.approx(-10 * math.log10(2), abs=1e-6)
    noise = 128 + 30 * torch.randn(20, 2_048, generator=torch.Generator().manual_seed(0))
    assert spectra.periodicity(tone(100), RATE) > 0.999 > 0.5 > spectra.periodicity(noise, RATE)
    labels = torch.arange(20) % 2
    softer = 128 + (noise - 128) / 2
    error = spectra.spectrum_error(softer, labels, noise, labels, RATE)
    assert error == pytest.approx(20 * math.log10(2), abs=0.2)  # the floor of the power
