"""What can be measured on the emoji alone: whether held-out pairs are drawn right, and whether the style is left open.

data/make_emoji.py says what is held out, and writes the captions. The plain name comes first; a caption that names the
style ends with it, as "boy, dark skin tone, fluent style".
"""

import itertools
import re

import torch
import torch.nn.functional as F

from common import distributed
from evaluation.features import BATCH, embed, extract, extract_generated, gather, real_pixels
from evaluation.metrics import own_caption_first

STYLE = re.compile(r", (\w+) style$")
TONE = re.compile(r" skin tone\b")
SEEDS = 8  # images of each name, of which the styles are counted
TRAINING_SHARE = 0.8  # of the names, for the classifier of style
WEIGHT_DECAY = 1e-2


def extract_examples(source, held_out, label_of, resolution, extractors):
    """Features of all examples of which label_of(captions) is not None → labels, {extractor: features [N, D]}."""
    labels = []

    def batches():
        examples = source.examples(held_out, distributed.rank(), distributed.world_size())
        labelled = ((image, label) for image, captions in examples if (label := label_of(captions)) is not None)
        while some := list(itertools.islice(labelled, BATCH)):
            images, new = zip(*some, strict=True)
            labels.extend(new)
            yield real_pixels(torch.stack(images), resolution)

    return gather(labels, extract(batches(), extractors))


# ----------------------------------------------------------------------------------------------------------------------
# Held-out pairs.


def held_out_r_precision(generator, clip, source, psi, seed, resolution, reader):
    """The R-precision of the held-out pairs: {kind: (of generated images, of the real ones, number of pairs)}.

    kind: "tone", "style", or "all". reader: the Extractor that embeds images and captions. The captions name the style,
    as a pair held out in its style is new only in that. The 99 others are captions of held-out pairs too.
    """
    captions, real = extract_examples(source, True, styled_caption, resolution, {"reader": reader})
    fake = extract_generated(generator, clip, captions, psi, seed, resolution, {"reader": reader})
    texts = embed(reader, captions)
    hits = [own_caption_first(side["reader"], texts, captions).double() for side in (fake, real)]
    tone = torch.tensor([bool(TONE.search(caption)) for caption in captions])
    kinds = {"tone": tone, "style": ~tone, "all": torch.ones_like(tone)}
    return {kind: (*(hit[of].mean().item() for hit in hits), of.sum().item()) for kind, of in kinds.items()}


def styled_caption(captions):
    """The first caption that names the style."""
    return next(filter(STYLE.search, captions))


# ----------------------------------------------------------------------------------------------------------------------
# Styles over seeds.


def styles_over_seeds(generator, clip, source, psi, seed, resolution, count, extractor):
    """How many styles appear in SEEDS images of a name alone, for up to count/SEEDS names, by a classifier of style.

    → {"two styles": the share of names with two or more, "by mistake": the share that would seem to have two if all
    images had one, "accuracy": of the classifier on real images, "names": their number}. The classifier is trained on
    real images of other names, in the extractor's features at this resolution.
    """
    accuracy, classify, names = train_classifier(source, resolution, extractor)
    names = names[: max(1, count // SEEDS)]
    captions = [name for name in names for _ in range(SEEDS)]
    fake = extract_generated(generator, clip, captions, psi, seed, resolution, {"styles": extractor})
    return {
        "two styles": share_with_two(classify(fake["styles"]).unflatten(0, (-1, SEEDS))),
        "by mistake": 1 - accuracy**SEEDS,
        "accuracy": accuracy,
        "names": len(names),
    }


def share_with_two(styles):
    """The share of rows of integers [N, SEEDS] that hold two different ones or more."""
    return (styles != styles[:, :1]).any(1).double().mean().item()


def train_classifier(source, resolution, extractor):
    """A classifier of the style of an emoji without skin tone, trained on TRAINING_SHARE of the names.

    → its accuracy on real images of the other names, the function from features [N, D] to styles [N] as integers, and
    those of the other names that training shows in all styles.
    """
    labels, features = extract_examples(source, False, name_and_style, resolution, {"styles": extractor})
    features, names = features["styles"], sorted({name for name, _ in labels})
    styles = sorted({style for _, style in labels})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    trained_on = {names[i] for i in order[: round(TRAINING_SHARE * len(names))]}
    training = torch.tensor([name in trained_on for name, _ in labels])
    targets = torch.tensor([styles.index(style) for _, style in labels])
    classify = logistic_regression(features[training], targets[training])
    accuracy = (classify(features[~training]) == targets[~training]).double().mean().item()
    seen = set(labels)
    others = [names[i] for i in order if names[i] not in trained_on]
    return accuracy, classify, [name for name in others if all((name, style) in seen for style in styles)]


def name_and_style(captions):
    """An emoji's captions → its name and style; None if it has a skin tone."""
    return None if TONE.search(captions[0]) else (captions[0], STYLE.search(captions[-1])[1])


def logistic_regression(features, targets):
    """Multinomial logistic regression of targets [N] on standardized features [N, D] → the function that classifies."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    layer = torch.nn.Linear(features.shape[1], int(targets.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    inputs = (features - mean) / std
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(inputs), targets) + WEIGHT_DECAY * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    return lambda features: layer((features - mean) / std).argmax(1)
