"""The frozen CLIP: token features for the networks, embeddings for the CLIP loss and for the FID.

Any model of open_clip's CLIP class serves, by name and weights. So that nothing needs downloading there is also a small
one in the same class, models/clip.safetensors, trained on the built-in scenes by `python clip.py`; its words are those
of their captions.
"""

import argparse
import itertools
import json
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import shapes
from errors import HelpFormatter, UserError, first_line, natural_number, told_in_one_line
from layers import full_precision

SMALL = dict(
    embed_dim=64,
    quick_gelu=True,
    vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=16, head_width=64),  # CLIP's ResNet sees shapes early
    text_cfg=dict(context_length=24, width=128, heads=4, layers=2),
)
SMALL_PATH = Path(__file__).parent / "models" / "clip.safetensors"
UNKNOWN = 0.03  # share of the words of the captions it is trained on
NUM_MAPS = 4  # feature maps of the images that the discriminator looks at
RESOLUTIONS = (4, 8, 8, 16, 16, 32, 32, 32)  # of the pictures it is trained on, an eighth of a batch each
SPECIAL = re.compile(r"<(start|end)_of_text>")  # would end the text early


@dataclass(frozen=True)
class Course:
    """A part of the small CLIP's training, and a cycle of its learning rate."""

    steps: int
    lr: float
    order: tuple[int, int]  # from which step to which it is about who stands where, and about nothing else
    named: tuple[str, ...]  # what scenes of two objects differ in then
    of_two: tuple[str, ...]  # what their twins may differ in before and after
    misled: tuple[float, float]  # how far images are misled after that, at first and at last, see mislead()


COURSES = (
    Course(3200, 2e-3, (1408, 1984), ("relation",), ("relation",) * 36 + ("number",) * 6, (0, 0.15)),
    Course(560, 2e-3, (0, 160), ("relation", "axis"), shapes.OF_TWO, (0.15, 0.15)),
)


class Text(NamedTuple):
    """What CLIP says about a batch of captions."""

    tokens: torch.Tensor  # [B, T, width] features of every token, after the last norm
    eot: torch.Tensor  # [B] index of the end-of-text token
    embedding: torch.Tensor  # [B, D], of unit length


class FrozenClip(nn.Module):
    """A CLIP whose weights never change; gradients pass through it to the images.

    model: an open_clip.CLIP or one of its kind. name: how to get it again, "MODEL:WEIGHTS", or "small".
    kept_ids: for the small one, the token ids its vocabulary holds, sorted; all others share row 0, the unknown word.
    """

    def __init__(self, model, name, kept_ids=None):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.kept_ids = kept_ids
        self.context_length = model.positional_embedding.shape[0]
        self.width = model.positional_embedding.shape[1]
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)

    def train(self, mode=True):
        """Stays in eval mode, as part of a network in training too."""
        return super().train(False)

    @property
    def device(self):
        return self.model.positional_embedding.device

    def tokenize(self, captions):
        """Captions → token ids [B, context_length], overlong ones cut. Safe on any text, e.g. with emoji."""
        ids = self.tokenizer([SPECIAL.sub(" ", caption) for caption in captions])
        if self.kept_ids is not None:
            row = torch.zeros(self.tokenizer.vocab_size, dtype=torch.long)
            row[self.kept_ids] = torch.arange(1, len(self.kept_ids) + 1)
            ids = row[ids]  # the order is kept, so the end of the text still has the largest number
        return ids.to(self.device)

    def unknown_words(self, caption):
        """The words of a caption that this CLIP has never seen, in order."""
        if self.kept_ids is None:
            return []
        kept, words = set(self.kept_ids), SPECIAL.sub(" ", caption).lower().split()
        return [word for word in dict.fromkeys(words) if not kept.issuperset(self.tokenizer.encode(word))]

    def num_tokens_cut(self, caption):
        """How many tokens of a caption do not fit between the start and the end of the text."""
        return max(0, len(self.tokenizer.encode(SPECIAL.sub(" ", caption))) + 2 - self.context_length)

    @torch.no_grad()  # not inference_mode: these enter a training graph
    def encode_text(self, ids):
        """Token ids [B, T] → Text."""
        m = self.model
        x = m.token_embedding(ids) + m.positional_embedding
        tokens = full_precision(m.ln_final(m.transformer(x, attn_mask=m.attn_mask)))
        eot = ids.argmax(-1)
        embedding = tokens[torch.arange(len(ids), device=ids.device), eot] @ m.text_projection
        return Text(tokens, eot, F.normalize(embedding, dim=-1))

    def encode_image(self, *images):
        """Images [B, 3, R, R] in [−1, 1], also several batches of different R → embeddings [B, D] of all in a row."""
        return self.see(*images)[0]

    def see(self, *images):
        """As encode_image, → the embeddings and four feature maps [B, C, side, side], from shallow to deep."""
        images = torch.cat([self.preprocess(batch) for batch in images])
        seen = self.model.forward_intermediates(images, image_indices=_map_blocks(self.model.visual), normalize=False)
        return seen["image_features"], seen["image_intermediates"]

    def preprocess(self, images):
        """Images [B, 3, R, R] in [−1, 1], resized and normalized as this CLIP expects."""
        visual = self.model.visual
        images = F.interpolate((images + 1) / 2, visual.image_size, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(t, device=images.device).view(3, 1, 1) for t in _normalization(visual))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

    @property
    def map_shapes(self):
        """The (C, side) of each of the feature maps."""
        side = self.model.visual.image_size
        side = side[0] if isinstance(side, tuple) else side
        maps = self.see(self.model.positional_embedding.new_zeros(1, 3, side, side))[1]
        return tuple((x.shape[1], x.shape[2]) for x in maps)

    @property
    def logit_scale(self):
        return self.model.logit_scale.exp()


def _map_blocks(visual):
    """Which blocks the feature maps come from, as open_clip wants it: a quarter of a ViT each; else the last stages."""
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        return NUM_MAPS
    depth = len(visual.transformer.resblocks)
    return [depth * part // NUM_MAPS - 1 for part in range(1, NUM_MAPS + 1)]


def _normalization(visual):
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    return mean, getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD


# ----------------------------------------------------------------------------------------------------------------------
# Getting one.


def load_clip(spec, device="cpu"):
    """ "small", the path of a small clip.safetensors, or "MODEL:WEIGHTS" of open_clip, WEIGHTS a tag or a file."""
    if spec == "small" or Path(spec).is_file():
        return fold_batch_norms(load_small(SMALL_PATH if spec == "small" else spec)).to(device)
    model = create(spec, "--clip")
    if not isinstance(model, open_clip.CLIP):
        raise UserError(f"--clip {spec}: only models of OpenAI's CLIP architecture serve, as ViT-L-14-quickgelu:openai")
    return fold_batch_norms(FrozenClip(model, spec)).to(device)


def create(spec, option):
    """ "MODEL:WEIGHTS", given by an option → open_clip's model of whatever class. Raises UserError."""
    model_name, _, weights = spec.partition(":")
    if model_name not in open_clip.list_models():
        raise UserError(f"{option} {spec}: neither a file nor MODEL:WEIGHTS of open_clip, as ViT-L-14-quickgelu:openai")
    if weights == "openai" and "quickgelu" not in model_name and f"{model_name}-quickgelu" in open_clip.list_models():
        raise UserError(f"{option} {spec}: OpenAI's weights use quick GELU; ask for {model_name}-quickgelu:openai")
    logging.disable()  # the hub says at length what the error below says once
    try:
        with warnings.catch_warnings(action="ignore"):
            model = open_clip.create_model(model_name, pretrained=weights or None, require_pretrained=True)
    except Exception as error:  # open_clip and the hub raise many kinds, all of them meaning that there are no weights
        reason = first_line(error)
        raise UserError(
            f"{option} {spec}: the weights cannot be had ({reason}). Download them where there is a network and pass "
            f"the file as {option} {model_name}:PATH, or use the built-in small CLIP: {option} small"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return model


def fold_batch_norms(clip):
    """The same CLIP, with the batch norms of a ResNet in the convolutions before them: half the time on a CPU."""
    for module in clip.model.visual.modules():
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    clip.model.visual.to(memory_format=torch.channels_last)
    return clip


def new_small(kept_ids):
    """A small CLIP with random weights and a row for each id in kept_ids, after the row of the unknown word."""
    text_cfg = {**SMALL["text_cfg"], "vocab_size": len(kept_ids) + 1}
    return FrozenClip(open_clip.CLIP(**{**SMALL, "text_cfg": text_cfg}), "small", kept_ids)


def vocabulary_ids():
    """The token ids that captions of the built-in scenes use, with padding, start and end of the text."""
    tokenizer = open_clip.SimpleTokenizer()
    ids = {i for word in shapes.vocabulary() for i in tokenizer.encode(word)}
    return sorted(ids | {0, tokenizer.sot_token_id, tokenizer.eot_token_id})


def train_small(device="cpu", courses=COURSES, batch=128, seed=0):
    """Trains the small CLIP on the built-in scenes with open_clip's own loss; the same seed gives the same weights.

    Every scene comes with its twin, whose caption differs in one thing, so that each word must be read and looked for:
    among random captions the colours alone would nearly do. Most images are smaller than it takes, since the
    networks ask about every resolution, and a few words are made unknown, so that the row of the unknown word means
    "some word". Which of two objects stands on the left is learned from batches of nothing else, all words known, or
    not at all. Then images are misled, more and more: from a CLIP not trained so, a generator learns to mislead it.
    The second course adds that left is not below; in one course with the rest, neither came to be known as well.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = new_small(vocabulary_ids()).to(device)
        clip.model.requires_grad_(True).train()
        first = 0
        progress = tqdm(total=sum(course.steps for course in courses), desc="training the small CLIP", unit="step")
        for course in courses:
            take(course, clip, first, batch, 3 * seed + 2, progress)
            first += course.steps * batch
    return FrozenClip(clip.model, "small", clip.kept_ids)


def take(course, clip, first, batch, seed, progress):
    """One course, its scenes those of the collection `seed` from the number `first` on."""
    model = clip.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.lr, total_steps=course.steps, pct_start=0.1)
    named = shapes.named_all_ways(seed, course.named)
    order_starts, order_ends = course.order
    for step in range(course.steps):
        about_order = order_starts <= step < order_ends
        if about_order:
            scenes = list(itertools.islice(named, batch))
        else:
            start = first + step * batch
            scenes = [shapes.scene_or_twin(i, seed, course.of_two) for i in range(start, start + batch)]
        share = batch // len(RESOLUTIONS)
        images = [shapes.draw(scenes[n * share : (n + 1) * share], r) for n, r in enumerate(RESOLUTIONS)]
        images = [part.to(clip.device) for part in images]
        ids = clip.tokenize([scene.caption for scene in scenes])
        unknown = torch.rand(ids.shape, device=clip.device) < (0 if about_order else UNKNOWN)
        ids[unknown & (ids > 1) & (ids < len(clip.kept_ids) - 1)] = 0
        text_features = model.encode_text(ids, normalize=True)
        if step >= order_ends:
            least, most = course.misled
            reach = least + (most - least) * (step - order_ends) / (course.steps - order_ends)
            images = mislead(clip, images, text_features.detach(), reach)
        loss = contrast(clip, images, text_features)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=4.6052)  # ln 100, as CLIP
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        progress.update()


def contrast(clip, images, text_features):
    """open_clip's own loss between captions and images, these as a list of batches of several sizes."""
    image_features = F.normalize(clip.encode_image(*images), dim=-1)
    return open_clip.ClipLoss()(image_features, text_features, clip.logit_scale)


def mislead(clip, images, text_features, reach):
    """The images, every pixel moved so that the captions fit less, by up to `reach` of a range of 2.

    One step along the sign of the gradient (Goodfellow et al. 2015). Networks trained on such images have gradients
    that change what people see, not noise that they alone see (Santurkar et al. 2019).
    """
    images = [part.detach().requires_grad_() for part in images]
    gradients = torch.autograd.grad(contrast(clip, images, text_features), images)
    amounts = [reach * torch.rand(len(part), 1, 1, 1, device=part.device) for part in images]
    return [(x + amount * g.sign()).detach() for x, amount, g in zip(images, amounts, gradients, strict=True)]


@torch.no_grad()
def twin_accuracy(clip, difference, resolution, count=500, seed=10**6):
    """How often a picture [resolution²] is nearer to its own caption than to that of its twin; 1/2 is chance."""
    rng = np.random.default_rng(seed)
    scenes = [shapes.scene(i, seed) for i in range(count)]
    pairs = [(a, shapes.twin(a, difference, rng)) for a in scenes if a.relation or difference in shapes.OF_ANY]
    scenes, twins = zip(*[(a, b) for a, b in pairs if a.caption != b.caption], strict=True)
    images = F.normalize(clip.encode_image(shapes.draw(scenes, resolution)), dim=-1)
    own, other = (clip.encode_text(clip.tokenize([s.caption for s in side])).embedding for side in (scenes, twins))
    return ((images * (own - other)).sum(1) > 0).float().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# The small one on disk.


def save_small(clip, path):
    """Writes a small CLIP as safetensors, its vocabulary in the metadata."""
    save_file(clip.model.state_dict(), path, {"kept_ids": json.dumps(clip.kept_ids)})


def load_small(path):
    """Reads what save_small wrote. Raises UserError on any other file."""
    try:
        with safe_open(path, "pt") as file:
            clip = new_small(json.loads(file.metadata()["kept_ids"]))
            clip.model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a small CLIP written by clip.py, or it is damaged") from error
    return clip


def main():
    parser = argparse.ArgumentParser(description="Trains the small CLIP again.", formatter_class=HelpFormatter)
    parser.add_argument("--seed", type=natural_number, default=0)
    parser.add_argument("--out", type=Path, default=SMALL_PATH)
    args = parser.parse_args()
    with told_in_one_line():
        if not args.out.parent.is_dir():
            raise UserError(f"--out {args.out}: there is no folder {args.out.parent}")
    clip = train_small(seed=args.seed)
    save_small(clip, args.out)
    for difference in dict.fromkeys([*shapes.OF_TWO, *shapes.OF_ANY]):
        accuracies = [f"{100 * twin_accuracy(clip, difference, r):5.1f} %" for r in sorted(set(RESOLUTIONS))]
        print(f"{difference:12s}", *accuracies)


if __name__ == "__main__":
    main()
