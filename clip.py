"""The frozen CLIP: token features for the networks, embeddings for the CLIP loss and for the FID.

Any model of open_clip's CLIP class serves, by name and weights. So that nothing needs downloading there are also small
ones of the same class, whose words are those of the captions they were trained on (training/small_clip.py).
"""

import itertools
import json
import logging
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.cli import UserError, first_line
from common.tokenizer import load_tokenizer
from layers import full_precision

SMALL = dict(
    embed_dim=64,
    quick_gelu=True,
    vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=16, head_width=64),  # CLIP's ResNet sees shapes early
    text_cfg=dict(context_length=24, width=128, heads=4, layers=2),
)
MODELS = Path(__file__).parent / "models"
BUILT_IN = {
    "small": MODELS / "clip.safetensors",
    "emoji": MODELS / "emoji_clip.safetensors",
    "judge": MODELS / "judge_clip.safetensors",  # No generator is trained against it.
}
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of its pixels
NUM_MAPS = 4  # The discriminator looks at so many feature maps of an image.
SPECIAL = re.compile(r"<(start|end)_of_text>")  # The tokenizer takes these for its own marks, so captions lose them.


class Text(NamedTuple):
    """What CLIP says about a batch of captions."""

    tokens: torch.Tensor  # [B, T, width] features of every token, after the last norm
    eot: torch.Tensor  # [B] index of the end-of-text token
    embedding: torch.Tensor  # [B, D], of unit length


class FrozenClip(nn.Module):
    """A CLIP whose weights never change; gradients pass through it to the images.

    model: an open_clip.CLIP, or another model with the same attributes. name: "small", or "MODEL:WEIGHTS", by which
    load_clip finds it again. kept_ids: of a small one, the sorted token ids that have rows in its embedding table, from
    row 1 on; all others share row 0, the unknown word. None: every id has its row.
    """

    def __init__(self, model, name, kept_ids=None):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.kept_ids = kept_ids
        self.context_length = model.positional_embedding.shape[0]
        self.width = model.positional_embedding.shape[1]
        self.tokenizer = load_tokenizer(self.context_length)
        mean = getattr(model.visual, "image_mean", None) or OPENAI_MEAN
        std = getattr(model.visual, "image_std", None) or OPENAI_STD
        for buffer, value in (("mean", mean), ("std", std)):  # of the pixels it was trained on
            self.register_buffer(buffer, torch.tensor(value).view(3, 1, 1), persistent=False)

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

    def read(self, captions):
        """Captions → Text."""
        return self.encode_text(self.tokenize(captions))

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
        images = F.interpolate((images + 1) / 2, self.model.visual.image_size, mode="bicubic", antialias=True)
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

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
    if not hasattr(visual, "transformer"):
        return NUM_MAPS
    depth = len(visual.transformer.resblocks)
    return [depth * part // NUM_MAPS - 1 for part in range(1, NUM_MAPS + 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Getting one.


def load_clip(spec, device="cpu"):
    """A name in BUILT_IN, a file of save_small, or "MODEL:WEIGHTS" of open_clip, WEIGHTS a tag or a file."""
    import open_clip  # not at the top: it takes two seconds, and sampling with our own files needs none of it

    path = BUILT_IN.get(spec, Path(spec))
    if path.is_file():
        return fold_batch_norms(load_small(path)).to(device)
    model = create(spec, "--clip")
    if not isinstance(model, open_clip.CLIP):
        raise UserError(f"--clip {spec}: only models of OpenAI's CLIP architecture serve, as ViT-L-14-quickgelu:openai")
    return fold_batch_norms(FrozenClip(model, spec)).to(device)


def create(spec, option):
    """ "MODEL:WEIGHTS", given by an option → open_clip's model of whatever class. Raises UserError."""
    import open_clip

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
    import open_clip

    text_cfg = {**SMALL["text_cfg"], "vocab_size": len(kept_ids) + 1}
    return FrozenClip(open_clip.CLIP(**{**SMALL, "text_cfg": text_cfg}), "small", kept_ids)


# ----------------------------------------------------------------------------------------------------------------------
# The small one on disk.


def save_small(clip, path):
    """Writes a small CLIP as safetensors, its vocabulary in the metadata."""
    save_file(clip.model.state_dict(), path, {"kept_ids": json.dumps(clip.kept_ids)})


def vocabulary_of(path):
    """The token ids that the small CLIP in a file knows."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["kept_ids"])


def load_small(path):
    """Reads what save_small wrote. Raises UserError on any other file."""
    try:
        clip = new_small(vocabulary_of(path))
        with safe_open(path, "pt") as file:
            clip.model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a small CLIP, as training/small_clip.py writes it, or it is damaged") from error
    return clip
