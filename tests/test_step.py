"""One step's parts: who learns, what noise and gradients the parts of a batch get, and the moving average."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

import step as step_module
from clip import load_clip
from common import distributed
from losses import r1_penalty, scale_weights
from router import Routing
from step import OPTIMIZERS, Learner
from tests.figures import TINY, Figures, moved

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def learner():
    """With every weight moved, and rates of zero, so that steps leave gradients and change nothing."""
    torch.manual_seed(0)
    learner = Learner(TINY, load_clip("emoji"), CPU, torch.float32, batch=4)
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


def gradients(learner, parts, number=0):
    learner.step(number, parts)
    networks = {"g": learner.generator, "d": learner.discriminator}
    return {f"{kind}.{name}": p.grad for kind, net in networks.items() for name, p in net.named_parameters()}


@pytest.mark.parametrize("top", [4, 8, 32])
def test_the_active_resolutions_learn_and_no_others(learner, top):
    learner.learn_at([r for r in learner.resolutions if r <= top])
    found = gradients(learner, learner.prepare(0, 0, batches(1, 4)))
    learning = {name for name, gradient in found.items() if gradient is not None and gradient.any()}
    silent = {name for name, gradient in found.items() if gradient is None}
    for i, r in enumerate(learner.resolutions):
        for place in (f"g.synthesis.levels.{i}.", f"d.stages.{r}.", f"d.heads.{r}."):
            its = {name for name in found if name.startswith(place)}
            assert its & learning if r <= top else its <= silent, place
    for kind, network in (("g", learner.generator), ("d", learner.discriminator)):
        for name, parameter in network.named_parameters():
            assert not (parameter.requires_grad and f"{kind}.{name}" in silent), name  # DDP would wait for it
    learner.learn_at([4, 8])


@pytest.mark.parametrize("number", [0, 1])
def test_the_gradient_of_a_batch_in_parts_is_the_mean_of_theirs(learner, number):
    parts = learner.prepare(0, number, batches(2, 2))
    whole = gradients(learner, parts, number)
    for name, gradient in whole.items():
        whole[name] = gradient if gradient is None else gradient.clone()
    each = []
    for part in parts:
        found = gradients(learner, [part], number)
        each.append({name: g if g is None else g.clone() for name, g in found.items()})
    for name, gradient in whole.items():
        if gradient is not None:
            mean = (each[0][name] + each[1][name]) / 2
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max() + 1e-6))


def test_r1_stands_for_the_steps_without_it(learner, monkeypatch):
    penalize, stands_for = learner.penalize, []
    monkeypatch.setattr(learner, "penalize", lambda parts, interval: stands_for.append(interval) or penalize(parts, 1))
    reports = [learner.step(number, learner.prepare(0, number, batches(1, 4))) for number in (0, 1, 16)]
    assert stands_for == [16, 16] and ["r1" in report for report in reports] == [True, False, True]


@pytest.mark.parametrize(("recompute", "size"), [(False, 4), (True, 2)])
def test_r1_in_halves_has_the_gradients_of_the_whole(learner, recompute, size, monkeypatch):
    """Over two parts of a batch; it counts for 16 steps."""
    sizes = []
    monkeypatch.setattr(step_module, "r1_penalty", lambda *x: sizes.append(len(x[4])) or r1_penalty(*x))
    monkeypatch.setattr(learner, "recipe", dataclasses.replace(learner.recipe, recompute=recompute))
    parts = learner.prepare(0, 0, batches(2, 4))
    learner.optimizer_d.zero_grad(set_to_none=True)
    value = learner.penalize(parts, 16)
    assert sizes == 8 // size * [size]
    scales, gamma = scale_weights([4, 8], learner.recipe.lower_scales), learner.recipe.r1_gamma
    each = [r1_penalty(learner.discriminator, learner.clip, p.real, *p.text[:2], gamma, scales) for p in parts]
    torch.testing.assert_close(value, sum(each).detach() / 2)
    learning = [p for p in learner.discriminator.parameters() if p.requires_grad]
    expected = torch.autograd.grad(16 * sum(each) / 2, learning, allow_unused=True)
    largest = max(gradient.abs().max() for gradient in expected if gradient is not None)
    for parameter, gradient in zip(learning, expected, strict=True):
        assert parameter.grad is gradient is None or (parameter.grad - gradient).abs().max() <= 1e-5 * largest


def test_real_and_fake_images_are_augmented_by_chances_of_their_own(learner, monkeypatch):
    of_real, of_fake = [], []
    loss, augment = step_module.generator_loss, step_module.augment
    monkeypatch.setattr(step_module, "generator_loss", lambda *x, **named: of_fake.append(x[3]) or loss(*x, **named))
    monkeypatch.setattr(step_module, "augment", lambda *x: of_real.append(x[2]) or augment(*x))  # for R1
    (part,) = learner.prepare(0, 0, batches(1, 4))
    learner.step(0, [part])
    assert not torch.equal(part.chances[:, 0], part.chances[:, 1])
    assert torch.equal(of_real[0], part.chances[:, 0]) and torch.equal(of_fake[0], part.chances[:, 1])


def test_the_mean_of_w_is_that_of_all_parts(learner):
    parts, before = learner.prepare(0, 1, batches(2, 2)), learner.generator.w_avg.clone()
    w = torch.cat([learner.draw(part).w for part in parts]).detach()
    learner.step(1, parts)
    torch.testing.assert_close(learner.generator.w_avg, before.lerp(w.mean(0), 0.005))
    moved_to = learner.generator.w_avg.clone()
    learner.generator.update_w_avg(torch.full_like(w[0], torch.nan))
    assert torch.equal(learner.generator.w_avg, moved_to), "what is not finite moves nothing"


def test_one_rank_that_torchrun_started_records_its_steps(learner, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(learner, "device", torch.device("cuda", 0))
        patch.setattr(step_module, "Graphed", lambda function, variants: ("recorded", variants))
        learner.learn_at([4, 8])
        assert learner.updater == ("recorded", (0, 16))
        for module, name, value in ((step_module, "routed_experts", None), (distributed, "world_size", lambda: 2)):
            with monkeypatch.context() as without:
                without.setattr(module, name, value)
                without.setattr(learner, "parallel", lambda module: module)
                learner.learn_at([4, 8])
                assert learner.updater == learner.update_networks
    learner.learn_at([4, 8])


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


class Wrapper:
    """In the place of DDP, which holds its buckets in cycles."""

    def __init__(self, module):
        self.module, self.itself = module, self


def test_former_wrappers_are_gone_before_the_next_are_built(learner, monkeypatch):
    wrappers, alive = [], []

    def parallel(module):
        alive.append(sum(wrapper() is not None for wrapper in wrappers))
        wrapper = Wrapper(module)
        wrappers.append(weakref.ref(wrapper))
        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(learner, "parallel", parallel)
        for active in ([4], [4, 8]):
            learner.learn_at(active)
            assert learner.parallel_generator.module and learner.discriminator_loss.module
    learner.learn_at([4, 8])
    assert alive == [0, 1, 0, 1]


def test_every_image_of_a_step_has_noise_of_its_own_however_the_batch_is_divided(learner, monkeypatch):
    whole = learner.prepare(7, 3, batches(1, 4))[0]
    assert len(whole.z.unique(dim=0)) == 4 and whole.chances.shape[0] == 4
    for number, seed in ((4, 7), (3, 8)):
        assert not torch.equal(learner.prepare(seed, number, batches(1, 4))[0].z, whole.z)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda ids: torch.cat([ids, ids]))
    z, chances = [], []
    for part in range(2):  # of one image on each of two ranks
        for rank in range(2):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            mine = learner.prepare(7, 3, batches(2, 1))[part]
            z.append(mine.z)
            chances.append(mine.chances)
    assert torch.equal(torch.cat(z), whole.z) and torch.equal(torch.cat(chances), whole.chances)


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


def test_a_state_of_an_earlier_version_is_loaded_without_its_last_gradient(learner):
    """If β₁ = 0, no step reads it."""
    learner.step(1, learner.prepare(0, 1, batches(1, 4)))
    state = learner.state_dict()
    for name in OPTIMIZERS:
        for of_parameter in state[name]["state"].values():
            del of_parameter["exp_avg"]
    learner.load_state_dict(state)
    assert all("exp_avg" in its for its in learner.optimizer_g.state.values())
