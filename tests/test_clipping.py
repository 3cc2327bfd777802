"""Tests of clip_x0: its definitions, that all kinds follow from the clipped x0, and that no likelihood is clipped."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import gaussian, make, tiny

from build import build, check_condition, draw_all
from data_utils import Cases, load_dataset
from likelihood import log_likelihoods
from prediction import PREDICTIONS, target
from processes import PROCESSES
from sampling import CLIPS, SAMPLERS, Field, draw
from trainer import DiffusionTrainer
from utils import UserError

CPU = torch.device("cpu")


def wide(process, kind="velocity"):
    """Data N(0.7, 3^2): most of the predicted x0 are beyond [-1, 1]."""
    return gaussian(process, kind, dims=6, std=3.0)


def test_the_definitions():
    x0 = torch.randn(5, 3, 4, 4) * torch.tensor([0.1, 0.5, 1.0, 2.0, 20.0])[:, None, None, None]
    assert CLIPS["none"] is None
    assert torch.equal(CLIPS["static"](x0), torch.where(x0 > 1, 1.0, torch.where(x0 < -1, -1.0, x0)))
    found = CLIPS["dynamic"](x0)
    for one, clipped in zip(x0.numpy(), found.numpy()):
        s = max(1.0, np.percentile(abs(one), 99.5))
        np.testing.assert_allclose(clipped, np.clip(one, -s, s) / s, rtol=1e-5)
    assert torch.equal(found[0], x0[0]) and found.abs().max() <= 1


@pytest.mark.parametrize("kind", list(PREDICTIONS))
@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_every_kind_follows_from_the_clipped_x0(name, kind, clip):
    """Also near the noise, where x0 comes from an earlier time. Without clipping, nothing changes."""
    process, x = PROCESSES[name](), torch.linspace(-9, 9, 24, dtype=torch.float64).reshape(4, 6)
    plain, none, field = (Field(wide(process, kind), process, kind, **given)
                          for given in ({}, {"clip_x0": "none"}, {"clip_x0": clip}))
    for time in (0.1, 0.5, 0.9, 0.9999):
        c = process.at(time)
        state = c.variance.sqrt() * x
        x0 = CLIPS[clip](plain(state, time, "x0"))
        x1 = (state - c.alpha * x0) / c.sigma
        assert time > 0.1 or not torch.allclose(x0, plain(state, time, "x0")) and x0.abs().max() <= 1
        for to, found in zip(PREDICTIONS, field(state, time, *PREDICTIONS)):
            torch.testing.assert_close(found, target(to, c, x0, x1), rtol=1e-6, atol=1e-6)
            assert torch.equal(none(state, time, to), plain(state, time, to))
    assert field.calls == 4


def test_without_noise_only_x0_is_clipped():
    """At sigma = 0 no other kind can be computed from x0; the network's own is finite."""
    process, x = PROCESSES["rf"](), 5 * torch.randn(4, 6)
    plain, field = (Field(wide(process), process, "velocity", clip_x0=clip) for clip in ("none", "static"))
    assert torch.equal(field(x, 0.0, "velocity"), plain(x, 0.0, "velocity"))
    assert torch.equal(field(x, 0.0, "x0"), x.clamp(-1, 1))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("grid, T_min", [("uniform", 1e-4), ("edm", 0.0)])
def test_samples_stay_in_range(sampler, grid, T_min):
    process = PROCESSES["ve_linear"]()
    settings = dict(rows=range(20), shape=(6,), device=CPU, seed=0, sampler=sampler, sampling_steps=8, T_min=T_min,
                    T_max=1.0, grid=grid, denoise=True, model_type="edm", rtol=1e-2, atol=1e-2, rho=7.0)
    for clip, inside in (("none", False), ("static", True), ("dynamic", True)):
        (samples, _), = draw(wide(process, "edm"), process, clip_x0=clip, **settings)
        assert samples.isfinite().all() and (samples.abs().max() <= 1) == inside


def test_a_likelihood_is_not_clipped():
    process, data = PROCESSES["rf"](), torch.full((3, 6), 2.0)
    found = [torch.cat([*log_likelihoods(wide(process), process, data, rows=range(3), device=CPU, seed=0, T_min=1e-3,
                                         T_max=0.999, probe="exact", model_type="velocity", **given)])
             for given in ({}, {"clip_x0": "static"})]
    assert torch.equal(*found) and found[0].isfinite().all()


def test_a_loss_is_not_clipped(tmp_path, digits, without_curves):
    plain, clipped = (make(tmp_path, digits, run_name=clip, clip_x0=clip) for clip in ("none", "static"))
    batch = plain.prepare_batch(0)
    assert torch.equal(plain.loss(batch), clipped.loss(batch))


def test_images_of_a_run_change(tmp_path, digits):
    """A network that has learned nothing predicts x0 far from [-1, 1]. Pixels are clipped anyway, as by `static`."""
    trainer = DiffusionTrainer(tiny(tmp_path), digits, CPU)
    images = [draw_all(dataclasses.replace(trainer.config, clip_x0=clip), trainer.spec, trainer.process, trainer.net,
                       CPU, Cases(20, torch.arange(20) % 10), "euler")[0] for clip in CLIPS]
    assert all((images[i] != images[k]).any() for i, k in ((0, 2), (1, 2)))


def test_what_does_not_go_with_it_in_one_line(tmp_path, digits):
    words = "clip_x0 static is for images.*: use --clip_x0 none"
    points = load_dataset("moons")
    config = tiny(tmp_path, network="mlp", dataset="moons", class_conditional=False, clip_x0="static")
    with pytest.raises(UserError, match=words):
        build(config, points.spec, CPU)
    config = tiny(tmp_path, source="digits", gamma="brownian", sde_sampler=None, clip_x0="static")
    with pytest.raises(UserError, match=words):
        check_condition(config, digits.spec)
    check_condition(dataclasses.replace(config, gamma=None), digits.spec)
