"""One step's parts: who learns, what gradients and noise the parts of a batch get, and the moving average."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import step as step_module
from augment import augment
from clip import load_clip
from common import distributed
from losses import DiscriminatorLoss, generator_loss, r1_penalty, scale_weights
from router import Routing
from step import Learner
from tests.figures import TINY, Figures, moved


@pytest.fixture(scope="module")
def learner():
    """With every weight moved, and rates of zero, so that steps leave gradients and change nothing."""
    torch.manual_seed(0)
    preset = dataclasses.replace(
        TINY,
        recipe=dataclasses.replace(TINY.recipe, augment=("color",)),
        discriminator=dataclasses.replace(TINY.discriminator, group=2),
    )
    learner = Learner(preset, load_clip("emoji"), torch.device("cpu"), torch.float32, batch=4)
    for network in (learner.generator, learner.discriminator):
        moved(network, by=0.05)
    for optimizer in (learner.optimizer_g, learner.optimizer_d):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    learner.learn_at([4, 8])
    return learner


def batches(count, size):
    source = Figures(32)
    return [next(source.batches(range(i, 99), size, 0, 1)) for i in range(count)]


@pytest.mark.parametrize("top", [8, 32])
def test_the_active_resolutions_learn_and_no_others(learner, top):
    learner.learn_at([r for r in learner.resolutions if r <= top])
    learner.step(0, learner.prepare(0, 0, batches(1, 4)))
    networks = {"g": learner.generator, "d": learner.discriminator}
    parameters = {f"{kind}.{name}": p for kind, net in networks.items() for name, p in net.named_parameters()}
    learning = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    silent = {name for name, p in parameters.items() if p.grad is None}
    for i, r in enumerate(learner.resolutions):
        for place in (f"g.synthesis.levels.{i}.", f"d.stages.{r}.", f"d.heads.{r}."):
            its = {name for name in parameters if name.startswith(place)}
            assert its & learning if r <= top else its <= silent, place
    for name, parameter in parameters.items():
        assert not (parameter.requires_grad and name in silent), name  # DDP would wait for it
    learner.learn_at([4, 8])


@pytest.mark.parametrize(("number", "recompute"), [(16, True), (1, False)])
def test_a_step_has_the_gradients_of_its_objectives(learner, monkeypatch, number, recompute):
    """Their mean over two parts of a batch. R1 counts for 16 steps, and takes about half of a part, in whole groups, if
    levels run again.
    """
    monkeypatch.setattr(learner, "batch", 12)
    monkeypatch.setattr(learner, "recipe", dataclasses.replace(learner.recipe, recompute=recompute))
    parts = learner.prepare(0, number, batches(2, 6))
    report = learner.step(number, parts)
    d, clip, recipe, of_generator, of_discriminator, r1 = learner.discriminator, learner.clip, learner.recipe, 0, 0, 0
    scales = scale_weights([4, 8], recipe.lower_scales)
    for part in parts:
        output, captions = learner.draw(part), (part.text, part.wrong)
        fake = {r: image.detach() for r, image in output.pyramid.items()}
        of_discriminator += DiscriminatorLoss(d, clip, recipe)(part.real, fake, *captions, part.chances)["loss"] / 2
        of_generator += generator_loss(output, *captions, part.chances[:, 1], d, clip, recipe)["loss"] / 2
        real = augment(part.real, recipe.augment, part.chances[:, 0])
        r1 += r1_penalty(d, clip, real, *part.text[:2], recipe.r1_gamma, scales) / 2
    assert ("r1" in report) == (number % 16 == 0)
    if "r1" in report:
        torch.testing.assert_close(report["r1"], r1.detach())
        of_discriminator += 16 * r1
    for network, loss in ((learner.generator, of_generator), (d, of_discriminator)):
        learning = [p for p in network.parameters() if p.requires_grad]
        expected = torch.autograd.grad(loss, learning)
        largest = max(gradient.abs().max() for gradient in expected)
        for parameter, gradient in zip(learning, expected, strict=True):
            error = (parameter.grad - gradient).abs().max()
            assert error <= min(1e-5 * largest, 2e-4 * gradient.abs().max())


def test_the_mean_of_w_is_that_of_all_parts(learner):
    parts, before = learner.prepare(0, 1, batches(2, 2)), learner.generator.w_avg.clone()
    w = torch.cat([learner.draw(part).w for part in parts]).detach()
    learner.step(1, parts)
    torch.testing.assert_close(learner.generator.w_avg, before.lerp(w.mean(0), 0.005))
    moved_to = learner.generator.w_avg.clone()
    learner.generator.update_w_avg(torch.full_like(w[0], torch.nan))
    assert torch.equal(learner.generator.w_avg, moved_to), "what is not finite moves nothing"


def test_a_loaded_state_is_not_trained_by_a_graph_recorded_before(learner):
    state = learner.state_dict()
    assert learner.updater and "updater" in vars(learner)
    learner.load_state_dict(state)
    assert "updater" not in vars(learner)


def test_the_least_share_is_that_of_the_expert_with_the_fewest_points():
    index = torch.tensor([[0, 0, 0, 1, 1, 2]])  # of four experts: 3, 2, 1 and 0 points
    some, all_used = (Routing(torch.zeros(1, 6, number), index, torch.ones(1, 6)) for number in (4, 3))
    w = torch.zeros(1, 8)
    assert step_module.least_share(SimpleNamespace(w=w, routings={"8.0.0": all_used})) == 0.5  # of a mean of 2
    assert step_module.least_share(SimpleNamespace(w=w, routings={"8.0.0": all_used, "8.1.0": some})) == 0
    assert step_module.least_share(SimpleNamespace(w=w, routings={})) == 1


def test_every_image_of_every_step_has_noise_of_its_own(learner):
    whole = learner.prepare(7, 3, batches(1, 4))[0]
    assert len(whole.z.unique(dim=0)) == len(whole.chances.unique(dim=0)) == 4
    for number, seed in ((4, 7), (3, 8)):
        assert not torch.equal(learner.prepare(seed, number, batches(1, 4))[0].z, whole.z)


@pytest.mark.parametrize("number", [2, 10**6], ids=["at the beginning", "later"])
def test_the_moving_average_is_its_formula(learner, monkeypatch, number):
    """Its half-life is a twentieth of the images seen at first. The mean of w is one over all ranks."""
    overall, w_avg = torch.randn(learner.ema.config.w_dim), learner.generator.w_avg.double()
    monkeypatch.setattr(distributed, "mean", lambda w: overall)
    for parameter in learner.generator.parameters():
        parameter.data += 1  # else one that did not change would follow by standing still
    before = {name: parameter.double() for name, parameter in learner.ema.named_parameters()}
    learner.update_ema(number, torch.zeros_like(overall))
    decay = 0.5 ** (4 / (0.05 * 3 * 4 if number == 2 else learner.recipe.ema_half_life))
    for name, parameter in learner.generator.named_parameters():
        expected = decay * before[name] + (1 - decay) * parameter.double()
        torch.testing.assert_close(learner.ema.get_parameter(name).double(), expected, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(learner.generator.w_avg.double(), 0.995 * w_avg + 0.005 * overall.double())
    assert torch.equal(learner.ema.w_avg, learner.generator.w_avg)


def test_adam_is_gigagans(learner):
    """Without momentum (section 5 there: β₁ = 0, β₂ = 0.99)."""
    for optimizer in (learner.optimizer_g, learner.optimizer_d):
        assert all(group["betas"] == (0.0, 0.99) for group in optimizer.param_groups)
