"""Bases around the mean m: coefficients, the oracle with a condition, samples, guidance and likelihood given m.

test_check.py compares every prediction and the law of samples given m with what is exact, for every process.
"""

import copy
import math

import pytest
import torch
from conftest import make, tiny
from torch.distributions import MultivariateNormal

from build import check_settings
from check import GaussianMixture, conversion_error, sde_error
from likelihood import log_likelihoods
from prediction import PREDICTIONS
from processes import PROCESSES, AroundMean, Foellmer, Process, make_process
from sampling import DIFFUSIONS, SDE_SAMPLERS, Field, draw
from utils import UserError

BASED = {
    "foellmer": Foellmer(), "foellmer 1": Foellmer(0.7, 1.0),
    **{name: make_process(name, base="condition", base_std=0.5) for name in ("rf", "cosine", "linear_vp", "sub_vp")},
}


@pytest.fixture(params=list(BASED))
def based(request):
    return BASED[request.param]


def times(n=99):
    return torch.linspace(0.01, 0.99, n, dtype=torch.float64)


def with_ones(m):
    return torch.cat([m, torch.ones_like(m[:, :1])], dim=1)


# ---- Coefficients


def test_derivatives_are_those_of_autograd(based):
    t = times()
    for name in ("alpha", "sigma", "shift"):
        slope = torch.func.jvp(getattr(based, name), (t,), (torch.ones_like(t),))[1]
        torch.testing.assert_close(getattr(based, f"{name}_dot")(t), slope, rtol=1e-10, atol=1e-12)
        assert torch.equal(getattr(based.coefs(t, 3), name).flatten(), getattr(based, name)(t))


def test_better_formulas_are_the_general_ones(based):
    c = based.coefs(times())
    general = c._replace(half_g2=None, x1_drift=None)
    torch.testing.assert_close(c.delta, general.delta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.drift, c.sigma_dot + c.own_eps / c.sigma, rtol=1e-10, atol=1e-12)
    if not isinstance(based, Foellmer):
        torch.testing.assert_close(c.own_eps, c.delta)
        torch.testing.assert_close(general.drift, 2 * c.sigma_dot - c.f * c.sigma, rtol=1e-9, atol=1e-9)


def test_the_ends_are_data_and_base(based):
    data, base = based.at(0.0), based.at(1.0)
    assert data.alpha == 1 and data.sigma == data.shift == 0
    assert base.alpha < 0.01 and base.shift == pytest.approx(1, abs=1e-4)
    assert base.sigma == (0 if isinstance(based, Foellmer) else pytest.approx(0.5, abs=1e-4))


def test_foellmer_is_that_of_the_paper():
    """Chen et al. 2024: I_s = alpha_s x0 + beta_s x1 + (1 - s) epsilon W_s, with s = 1 - t, 1 - s and s^2; and g."""
    t, epsilon = times(), 0.7
    s, c = 1 - t, Foellmer(epsilon).coefs(t)
    torch.testing.assert_close(c.alpha, s**2)
    torch.testing.assert_close(c.shift, 1 - s)
    torch.testing.assert_close(c.sigma, epsilon * (1 - s) * s.sqrt())  # W_s is N(0, s)
    torch.testing.assert_close(c.own_eps, (epsilon * (1 - s)) ** 2 / 2, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.drift, epsilon * (1 - t).sqrt())
    torch.testing.assert_close(c.g**2, epsilon**2 * (2 * t + t**2))


def test_a_process_without_shift_has_none(process):
    c = process.coefs(times(), 4)
    assert process.shift or c.shift == c.shift_dot == 0.0


def test_times_of_noise_levels(based):
    t = times()
    torch.testing.assert_close(based.time(based.log_snr(t)), t, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["ve", "ve_linear", "edm"])
def test_a_base_that_is_not_reached(name):
    with pytest.raises(UserError, match=f"process {name} keeps the data at t = 1"):
        make_process(name, base="condition")


# ---- The oracle


class PairedMixture(GaussianMixture):
    """(x0, m) from N(means[k], covariances[k]) with probability weights[k], where m is the mean of the base.

    Called as net(xt, t, label, cond), with cond (B, D + 1) of m and ones, it predicts `kind` given m. Without cond, m
    is unknown, and that of the base is 0: this is the mixture of x0 alone. `means` (K, 2 D) are of x0 and then m,
    `covariances` (K, 2 D, 2 D).
    """

    def __init__(self, process: Process, kind, means, covariances, weights):
        D = means.shape[1] // 2
        super().__init__(process, kind, means[:, :D], covariances[:, :D, :D], weights)
        self.of_m = GaussianMixture(process, kind, means[:, D:], covariances[:, D:, D:], weights)
        cross = covariances[:, :D, D:].double()
        self.gain = cross @ torch.linalg.inv(self.of_m.covariances)
        self.rest = GaussianMixture(process, kind, self.means, self.covariances - self.gain @ cross.mT, weights)

    def given(self, m) -> GaussianMixture:
        """x0 given each row of m (B, D), as a mixture for a batch of B rows."""
        found = copy.copy(self.rest)
        found.means = self.means + torch.einsum("kde,bke->bkd", self.gain, m.double()[:, None] - self.of_m.means)
        found.log_weights = self.of_m.components(m, 0.0)[3].log_softmax(1)[None]
        return found

    def __call__(self, xt, t, label=None, cond=None):
        """The prediction at xt (B, D), in the type of xt."""
        law = self if cond is None else self.given(cond[:, :-1])
        return GaussianMixture.__call__(law, xt, t, None, cond)


def pairs(process: Process, kind="velocity") -> PairedMixture:
    """x0 and m in the plane, correlated, of three Gaussians of weights 0.5, 0.3 and 0.2."""
    generator = torch.Generator().manual_seed(1)
    means, root = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (3, 4, 4)))
    covariances = 0.15 * root @ root.mT + 0.05 * torch.eye(4)
    return PairedMixture(process, kind, means, covariances, torch.tensor([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("kind", list(PREDICTIONS))
def test_predictions_given_a_condition_are_expectations(based, kind):
    """E[p x0 + q x1 + r m | xt, m], by a sum over a fine grid of x0, with densities of torch."""
    net, t = pairs(based, kind), 0.4
    m, c = torch.tensor([0.3, -0.4], dtype=torch.float64), based.at(t)
    axis = torch.linspace(-9, 9, 721, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    cross = net.gain @ net.of_m.covariances
    rows = torch.cat([net.covariances, cross], 2), torch.cat([cross.mT, net.of_m.covariances], 2)
    covariances = torch.cat(rows, 1)
    log_p = torch.logsumexp(torch.stack([
        w.log() + MultivariateNormal(torch.cat([a, b]), cov).log_prob(torch.cat([x0, m.expand_as(x0)], 1))
        for w, a, b, cov in zip(net.weights, net.means, net.of_m.means, covariances)]), 0)
    xt = c.alpha * torch.tensor([0.5, 0.2], dtype=torch.float64) + c.shift * m
    x1 = (xt - c.alpha * x0 - c.shift * m) / c.sigma
    weight = (log_p - (x1**2).sum(1) / 2).softmax(0)[:, None]
    p, q, *r = PREDICTIONS[kind](c)
    expected = (weight * (p * x0 + q * x1)).sum(0) + (r[0] * m if r else 0)
    torch.testing.assert_close(net(xt[None], t, cond=with_ones(m[None]))[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", [Foellmer(0.7, 1.0), make_process("cosine", base="condition", base_std=0.3)])
def test_other_bases(process):
    torch.manual_seed(0)
    assert conversion_error(process) < 1e-9 and sde_error(process, "euler_maruyama") < 4


# ---- Samples


def drawn(process, m, sampler="heun", **settings):
    """2,000 samples for each m by the exact field, as sample.py draws them, (n, 2000, 2)."""
    cond = with_ones(m).float().repeat_interleave(2000, 0)
    settings = dict(model_type="drift", sampling_steps=60, T_min=1e-4, T_max=0.9999, seed=0) | settings
    batches = draw(pairs(process, settings["model_type"]), process, rows=range(len(cond)), shape=(2,), device="cpu",
                   sampler=sampler, cond=cond, base="condition", **settings)
    return torch.cat([x for x, _ in batches]).unflatten(0, (len(m), 2000)).double()


@pytest.mark.parametrize("sampler, T_max, T_min", [
    ("heun", 0.9999, 1e-4), ("heun", 0.9999, 0.3), ("euler_maruyama", 1.0, 1e-4), ("stochastic_heun", 1.0, 0.3)])
@pytest.mark.parametrize("name", ["foellmer", "cosine"])
def test_samples_have_the_mean_that_their_condition_gives(name, sampler, T_max, T_min):
    """That of xt at T_min, with its known part: at 0.3 this is a third of m."""
    process, m = BASED[name], torch.tensor([[0.3, -0.4], [-1.0, 1.5]], dtype=torch.float64)
    if name == "cosine":
        T_max = 0.9999
    elif T_max < 1:  # near the point the ODE is stiff
        T_max = 0.99
    x = drawn(process, m, sampler, T_max=T_max, T_min=T_min, sde_diffusion="own" if name == "foellmer" else "sigma")
    law, c = pairs(process).given(m), process.at(T_min)
    mean = torch.einsum("bk,bkd->bd", law.log_weights[0].exp(), law.means)
    error = (x.mean(1) - (c.alpha * mean + c.shift * m)).abs() / (x.std(1) / 2000**0.5)
    assert error.max() < 4.5


def test_the_bound_of_eps_leaves_the_point_with_delta():
    """delta is 3/2 at the point, where the first step has room for a third of this: so much the bound lets in.

    After a step of 0.1 the variance of x is exact with the bound. Without it, it is 2 delta(0.95) 0.1 / sigma(0.9)^2
    = 3.46 times as large.
    """
    class Unbounded(Field):
        def eps(self, t, t_next):
            return float(self.process.at((t + t_next) / 2).delta)

    process, m, ratios = Foellmer(), torch.tensor([[0.3, -0.4]], dtype=torch.float64), []
    for cls in Field, Unbounded:
        torch.manual_seed(0)
        field = cls(pairs(process, "drift"), process, "drift", cond=with_ones(m).expand(4000, 3), m=m)
        x = SDE_SAMPLERS["euler_maruyama"](field, torch.zeros(4000, 2, dtype=torch.float64), [1.0, 0.9, 0.9 - 1e-9])
        ratios.append(x.var(0).mean().item() / process.at(0.9).sigma.item() ** 2)
    assert ratios == [pytest.approx(1, rel=0.05), pytest.approx(3.46, rel=0.05)]


@pytest.mark.parametrize("diffusion", list(DIFFUSIONS))
def test_the_drift_at_the_point_is_finite(diffusion):
    process, m = Foellmer(), torch.randn(5, 2, dtype=torch.float64)
    field = Field(pairs(process, "drift"), process, "drift", cond=with_ones(m), m=m, sde_diffusion=diffusion)
    assert field.drift(torch.zeros_like(m), 1.0, field.eps(1.0, 0.9)).isfinite().all()


def test_guidance_leads_away_from_the_field_without_condition():
    """u + 3 (c - u), where u knows no condition and has the base around 0, for the same z."""
    process, m, z = BASED["rf"], torch.randn(2, 6, 2, dtype=torch.float64)[0], torch.randn(6, 2, dtype=torch.float64)
    net = pairs(process)
    settings = dict(cond=with_ones(m), m=m, guidance_scale=3.0)
    field = Field(net, process, "velocity", cond_dropout=0.1, **settings)
    c, u = net.given(m)(z, 0.4), net(z, 0.4)
    torch.testing.assert_close(field(z, 0.4, "velocity"), u + 3 * (c - u))
    assert field.calls == 2
    never_hidden = Field(net, process, "velocity", **settings)
    torch.testing.assert_close(never_hidden(z, 0.4, "velocity"), c)
    assert never_hidden.calls == 1


def test_likelihood_given_a_condition(based):
    m = torch.tensor([[0.3, -0.4], [-1.0, 1.5], [0.0, 0.0]], dtype=torch.float64)
    law, t = pairs(based).given(m), (1e-4, 0.99 if isinstance(based, Foellmer) else 0.9999)
    x0 = torch.randn(3, 2)
    (found,) = log_likelihoods(pairs(based), based, x0, rows=range(3), device="cpu", seed=0, T_min=t[0], T_max=t[1],
                               probe="exact", cond=with_ones(m).float(), base="condition", model_type="velocity",
                               log_prior=lambda z: law.log_prob(z, t[1]), rtol=1e-6, atol=1e-6)
    exact = law.log_prob(x0.double() - based.at(t[0]).shift * m, t[0])
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-3)


# ---- Settings


@pytest.mark.parametrize("settings, words", [
    (dict(process="foellmer", model_type="drift", target_type="drift", T_max=1.0, sampler="heun"),
     "sampler heun cannot leave a point"),
    (dict(process="foellmer", model_type="drift", target_type="drift", T_max=1.0, sampler="euler_maruyama",
          sde_sampler="edm_churn"), "sde_sampler edm_churn cannot leave a point"),
    (dict(process="foellmer", T_max=1.0, sampler="euler_maruyama"), "T_max 1.0: the target velocity is not finite"),
    (dict(process="ve", base="condition"), "does not reach the base condition"),
])
def test_settings_that_do_not_go_together(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        check_settings(tiny(tmp_path, **settings))


@pytest.mark.parametrize("settings, words", [
    (dict(base="condition"), "base condition needs a condition with the 1 channels of the data, and digits has none"),
    (dict(cond_dropout=0.1), "cond_dropout is set, but digits has no condition"),
])
def test_a_condition_that_is_not_there(tmp_path, digits, settings, words):
    with pytest.raises(UserError, match=words):
        make(tmp_path, digits, **settings)


def test_noise_is_not_tied_to_a_condition(tmp_path):
    from data_utils import load_dataset

    dataset = load_dataset("digits", corruption="downsample", downsample_factor=4)
    with pytest.raises(UserError, match="coupling ot ties the noise to the condition"):
        make(tmp_path, dataset, coupling="ot", sde_sampler=None)


def test_every_prediction_with_a_mean_names_it():
    """The third entry of a row is the derivative of the known part."""
    c = AroundMean(PROCESSES["rf"](), 0.5).at(0.3)
    known = {kind: PREDICTIONS[kind](c)[2:] for kind in PREDICTIONS}
    assert {kind for kind, r in known.items() if r} == {"velocity", "drift"}
    assert known["velocity"][0] == known["drift"][0] == c.shift_dot == 1 and not math.isnan(c.shift)
