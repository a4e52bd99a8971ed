"""The variational autoencoder of experiments/vae: its weights, decoder, pairing and scores."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

import cnf
from cnf.data import Images

FOLDER = Path(__file__).parent.parent / "experiments" / "vae"
LIMIT, POINTS = 12.0, 401  # of the quadratures over noise and latent variable
STEP = 2 * LIMIT / (POINTS - 1)
POSTERIORS = {
    "Gaussian": None,
    "planar": {"name": "planar", "layers": 2},
    "iaf": {"name": "iaf", "layers": 2, "hidden": [8]},
    "cnf": {"name": "cnf", "hidden": [8, 8], "solver": {"method": "rk4", "steps": 24}},
}


@pytest.fixture(scope="module")
def modules():
    """The modules of experiments/vae by name."""
    names = ("vae", "run", "gap")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def vae(modules):
    """The module experiments/vae/vae.py."""
    return modules["vae"]


def perturbed(model, scale=0.1):
    """The same with noise on each weight, so that no map is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


def calm(model):
    """A posterior about as wide as the prior, so that the quadratures see all of both."""
    last = model.posterior.transform.transforms[-1].net.layers[-1]
    with torch.no_grad():
        for weight in last.parameters():
            weight *= 0.1


CASES = [*((name, None) for name in POSTERIORS), ("Gaussian", "cnf")]


@pytest.mark.parametrize(("name", "prior"), CASES)
def test_mean_weight_is_the_evidence(vae, name, prior):
    """E[p(x, z)/q(z|x)] over the noise = ∫ p(z) p(x|z) dz, both by the trapezoidal rule."""
    torch.manual_seed(0)
    flows = {"posterior": POSTERIORS[name], "prior": POSTERIORS.get(prior)}
    model = perturbed(vae.VAE(3, 1, 4, (8,), **flows).double())
    calm(model)
    x = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    grid = torch.linspace(-LIMIT, LIMIT, POINTS, dtype=torch.float64).unsqueeze(-1)
    rows = x.expand(len(grid), -1)
    normal = -0.5 * grid.squeeze(-1) ** 2 - 0.5 * math.log(2 * math.pi)
    with torch.no_grad():
        drawn = (normal + model.log_weights(rows, grid)).logsumexp(0) + math.log(STEP)
        exact = model.log_joint(rows, grid).logsumexp(0) + math.log(STEP)
        elbo = (normal.exp() * model.log_weights(rows, grid)).sum() * STEP
    assert drawn == pytest.approx(exact.item(), abs=1e-5)  # RK4 with 24 steps
    assert elbo < exact


def test_elbo_of_gaussian_posterior_has_the_closed_divergence(vae):
    """E[log w] = E_q[log p(x|z)] - KL(q ‖ p), the first by quadrature, the second closed."""
    torch.manual_seed(0)
    model = perturbed(vae.VAE(3, 1, 4, (8,)).double())
    x = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    noise = torch.linspace(-LIMIT, LIMIT, POINTS, dtype=torch.float64).unsqueeze(-1)
    share = torch.exp(-0.5 * noise.squeeze(-1) ** 2) / math.sqrt(2 * math.pi) * STEP
    rows = x.expand(len(noise), -1)
    with torch.no_grad():
        ends = model.posterior.decode(noise[[0, -1]], model.features(rows[:2])).squeeze(-1)
        mean, std = ends.mean(), (ends[1] - ends[0]) / (2 * LIMIT)
        z = mean + std * noise
        likelihood = (share * model.decoder.log_prob(rows, z)).sum()
        found = (share * model.log_weights(rows, noise)).sum()
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    q = torch.distributions.Normal(mean, std)
    closed = likelihood - torch.distributions.kl_divergence(q, normal)
    assert found.item() == pytest.approx(closed.item(), abs=1e-6)


@pytest.mark.parametrize("center", [-40.0, 0.2, 128.0, 300.0])
@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_discretized_logistic_is_the_difference_of_its_distribution_function(vae, center, scale):
    x = torch.arange(256, dtype=torch.float64)
    place, width = torch.tensor([center, scale], dtype=torch.float64)
    log_p = vae.logistic_log_prob(x, place, width.log())
    assert log_p.exp().sum() == pytest.approx(1.0, abs=1e-9)
    ends = torch.arange(0.5, 255, dtype=torch.float64)
    below = torch.sigmoid((ends - center) / scale)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    expected = torch.cat([zero, below, one]).diff()
    assert torch.allclose(log_p.exp(), expected, atol=1e-12)
    assert log_p.isfinite().all()


def test_models_of_one_seed_share_encoder_decoder_and_draws(vae):
    batch = cnf.Batch(torch.rand(5, 6))
    objective, found = vae.NegativeELBO(binarize=True), []
    for posterior in POSTERIORS.values():
        torch.manual_seed(3)
        model = vae.VAE(6, 2, 4, (8,), posterior=posterior)
        rows = objective.prepare(model, batch, torch.Generator().manual_seed(4))
        found.append([rows.x, rows.noise, *model.shared().parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


SPLINES = {"name": "nsf", "layers": 2, "hidden": [8]}  # the identity at the start


@pytest.mark.parametrize("kind", ["bernoulli", "flow"])
def test_flows_begin_with_the_elbo_of_the_gaussian_whose_parts_they_take(vae, kind):
    """Of other seeds, with flows that are the identity, after the shared parts are copied."""
    torch.manual_seed(0)
    gaussian = perturbed(vae.VAE(6, 2, 4, (8, 8), decoder=kind))
    flows = {"posterior": SPLINES, "prior": SPLINES}
    decoder = {"decoder_flow": {"name": "realnvp", "layers": 2}} if kind == "flow" else {}
    model = vae.VAE(6, 2, 4, (8, 8), decoder=kind, **flows, **decoder)
    model.shared().load_state_dict(gaussian.shared().state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (9, 6), generator=generator).float()
    noise = torch.randn(9, 2, generator=generator)
    elbos = []
    for each in (gaussian, model):
        torch.manual_seed(2)  # of the dequantization
        with torch.no_grad():
            elbos.append(each.eval().log_weights(x, noise))
    assert torch.allclose(*elbos, atol=1e-4)


@pytest.mark.parametrize("flow", [None, {"name": "maf", "layers": 2, "hidden": [4]}])
def test_probabilities_of_flow_decoder_sum_to_one(vae, flow):
    """Of one pixel, Σ_x E[p(x + u)] over uniform noise u, by 100 draws for each of 256 levels."""
    torch.manual_seed(0)
    model = perturbed(vae.VAE(1, 2, 4, (8, 8), decoder="flow", decoder_flow=flow))
    levels, z = torch.arange(256.0).repeat(100).unsqueeze(-1), torch.full((25_600, 2), 0.5)
    with torch.no_grad():
        total = model.decoder.log_prob(levels, z).exp().sum() / 100
    assert total == pytest.approx(1.0, abs=0.01)
    assert model.decoder.mean(z[:3]).shape == (3, 1)


def test_loss_is_minus_the_weighted_mean_of_the_log_weights(vae):
    torch.manual_seed(0)
    model = perturbed(vae.VAE(3, 1, 4, (8,), posterior=POSTERIORS["planar"]).double())
    x, weight = torch.rand(5, 3, dtype=torch.float64).round(), torch.tensor([1.0, 0, 2, 0, 1])
    rows = vae.NegativeELBO().prepare(model, cnf.objectives.Batch(x, weight=weight.double()))
    terms = model.log_weights(rows.x, rows.noise)
    expected = -(terms * weight).sum() / weight.sum()
    assert vae.NegativeELBO()(model, rows).value.item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_binarized_pixels_are_one_with_their_probability(vae):
    model = vae.VAE(3, 1, 4, (8,))
    x = torch.tensor([0.0, 0.3, 1.0]).expand(4_000, 3)
    drawn = vae.NegativeELBO(binarize=True).prepare(
        model, cnf.objectives.Batch(x), torch.Generator().manual_seed(0)
    )
    assert set(drawn.x.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.x.mean(0), x[0], rtol=0, atol=0.03)


def test_another_solver_is_that_of_the_posterior_and_not_of_the_original(vae):
    model = vae.VAE(3, 1, 4, (8,), posterior=POSTERIORS["cnf"])
    other = model.with_solver(cnf.Solver("euler", steps=1))
    assert "euler" in str(other.posterior.transform) and "euler" not in str(model)


@pytest.fixture
def scored(vae):
    """A function of a posterior: a model, three pictures, and log p(x) and the ELBO of each."""

    def build(name):
        torch.manual_seed(0)
        model = perturbed(vae.VAE(3, 1, 4, (8,), posterior=POSTERIORS[name]), 0.2)
        calm(model)
        x = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])
        return model, x, *of_noise(model.log_weights, x)

    return build


def of_noise(log_weights, rows):
    """The log mean weight and the mean log-weight of each row, by the trapezoidal rule."""
    noise = torch.linspace(-LIMIT, LIMIT, POINTS).unsqueeze(-1)
    log_share = -0.5 * noise.squeeze(-1) ** 2 + math.log(STEP / math.sqrt(2 * math.pi))
    with torch.no_grad():
        log_w = torch.stack([log_weights(row.expand(POINTS, -1), noise) for row in rows])
    return (log_share + log_w).logsumexp(1), (log_share.exp() * log_w).sum(1)


DRAWS = {"elbo": 20_000, "bound": 20_000, "pictures": 2, "together": 2}


def test_scores_are_the_evidence_and_the_elbo_of_each_picture(modules, scored):
    """Of all for the ELBO, and of the first two for both bounds; in parts of two."""
    model, x, exact, elbo = scored("planar")
    assert (elbo[:, None] - elbo).abs().fill_diagonal_(1).min() > 0.1
    found = modules["run"].evidence(model, x, 20_000, 0, 2)
    wanted = torch.stack([elbo, exact]).double()
    torch.testing.assert_close(torch.stack(found), wanted, atol=0.02, rtol=0)
    told = modules["run"].scores(
        model, x, {"draws": DRAWS, "solver": {"method": "rk4", "steps": 1}}, 0
    )
    wanted = {
        "negative_elbo": -elbo.mean(), "error": elbo.std() / math.sqrt(3),
        "negative_elbo_of_bound": -elbo[:2].mean(), "negative_bound": -exact[:2].mean(),
        "train_solver_change": 0.0,
    }  # fmt: skip
    assert {k: float(v) for k, v in told.items()} == pytest.approx(
        {k: float(v) for k, v in wanted.items()}, abs=0.02
    )


def test_change_by_the_solver_is_how_much_better_its_elbo_looks(modules, scored):
    model, x, _, elbo = scored("cnf")
    coarse = model.with_solver(cnf.Solver("euler", steps=1))
    _, looks = of_noise(coarse.log_weights, x)
    config = {
        "draws": {**DRAWS, "elbo": 4_000, "bound": 10},
        "solver": {"method": "rk4", "steps": 12},
    }
    told = modules["run"].scores(coarse, x, config, 0)
    change = (looks - elbo)[:2].mean().item()
    assert abs(change) > 0.02
    assert float(told["train_solver_change"]) == pytest.approx(change, rel=0.05)
    assert float(told["negative_elbo"]) == pytest.approx(-elbo.mean().item(), abs=0.05)


def test_deviations_by_picture_begin_at_the_posterior_and_keep_the_evidence(modules, scored):
    model, x, exact, elbo = scored("Gaussian")
    own, numbers = modules["gap"].PerPicture(model, x), torch.arange(3.0).unsqueeze(-1)
    for found, wanted in zip(of_noise(own.log_weights, numbers), (exact, elbo), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    perturbed(own.requires_grad_(False), 0.0)
    generator = torch.Generator().manual_seed(0)
    own.mean += 0.3 * torch.randn(3, 1, generator=generator)
    own.log_scale += 0.3 * torch.randn(3, 1, generator=generator)
    found, less = of_noise(own.log_weights, numbers)
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    assert own.elbo(20_000, generator) == pytest.approx(less.mean().item(), abs=0.02)


def test_gap_is_told_of_negative_elbos(modules, scored, monkeypatch, tmp_path):
    """With a training that widens each posterior by a factor e^½."""
    gap, (model, x, exact, elbo) = modules["gap"], scored("Gaussian")
    wider = gap.PerPicture(model, x)
    with torch.no_grad():
        wider.log_scale += 0.5
    _, after = of_noise(wider.log_weights, torch.arange(3.0).unsqueeze(-1))

    def fit(own, *_):
        with torch.no_grad():
            own.log_scale += 0.5

    torch.save(model.state_dict(), tmp_path / "weights")
    monkeypatch.setattr(gap, "built", lambda *_: model)
    monkeypatch.setattr(gap, "weights_of", lambda *_: tmp_path / "weights")
    monkeypatch.setattr(gap.cnf, "fit", fit)
    found = gap.gap({"draws": DRAWS}, "set", x, 0)
    wanted = {"-ELBO": -elbo, "by picture": -after, "bound": -exact}
    assert found == pytest.approx({k: v.mean().item() for k, v in wanted.items()}, abs=0.02)


def test_test_pictures_are_binarized_by_the_means_of_their_pixels(modules, monkeypatch):
    levels = torch.tensor([[0, 102, 204, 204], [102, 204, 0, 102]]).to(torch.uint8)
    images = Images(levels.expand(2_000, 1, 2, 4).contiguous(), "gray")
    images.validation = images.test = images
    monkeypatch.setattr(modules["run"], "images_of_mnist", lambda: images)
    x, validation, test = modules["run"].mnist(2)
    means = torch.tensor([0.4, 0.5])  # of 408 and 510 by 4 · 255
    for gray in (x, validation):
        torch.testing.assert_close(gray, means.expand(2_000, 2))
    assert set(test.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(test.mean(0), means, atol=0.04, rtol=0)


def row_of(model, seed, elbo, of_bound=0.0, bound=0.0, change=0.0):
    """A row of results.csv, as it is read."""
    told = {
        "set": "faces", "model": model, "seed": seed, "negative_elbo": elbo,
        "negative_elbo_of_bound": of_bound, "negative_bound": bound,
        "train_solver_change": change, "ms_per_step": 3, "parameters": 1_000,
    }  # fmt: skip
    return {key: str(value) for key, value in told.items()}


def test_table_pairs_gains_by_seed_and_tells_them_in_the_order_of_the_seeds(modules):
    """Rows as they were written, seed 2 first; 560 pixels of one bit have 560 log 2 nats."""
    bit = 560 * math.log(2)
    rows = [row_of("CNF", 2, bit - 4, of_bound=9, bound=7, change=0.25)]
    rows += [row_of("Gaussian", seed, bit + seed) for seed in range(3)]
    rows += [row_of("CNF", seed, bit + seed - 8, 8, 7, 0.25) for seed in range(2)]
    table = modules["run"].table(rows, "faces", ["Gaussian", "CNF"], modules["run"].BITS)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    gaussian, cnf = (dict(zip(cells[0], line, strict=True)) for line in cells[2:])
    assert gaussian["bits/dim"].startswith("1.00") and gaussian["each seed"] == "–"
    assert cnf["each seed"] == "8, 8, 6"
    gained = cnf["gained over the Gaussian"].split(" ± ")
    assert [float(each) for each in gained] == pytest.approx([22 / 3, 2 / 3], abs=0.05)
    assert float(cnf["above its bound"].split(" ± ")[0]) == pytest.approx(4 / 3, abs=0.05)
    assert cnf["bound of -log p(x)"].startswith("7") and cnf["training's solver"] == "+0.250"
