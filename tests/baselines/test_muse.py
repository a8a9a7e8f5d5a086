"""Muse's formulas: the codebook, masking, guidance, decoding; and its training."""

import copy
import itertools
import math

import pytest
import torch

from baselines import muse
from baselines.muse import MASK, Codebook, Muse, Transformer, fill, guided_logits, keep_certain, mask_randomly
from clip import Text, load_clip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_text(batch, eot=3, seed=0):
    tokens = torch.randn(batch, 6, 8, generator=seeded(seed))
    return Text(tokens, torch.full((batch,), eot), torch.zeros(batch, 4))


class Recorder:
    """A transformer with the same logits [side, side, K] for every image. It records the tokens it sees."""

    def __init__(self, logits):
        self.logits, self.seen = logits, []

    def __call__(self, tokens, text):
        self.seen.append(tokens)
        return self.logits.expand(len(tokens), *self.logits.shape)


def small_transformer():
    """Four by four tokens of 10 codes."""
    torch.manual_seed(0)
    return Transformer(4, 8, num_codes=10, dim=16, num_layers=2, num_heads=2)


def test_nearest_code_is_the_naive_argmin():
    torch.manual_seed(0)
    codebook, z = Codebook(50, 6), torch.randn(7, 3, 6)
    distances = (z.double()[:, :, None] - codebook.codes.double()).square().sum(-1)
    assert torch.equal(codebook.nearest(z), distances.argmin(-1))


def test_straight_through_gradient():
    """The encoder gets the decoder's gradient plus that of the commitment, .25·2·(z − e)/numel."""
    torch.manual_seed(0)
    codebook = Codebook(20, 4).double()
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(z)
    quantized, tokens, loss = codebook(z)
    codes = codebook.codes[tokens].movedim(-1, 1)
    torch.testing.assert_close(quantized, codes)
    (quantized * upstream).sum().add(loss).backward()
    residual = (z - codes).detach()
    torch.testing.assert_close(z.grad, upstream + 0.25 * 2 * residual / z.numel())

    expected = torch.zeros_like(codebook.codes)  # a code gets that of its vectors, and none from the decoder
    expected.index_add_(0, tokens.flatten(), (-2 * residual / z.numel()).movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(codebook.codes.grad, expected)


def test_dead_codes_move_to_vectors_and_used_ones_stay():
    torch.manual_seed(0)
    codebook = Codebook(8, 3)
    codes = codebook.codes.detach().clone()
    z = codes[:2].T.reshape(1, 3, 1, 2).repeat(1, 1, 4, 1) + 0.01 * torch.randn(1, 3, 4, 2)  # near codes 0 and 1
    tokens = codebook.nearest(z.movedim(1, -1))
    assert set(tokens.flatten().tolist()) == {0, 1}
    codebook.restart(z, tokens, seeded())
    assert torch.equal(codebook.codes[:2], codes[:2])
    points = z.movedim(1, -1).flatten(0, -2)
    assert all((points == code).all(1).any() for code in codebook.codes[2:])


def test_mean_share_masked_is_two_over_pi():
    """E[cos(π/2·u)] = 2/π, and its variance ½ − 4/π²; the count is rounded up, by half a token in the mean."""
    draws, side = 4000, 32
    shown = mask_randomly(torch.zeros(draws, side, side, dtype=torch.long), seeded())
    share = (shown == MASK).double().mean((1, 2))
    error = math.sqrt((1 / 2 - 4 / math.pi**2) / draws)
    assert abs(share.mean() - 2 / math.pi - 0.5 / side**2) < 4 * error
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)  # P(r < x) = 1 − 2/π·arccos x
    torch.testing.assert_close(share.quantile(quantiles), torch.cos(math.pi / 2 * (1 - quantiles)), atol=0.03, rtol=0)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_only_masked_tokens_count(monkeypatch, drop):
    """The loss is the mean of −log p over the masked tokens. drop: the text becomes zeros."""
    monkeypatch.setattr(muse, "TEXT_DROP", drop)
    torch.manual_seed(0)
    system = Muse(load_clip("emoji"), 16, "cpu")
    images, text = torch.rand(4, 3, 16, 16) * 2 - 1, system.clip.read(["cat"] * 4)
    tokens = system.networks.vqgan.encode(images)
    shown = mask_randomly(tokens, seeded(5))
    read = text._replace(tokens=(1 - drop) * text.tokens)
    log_p = system.networks.transformer(shown, read).double().log_softmax(-1)
    masked = [tuple(place) for place in (shown == MASK).nonzero().tolist()]
    expected = torch.stack([-log_p[place][tokens[place]] for place in masked]).mean()
    report = system.train_transformer(images, text, seeded(5), 0)
    torch.testing.assert_close(report["transformer_loss"].double(), expected, atol=1e-5, rtol=1e-5)
    assert report["masked"] == pytest.approx(len(masked) / tokens.numel())


def test_padding_after_the_end_of_a_text_is_not_read():
    network, tokens, text = small_transformer(), torch.full((2, 4, 4), MASK), some_text(2)
    padded, other = (text._replace(tokens=text.tokens.clone()) for _ in range(2))
    padded.tokens[:, 4:] += 1
    other.tokens[:, 3] += 1
    assert torch.equal(network(tokens, padded), network(tokens, text))
    assert not torch.allclose(network(tokens, other), network(tokens, text))


def test_guidance_at_its_ends_and_between():
    network, tokens, text = small_transformer(), torch.full((2, 4, 4), MASK), some_text(2)
    wanted = network(tokens, text)
    unwanted = network(tokens, text._replace(tokens=torch.zeros_like(text.tokens)))
    torch.testing.assert_close(guided_logits(network, tokens, text, 0), wanted)
    torch.testing.assert_close(guided_logits(network, tokens, text, 2.5), 3.5 * wanted - 2.5 * unwanted)


@pytest.mark.parametrize(("steps", "expected"), [(1, [3.0]), (2, [0.0, 3.0]), (5, [0.0, 0.75, 1.5, 2.25, 3.0])])
def test_guidance_rises_linearly(monkeypatch, steps, expected):
    scales = []
    monkeypatch.setattr(muse, "guided_logits", lambda *args: scales.append(args[-1]) or torch.zeros(1, 4, 4, 10))
    fill(None, torch.full((1, 4, 4), MASK), some_text(1), seeded(), steps=steps, guidance=3.0)
    assert scales == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 8, 24])
def test_masked_counts_at_every_step(steps):
    """N₀·cos(π/2·i/T), rounded down, with another N₀ in each image: all tokens, a part, one, none."""
    side, unknown = 8, [64, 37, 1, 0]
    tokens = torch.arange(64).repeat(4, 1) % 7
    for row, count in zip(tokens, unknown, strict=True):
        row[torch.randperm(64, generator=seeded(count))[:count]] = MASK
    network, tokens = Recorder(torch.randn(side, side, 7, generator=seeded())), tokens.view(4, side, side)
    filled = fill(network, tokens, some_text(4), seeded(), steps=steps)
    states = [*network.seen[::2], filled]  # each is seen twice, with and without the text
    counts = [(state == MASK).sum((1, 2)).tolist() for state in states]
    shares = [math.cos(math.pi / 2 * i / steps) + 1e-9 for i in range(steps + 1)]
    assert counts == [[math.floor(n * share) for n in unknown] for share in shares]
    for before, after in itertools.pairwise([tokens, *states]):
        assert torch.equal(after[before != MASK], before[before != MASK])  # known tokens never change


def test_least_certain_are_masked_again():
    tokens = torch.tensor([[[MASK, 5], [MASK, MASK]]])
    confidence = torch.tensor([[[-1.0, -9.0], [-3.0, -2.0]]])  # the known token's does not count
    kept = keep_certain(tokens, torch.full_like(tokens, 8), confidence, torch.tensor([2]))
    assert kept.tolist() == [[[8, 5], [MASK, MASK]]]


def test_tokens_are_drawn_by_their_probability():
    """One step without guidance draws from softmax(ℓ): frequencies over 10,000 tokens, within four errors."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    network = Recorder(logits.expand(100, 100, 4))
    drawn = fill(network, torch.full((1, 100, 100), MASK), some_text(1), seeded(), steps=1)
    share, expected = drawn.flatten().bincount(minlength=4) / drawn.numel(), logits.softmax(0)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / drawn.numel()).sqrt()).all()


def test_confidence_noise_is_annealed(monkeypatch):
    """If all tokens are equally certain, confidence deviates by τ(1 − i/T) times Gumbel's deviation, π/√6."""
    spreads, keep = [], muse.keep_certain
    monkeypatch.setattr(muse, "keep_certain", lambda *args: spreads.append(args[2].std()) or keep(*args))
    fill(Recorder(torch.zeros(64, 64, 4)), torch.full((1, 64, 64), MASK), some_text(1), seeded(), steps=4)
    expected = torch.tensor([muse.TEMPERATURE * (1 - i / 4) * math.pi / math.sqrt(6) for i in (1, 2, 3, 4)])
    torch.testing.assert_close(torch.stack(spreads), expected, rtol=0.06, atol=1e-6)


def test_the_vqgan_is_frozen_while_the_transformer_learns(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(muse, "TOKENIZER_IMAGES", 8)
    system, images = Muse(load_clip("emoji"), 16, "cpu"), torch.rand(8, 3, 16, 16) * 2 - 1
    text, networks = system.clip.read(["red heart", "cat"] * 4), system.networks
    for number in range(2):
        before = copy.deepcopy(networks).state_dict()
        system.step(number, images, text, seeded(number))
        changed = {name.split(".")[0] for name, x in networks.state_dict().items() if not torch.equal(x, before[name])}
        assert changed == ({"vqgan", "discriminator"}, {"transformer", "ema"})[number]
    weight = 1 - 0.5 ** (8 / (0.05 * 8))  # after 8 images of the transformer
    expected = before["ema.norm.weight"].lerp(networks.transformer.norm.weight.detach(), weight)
    torch.testing.assert_close(networks.ema.norm.weight, expected)
