"""Normalization by statistics of all data, of the first batch and of every batch."""

import copy

import pytest
import torch

from cnf.transforms import ActNorm, BatchNorm, Standardize
from cnf.transforms.normalization import initializing

F64 = torch.float64


def initialized(transform, x):
    with torch.no_grad(), initializing(transform):
        return transform.inverse(x)


def test_standardize_fits_once_and_gives_zero_mean_unit_variance(generator):
    x = torch.randn(500, 3, generator=generator, dtype=F64) * torch.tensor([1.0, 4, 0.1]) + 7
    x[:, 2] = 5.0  # constant: left as it is, not divided by zero
    transform = Standardize((3,)).double()
    assert torch.equal(transform.inverse(x)[0], x)
    transform.fit(x)
    z, ladj = transform.inverse(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    expected = -(x[:, 0].std().log() + x[:, 1].std().log())
    torch.testing.assert_close(ladj, expected.expand(500))
    loc = transform.loc.clone()
    transform.fit(x + 100)
    assert torch.equal(transform.loc, loc) and list(transform.parameters()) == []


def test_standardize_has_one_statistic_per_channel_of_images(generator):
    x = torch.randn(50, 2, 4, 4, generator=generator, dtype=F64) * 3 + 1
    x[:, 1] *= 5
    x[:, :, 0] = 0.0  # a border that does not vary
    transform = Standardize((2, 4, 4)).double()
    transform.fit(x)
    z, ladj = transform.inverse(x)
    spread = torch.stack([x[:, 0].std(), x[:, 1].std()])
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2, dtype=F64))
    torch.testing.assert_close(ladj, (-16 * spread.log().sum()).expand(50))
    torch.testing.assert_close(transform(z)[0], x)


@pytest.mark.parametrize("cast", [lambda m: m.float(), lambda m: m.half(), lambda m: m.to(F64)])
def test_statistics_of_large_numbers_are_not_changed_by_casts(cast, generator):
    noise = torch.randn(500, 2, generator=generator, dtype=F64)
    transform = Standardize((2,))
    transform.fit(1e8 + noise)
    transform = cast(torch.nn.Sequential(copy.deepcopy(transform)))[0]
    z, ladj = transform.inverse(1e8 + noise)
    expected = (noise - noise.mean(0)) / noise.std(0)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)  # a step at 1e8 is 1.5e-8
    torch.testing.assert_close(ladj, -noise.std(0).log().sum().expand(500), rtol=0, atol=1e-7)
    torch.testing.assert_close(transform(z)[0] - 1e8, noise, rtol=0, atol=1e-6)
    assert transform.dtype == F64 and transform.unresolved == (0, 1)
    half = transform.inverse(noise.half())
    assert half[0].dtype == half[1].dtype == transform(noise.half())[0].dtype == torch.float16


def test_unresolved_columns_have_float32_rounding_above_one_percent_of_their_spread(generator):
    x = torch.tensor([2e5, 6e5]) + torch.randn(1_000, 2, generator=generator, dtype=F64)
    error = (x.float() - x).abs().mean(0) / x.std(0)
    assert error[0] < 0.01 < error[1]
    transform = Standardize((2,))
    transform.fit(x)
    assert transform.unresolved == (1,)


def test_dtype_of_the_data_is_saved_in_state_dict(generator):
    x = 1e8 + torch.randn(500, 2, generator=generator, dtype=F64)
    fitted, loaded, old = (torch.nn.Sequential(Standardize((2,))).float() for _ in range(3))
    fitted[0].fit(x)
    loaded.load_state_dict(fitted.state_dict())
    assert loaded[0].dtype == F64 and loaded[0].unresolved == (0, 1)
    assert torch.equal(loaded[0].inverse(x)[0], fitted[0].inverse(x)[0])
    state = {name: value.float() for name, value in fitted.state_dict().items()}
    del state["0._extra_state"]  # as before location and scale were float64
    old.load_state_dict(state)
    assert old[0].dtype == torch.float32 and old[0].loc.dtype == F64
    assert torch.equal(old[0].scale, fitted[0].scale.float().double())


def test_statistics_move_to_and_from_the_meta_device():
    transform = Standardize((2,)).to("meta")
    assert transform.loc.device.type == transform.fitted.device.type == "meta"
    assert transform.to_empty(device="cpu").scale.dtype == F64


def test_device_without_float64_refuses_columns_that_float32_does_not_resolve(
    monkeypatch, generator
):
    noise = torch.randn(500, 2, generator=generator, dtype=F64)
    near, far = Standardize((2,)), Standardize((2,))
    near.fit(10 + noise)
    far.fit(torch.tensor([10, 1e8]) + noise)
    monkeypatch.setattr("cnf.transforms.preprocessing.widest", lambda device: torch.float32)
    z, _ = near.to("cpu").inverse((10 + noise).float())
    assert z.dtype == near.loc.dtype == torch.float32
    torch.testing.assert_close(
        z, ((noise - noise.mean(0)) / noise.std(0)).float(), atol=1e-5, rtol=0
    )
    with pytest.raises(
        ValueError, match=r"Standardize: columns \[1\] need float64, which cpu does"
    ):
        far.to("cpu")


@pytest.mark.parametrize(("shape", "channels"), [((3,), 3), ((3, 4, 5), 3)])
def test_actnorm_is_initialized_by_its_first_batch_and_then_trained(shape, channels, generator):
    x = 3 * torch.randn(50, *shape, generator=generator, dtype=F64) + 7
    x[:, 2] = 5.0  # constant: moved, not divided by zero
    transform = ActNorm(shape).double()
    initialized(transform, x)
    z, ladj = transform.inverse(x)
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(z.mean(dims), torch.zeros(channels, dtype=F64), rtol=0, atol=1e-12)
    spread = torch.tensor([1.0, 1.0, 0.0], dtype=F64)
    torch.testing.assert_close(z.std(dims, correction=0), spread)
    places = x[0, 0].numel()
    expected = -places * x.std(dims, correction=0)[:2].log().sum()
    torch.testing.assert_close(ladj, expected.expand(50))
    before = transform.loc.detach().clone()
    initialized(transform, x + 100)
    assert torch.equal(transform.loc, before)
    again = ActNorm(shape).double()
    again.load_state_dict(transform.state_dict())
    assert torch.equal(again.inverse(x)[0], z)


def test_actnorm_loads_the_flag_seen_of_version_0_1():
    state = ActNorm((2,)).state_dict()
    state["seen"] = torch.tensor(True)
    del state["initialized"]
    transform = ActNorm((2,))
    transform.load_state_dict(state)
    assert transform.initialized and "seen" in state


def test_actnorm_is_not_initialized_by_evaluation_or_by_one_point(generator):
    x = torch.randn(4, 2, generator=generator, dtype=F64) + 9
    transform, batchnorm = ActNorm((2,)).double(), BatchNorm(2).double()
    assert torch.equal(transform.inverse(x)[0], x)  # in train mode, with gradients
    initialized(transform, x[:1])
    assert not transform.initialized and not transform.initializing
    with torch.no_grad():
        batchnorm.inverse(x)
    assert batchnorm.mean.tolist() == [0, 0]


def test_batchnorm_equals_torchs_and_is_inverted_by_running_statistics(generator):
    x = 3 * torch.randn(50, 2, generator=generator, dtype=F64) + 7
    transform = BatchNorm(2, momentum=0.2).double()
    theirs = torch.nn.BatchNorm1d(2, momentum=0.2).double()
    with torch.no_grad():
        transform.gain.copy_(torch.tensor([0.5, -0.3]))
        transform.shift.copy_(torch.tensor([0.1, 2.0]))
        theirs.weight.copy_(transform.gain.exp())
        theirs.bias.copy_(transform.shift)
    z, ladj = transform.inverse(x)
    torch.testing.assert_close(z, theirs(x))
    deviations = (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(ladj, (transform.gain - deviations.log()).sum().expand(50))
    transform.eval(), theirs.eval()
    z, ladj = transform.inverse(x)
    torch.testing.assert_close(z, theirs(x))
    torch.testing.assert_close(transform(z)[0], x)
    assert (z.mean(0) - transform.shift).abs().max() > 0.5  # not the batch's own statistics


def test_gradients_include_those_of_batch_statistics(generator):
    x = torch.randn(6, 2, generator=generator, dtype=F64, requires_grad=True)
    transform = BatchNorm(2).double()
    assert torch.autograd.gradcheck(lambda x: transform.inverse(x), x)


def test_actnorm_trained_on_samples_is_not_initialized_again_by_data(generator):
    transform = ActNorm((2,))
    z = torch.randn(50, 2, generator=generator)
    transform(z)[0].sum().backward()
    with torch.no_grad():
        transform.loc.add_(3.0)
    initialized(transform, z)
    assert transform.loc.tolist() == [3, 3]


@pytest.mark.parametrize("make", [Standardize, ActNorm])
def test_constant_column_whose_mean_rounds_has_scale_one(make):
    x = torch.full((10_000, 2), 1e4 + 1 / 3)
    x[:, 1] = torch.linspace(-1, 1, 10_000)
    transform = make((2,))
    transform.fit(x) if make is Standardize else initialized(transform, x)
    z, ladj = transform.inverse(x)
    assert z[:, 0].abs().max() < 0.01 and ladj.abs().max() < 1


@pytest.mark.parametrize("make", [Standardize, ActNorm])
def test_column_with_small_relative_variation_is_not_constant(make, generator):
    x = 1.7e9 + 1e3 * torch.randn(10_000, 1, generator=generator)  # seconds since 1970
    transform = make((1,))
    transform.fit(x) if make is Standardize else initialized(transform, x)
    assert transform.inverse(x)[0].std().item() == pytest.approx(1, abs=0.02)
