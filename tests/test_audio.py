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
from cnf.transforms import Compose

FOLDER = Path(__file__).parent.parent / "experiments" / "audio"
MODULES = ("digits", "spectra", "baselines", "run")
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


@pytest.fixture(scope="module")
def loud(audio):
    """Normal noise of deviations 5 and 15 for the digits 0 and 1, and a Gaussian for each."""
    labels, generator = torch.arange(4_000) % 2, torch.Generator().manual_seed(0)
    scale = 5.0 + 10 * labels[:, None, None, None]
    x = 128 + scale * torch.randn(4_000, 1, 2, 4, generator=generator)
    images = Images(x.round().to(torch.uint8), labels=labels.numpy())
    spectra = audio["spectra"]
    parts = [spectra.Arcsinh((1, 2, 4), scale=3.0), spectra.LocalCosine((1, 2, 4))]
    return images, audio["baselines"].PerDigit(
        images, Compose(parts), {"name": "ledoit-wolf"}, seed=0
    )


def test_density_of_a_digit_is_that_of_a_multivariate_normal(audio, loud):
    """Of y = arcsinh(c/3), of coefficients c with |dy/dc| = (9 + c²)^-½; both in one call."""
    images, model = loud
    found = model.log_prob(images.x, images.labels, torch.Generator().manual_seed(1))
    draws = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(1)}
    noisy = images.x.double() + torch.rand(images.x.shape, **draws)
    c = audio["spectra"].LocalCosine((1, 2, 4)).inverse(noisy)[0].flatten(1).numpy()
    y, ladj = np.arcsinh(c / 3), -0.5 * np.log(9 + c**2).sum(1)
    for k in range(2):
        own, learned = images.labels.numpy() == k, model.models[k]
        normal = stats.multivariate_normal(learned.location_, learned.covariance_)
        assert found[own].numpy() == pytest.approx(normal.logpdf(y[own]) + ladj[own], abs=1e-9)
        assert learned.covariance_.diagonal() == pytest.approx(y[own].var(0), rel=0.05)


def test_samples_of_a_digit_have_its_quantiles_and_stand_at_its_place(loud):
    """Half of the normal numbers are within 0.674 deviations; quantiles survive the arcsinh."""
    _, model = loud
    labels = torch.tensor([1, 0, 0]).repeat(1_000)
    x = model.sample(labels, seed=3)
    assert x.shape == (3_000, 1, 2, 4) and torch.equal(x, x.round())
    for k, scale in enumerate((5.0, 15.0)):
        middle = x[labels == k].flatten().quantile(torch.tensor([0.25, 0.5, 0.75]).double())
        wanted = [128 - 0.674 * scale, 128, 128 + 0.674 * scale]
        assert middle.tolist() == pytest.approx(wanted, abs=1.2)  # levels, and y is not normal
    assert not torch.equal(x, model.sample(labels, seed=13))


def test_mixtures_of_another_seed_begin_elsewhere(audio, loud):
    images, model = loud
    told = {"name": "gaussian-mixture", "n_components": 2, "covariance_type": "diag"}
    other = audio["baselines"].PerDigit(images, model.preprocess, told, seed=7)
    assert [each.random_state for each in other.models] == [7, 7]


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


def test_predictor_knows_the_loud_part_from_the_errors_before(audio):
    """Blocks of 3 and of 33 equally probable levels take log2 3 and log2 33 bits."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(128 - k, 129 + k, (60, 1_000)) for k in (1, 16, 1, 16)]
    noise = torch.from_numpy(np.concatenate(blocks, 1).astype(np.uint8))
    code = audio["baselines"].Predictor(noise[:50], order=1, classes=8)
    expected = (math.log2(3) + math.log2(33)) / 2  # but for 16 samples after each border
    assert code.code_length(noise[50:]).mean() / 4_000 == pytest.approx(expected, abs=0.1)


def test_random_bytes_cannot_be_compressed_and_equal_ones_can(audio):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 1, 32, 32), np.uint8))
    for name in audio["baselines"].COMPRESSORS:
        assert audio["baselines"].compressed(name, x) == pytest.approx(8, rel=0.01)
        assert audio["baselines"].compressed(name, 0 * x) < 0.05


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


def test_bands_are_triangles_in_mel_of_the_power_of_each_frequency(audio):
    """A sine has power 1 in its bin and, by a Hann window, 1/4 in both beside it."""
    mels, rate = 1127 * np.log1p(np.array([0, RATE / 2]) / 700), RATE
    edges = 700 * np.expm1(np.linspace(*mels, 22) / 1127)
    found = audio["spectra"].log_mel(tone(1_000, 128.0, n=1), rate)[0, :, 16]
    for band in range(20):
        weights = np.interp([968.75, 1_000, 1_031.25], edges[band : band + 3], [0, 1, 0])
        power = weights @ [0.25, 1, 0.25]
        assert found[band] == pytest.approx(10 * np.log10(power + 1e-5), abs=1e-3)


def test_spectrum_error_is_of_the_means_of_each_digit(audio):
    """Digit 3 is twice as loud, 6.02 dB, and digit 7 as it was: √(6.02² / 2), in any order."""
    noise = 128 + 30 * torch.randn(5, 2_048, generator=torch.Generator().manual_seed(0))
    x = torch.cat([noise[:2], 128 + (noise[2:3] - 128) * 2])
    labels, digits = torch.tensor([7, 7, 3]), torch.tensor([3, 7, 5, 7])
    y = torch.stack([noise[2], noise[1], noise[3], noise[0]])
    error = audio["spectra"].spectrum_error(x, labels, y, digits, RATE)
    assert error == pytest.approx(20 * math.log10(2) / math.sqrt(2), rel=0.01)


def test_loudness_is_the_mean_of_the_decibels_of_utterances(audio):
    both = torch.cat([tone(500, 128.0, n=1), tone(500, 12.8, n=1)])
    assert audio["spectra"].loudness(both) == pytest.approx(-3.01 - 10, abs=0.01)


def pulses(*at, height=1.0, length=256):
    x = torch.full((1, length), 128.0)
    x[0, list(at)] += height
    return x


def test_periodicity_is_the_best_normalized_product_at_a_lag_of_a_voice(audio):
    """Of two pulses a product is 1 by 2; at 4 kHz lags are from 10 to 66; frames of 256."""

    def measure(*x):
        return audio["spectra"].periodicity(torch.cat(x), RATE)

    for lag, expected in ((9, 0.0), (10, 0.5), (66, 0.5), (67, 0.0)):
        assert measure(pulses(90, 90 + lag)) == pytest.approx(expected)
    assert measure(pulses(0, 20)) == pytest.approx(math.sqrt(0.5))  # one of them in the second
    assert measure(pulses(300, 320, length=384)) == pytest.approx(0.5)  # a frame from 128 on
    louder = pulses(90, 99, height=2.0)  # has 4/5 of the energy, and no period
    assert measure(pulses(90, 110), louder) == pytest.approx(0.1)


def test_listener_tells_the_part_that_is_heard_as_it_should_be(audio):
    generator = torch.Generator().manual_seed(0)
    tones = torch.cat([tone(300, 60.0, n=20), tone(900, 60.0, n=20)])
    x, labels = tones + torch.randn(tones.shape, generator=generator), torch.arange(40) // 20
    listener = audio["spectra"].Listener(x, labels, RATE)
    asked = torch.tensor([1, 0, 1] * 10)  # as 3 of 10 low and 13 of 20 high tones sound
    assert listener.accuracy(x[10:], asked) == pytest.approx(16 / 30)
    images = Images(x[:, None, None].round().to(torch.uint8), labels=labels.numpy())
    told = audio["run"].heard(128 + 2 * (tones - 128), labels, images, listener)
    assert float(told["loudness"]) == pytest.approx(20 * math.log10(2), abs=0.05)


def test_bits_are_those_of_a_sample(audio):
    """Each of 256 equally probable levels takes eight; in nats that is log 256."""
    log_prob = torch.tensor([6.0, 8.0, 10.0]) * -math.log(256)  # of 8 samples
    told = audio["run"].bits_of(log_prob, torch.zeros(3, 1, 2, 4))
    assert told == {"bits": "8.0000", "error": f"{2 / math.sqrt(3):.4f}", "scored": 3}


def test_rows_of_what_is_not_ours_are_of_test_utterances(audio, monkeypatch, tmp_path):
    """Of N(0, 5²), of which the test has twice the deviation, and of five levels."""
    run, rng, labels = audio["run"], np.random.default_rng(0), np.arange(2_000) % 2
    monkeypatch.setattr(run, "RUNS", tmp_path)
    (tmp_path / "samples").mkdir()

    def images(x):
        return Images(x.reshape(-1, 1, 2, 4).round().astype(np.uint8), labels=labels)

    train, listener = images(rng.normal(128, 5, 16_000)), None
    train.test = images(rng.normal(128, 10, 16_000))
    monkeypatch.setattr(run, "heard", lambda *_: {})
    told = {"estimator": {"name": "ledoit-wolf"}, "preprocess": ["local-cosine"]}
    config = {"baselines": {"Gaussian": told}, "scored": 500, "samples": 4, "rate": RATE}
    (row,) = run.rows_of_baseline("Gaussian", 0, train, listener, config)
    cross = (0.5 * math.log(2 * math.pi * 25) + 0.5 * 100 / 25) / math.log(2)
    assert float(row["bits"]) == pytest.approx(cross, abs=0.1) and row["scored"] == 500
    train.test = images(rng.integers(126, 131, 16_000))
    train.x = images(rng.integers(124, 133, 16_000)).x
    config["predictor"] = {"order": 1, "classes": 1}
    (row,) = run.rows_of_predictor("predictor", "", train, listener, config)
    assert float(row["bits"]) == pytest.approx(math.log2(9), abs=0.02)
