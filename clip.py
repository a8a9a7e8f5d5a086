"""What is frozen: the text encoder that reads captions, and the CLIP that says how well a picture fits one.

Large presets take both from a CLIP of open_clip. Small ones take all-MiniLM-L6-v2, a sentence encoder that reads any
English, and an image tower that was trained against it (training/small_clip.py), so that nothing needs downloading.
"""

import functools
import hashlib
import itertools
import logging
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import pad_sequence

from common.cli import UserError, first_line
from layers import float32_region, full_precision, rms_norm

# PyTorch reads this at its first dense layer. A ViT projects transposed tokens to q, k and v: without the flag by one
# product for each of 257 tokens, each with a copy of the weights; with it by a single product.
os.environ.setdefault("TORCH_LINEAR_FLATTEN_3D", "1")

MODELS = Path(__file__).parent / "models"
MINILM = MODELS / "minilm"
BUILT_IN = {
    "emoji": MODELS / "emoji_clip.safetensors",
    "judge": MODELS / "judge_clip.safetensors",  # No generator is trained against it.
}
SMALL_WIDTH = 128  # of a small CLIP's embeddings
SMALL_TOWER = dict(layers=[1, 1, 1, 1], output_dim=SMALL_WIDTH, heads=8, image_size=32, width=16)  # sees shapes early
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of its pixels
NUM_MAPS = 4  # The discriminator looks at so many feature maps of an image.


class Text(NamedTuple):
    """What a text encoder says about a batch of captions."""

    tokens: torch.Tensor  # [B, T, width] features of every token, after the last norm
    eot: torch.Tensor  # [B] index of the token that stands for the whole text, the last one of it
    embedding: torch.Tensor  # [B, D], of unit length


# ----------------------------------------------------------------------------------------------------------------------
# Text encoders. Each has a name, a width and a context length, and reads captions.


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 (Wang et al. 2020, trained on pairs of sentences by sentence-transformers): a BERT of 6 layers.

    The last token of a caption carries its sentence code, the mean over tokens, as the end of the text does in CLIP.
    Features have unit RMS as CLIP's have. What is beyond the end of a caption is zero.
    """

    name = "all-MiniLM-L6-v2"
    width = 384
    context_length = 32  # tokens; the model could read 512, and the networks would compute with all of them
    KEPT = 2**16  # captions that are remembered, as training meets the same ones again

    def __init__(self):
        super().__init__()
        # No nn.Embedding with random weights: on the meta device these import torch.compile, which takes two seconds.
        tables = (torch.empty(n, self.width) for n in (30522, 512, 2))
        self.words, self.positions, self.types = map(nn.Embedding.from_pretrained, tables)
        self.norm = nn.LayerNorm(self.width, 1e-12)
        layer = nn.TransformerEncoderLayer(self.width, 12, 4 * self.width, 0.0, "gelu", 1e-12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.eval().requires_grad_(False)
        self.known = {}  # caption: its Text, without padding

    @functools.cached_property
    def tokenizer(self):
        from tokenizers import Tokenizer  # here: a model without weights, as in a plan, reads nothing

        tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # a caption's own "[PAD]" is text
        tokenizer.enable_truncation(self.context_length)
        tokenizer.enable_padding(length=self.context_length)
        return tokenizer

    def train(self, mode=True):
        """Stays in eval mode, as part of a network in training too."""
        return super().train(False)

    def tokenize(self, captions):
        """Captions → token ids [B, context_length], zero beyond the end, overlong ones cut."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(captions))]
        return torch.tensor(ids, device=self.words.weight.device)

    def num_tokens_cut(self, caption):
        """How many tokens of a caption are left out."""
        return sum(len(more.ids) - more.ids.count(0) - 2 for more in self.tokenizer.encode(caption).overflowing)

    def encode(self, ids):
        """Token ids [B, T] → Text."""
        there = ids != 0
        length = there.sum(1)
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        x = self.layers(self.norm(x), src_key_padding_mask=~there) * there[..., None]
        embedding = F.normalize(x.sum(1), dim=-1)
        last = torch.arange(ids.shape[1], device=ids.device) == length[:, None] - 1
        tokens = torch.where(last[..., None], embedding[:, None], x)
        return Text(rms_norm(tokens) * there[..., None], length - 1, embedding)

    @torch.no_grad()
    def read(self, captions):
        """Captions → Text. A CPU remembers them. On a GPU a look into the memory would make the host wait for it."""
        if self.words.weight.device.type != "cpu":
            return self.encode(self.tokenize(captions))
        if len(self.known) > self.KEPT:
            self.known.clear()
        with float32_region(self.norm.weight):
            for caption in captions:
                if caption not in self.known:
                    ids = self.tokenize([caption])  # alone: in a batch, rounding depends on the other captions
                    tokens, eot, embedding = (x[0] for x in self.encode(ids[:, : ids.count_nonzero()]))
                    self.known[caption] = Text(tokens.half(), eot, embedding)  # half, as the weights' file
        tokens, eot, embedding = zip(*(self.known[caption] for caption in captions), strict=True)
        tokens = pad_sequence(tokens, batch_first=True).float()
        tokens = F.pad(tokens, (0, 0, 0, self.context_length - tokens.shape[1]))
        return Text(tokens, torch.stack(eot), torch.stack(embedding))


MINILM_NAMES = {  # of BERT's tensors: nn.TransformerEncoder's
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers.layers",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


@functools.cache
def load_minilm():
    """The text encoder of the small presets. Raises UserError if its files are damaged."""
    path = MINILM / "model.safetensors"
    try:
        tensors = {}
        for name, value in load_file(path).items():
            for theirs, ours in MINILM_NAMES.items():
                name = name.replace(theirs, ours)
            tensors[name] = value.float()
        for name in [name for name in tensors if ".attention.self.query." in name]:
            parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            tensors[name.replace("attention.self.query.", "self_attn.in_proj_")] = torch.cat(parts)
        with torch.device("meta"):  # no random weights first: that takes a second, and random numbers from the caller
            encoder = MiniLM()
        encoder.load_state_dict(tensors, assign=True)
        encoder.tokenizer  # noqa: B018 - reads its file
    except Exception as error:  # safetensors, torch and tokenizers raise many kinds
        raise UserError(f"{MINILM} is damaged or incomplete ({first_line(error)}); get it again") from error
    return encoder


class ClipText(nn.Module):
    """The text tower of a CLIP of open_clip."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name
        self.context_length, self.width = model.positional_embedding.shape
        from open_clip import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=self.context_length)
        encode, marks = self.tokenizer.encode, set(self.tokenizer.all_special_ids)  # of "<end_of_text>", however spelt
        # Training meets the same captions again. A GPU would wait while each is cleaned and split once more.
        self.tokenizer.encode = functools.lru_cache(2**16)(lambda text: [i for i in encode(text) if i not in marks])

    def tokenize(self, captions):
        """Captions → token ids [B, context_length], overlong ones cut. Safe on any text, e.g. with emoji."""
        return self.tokenizer(list(captions)).to(self.model.positional_embedding.device)

    def num_tokens_cut(self, caption):
        """How many tokens of a caption do not fit between the start and the end of the text."""
        return max(0, len(self.tokenizer.encode(caption)) + 2 - self.context_length)

    def encode(self, ids):
        """Token ids [B, T] → Text."""
        m = self.model
        x = m.token_embedding(ids) + m.positional_embedding
        tokens = full_precision(m.ln_final(m.transformer(x, attn_mask=m.attn_mask)))
        eot = ids.argmax(-1)
        embedding = tokens[torch.arange(len(ids), device=ids.device), eot] @ m.text_projection
        return Text(tokens, eot, F.normalize(embedding, dim=-1))

    @torch.no_grad()  # not inference_mode: these enter a training graph
    def read(self, captions):
        """Captions → Text."""
        return self.encode(self.tokenize(captions))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP.


class FrozenClip(nn.Module):
    """A text encoder and an image tower that never change; gradients pass through the tower to the images.

    visual: an image tower of open_clip. projection: from the encoder's embeddings to those of captions. log_scale: a
    scalar, the logarithm of what cosines are multiplied by. name: what a run's files call it.
    """

    def __init__(self, text, visual, projection, log_scale, name):
        super().__init__()
        self.text, self.visual, self.projection, self.log_scale = text, visual, projection, log_scale
        self.name = name
        self.eval().requires_grad_(False)
        mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
        for buffer, value in (("mean", mean or OPENAI_MEAN), ("std", std or OPENAI_STD)):  # of pixels it learned from
            self.register_buffer(buffer, torch.tensor(value).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        """Stays in eval mode, as part of a network in training too."""
        return super().train(False)

    @property
    def device(self):
        return self.mean.device

    @property
    def width(self):
        """Of the features of tokens."""
        return self.text.width

    @property
    def logit_scale(self):
        return self.log_scale.exp()

    def tokenize(self, captions):
        """Captions → token ids [B, context_length]."""
        return self.text.tokenize(captions)

    def read(self, captions):
        """Captions → Text, whose embeddings are to be compared with those of images."""
        return self.projected(self.text.read(captions))

    def encode_text(self, ids):
        """Token ids [B, T] → Text, as `read`."""
        return self.projected(self.text.encode(ids))

    def projected(self, text):
        return text._replace(embedding=F.normalize(self.projection(text.embedding), dim=-1))

    def encode_image(self, *images):
        """Images [B, 3, R, R] in [−1, 1], also several batches of different R → embeddings [B, D] of all in a row."""
        return self.see(*images)[0]

    def see(self, *images):
        """As encode_image, → the embeddings and four feature maps [B, C, side, side], from shallow to deep."""
        images = torch.cat([self.preprocess(batch) for batch in images])
        seen = self.visual.forward_intermediates(images, indices=_map_blocks(self.visual))
        return seen["image_features"], seen["image_intermediates"]

    def preprocess(self, images):
        """Images [B, 3, R, R] in [−1, 1], resized and normalized as this CLIP expects."""
        images = F.interpolate((images + 1) / 2, self.visual.image_size, mode="bicubic", antialias=True)
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @property
    def map_shapes(self):
        """The (C, side) of each of the feature maps."""
        side = self.visual.image_size
        side = side[0] if isinstance(side, tuple) else side
        maps = self.see(self.mean.new_zeros(1, 3, side, side))[1]
        return tuple((x.shape[1], x.shape[2]) for x in maps)


def _map_blocks(visual):
    """Which blocks the feature maps come from, as open_clip wants it: a quarter of a ViT each; else the last stages."""
    if not hasattr(visual, "transformer"):
        return NUM_MAPS
    depth = len(visual.transformer.resblocks)
    return [depth * part // NUM_MAPS - 1 for part in range(1, NUM_MAPS + 1)]


def from_open_clip(model, name):
    """A model of open_clip's CLIP class → FrozenClip."""
    return FrozenClip(ClipText(model, name), model.visual, nn.Identity(), model.logit_scale, name)


def load_clip(spec, device="cpu"):
    """A name in BUILT_IN, a file of save_small, or "MODEL:WEIGHTS" of open_clip, WEIGHTS a tag or a file."""
    path = BUILT_IN.get(spec, Path(spec))
    if path.is_file():
        return fold_batch_norms(load_small(path)).to(device)
    import open_clip  # not at the top: it takes two seconds, and sampling with our own files needs none of it

    model = create(spec, "--clip")
    if not isinstance(model, open_clip.CLIP):
        raise UserError(f"--clip {spec}: only models of OpenAI's CLIP architecture serve, as ViT-L-14-quickgelu:openai")
    return fold_batch_norms(from_open_clip(model, spec)).to(device)


def load_text(name, device="cpu"):
    """The text encoder that a generator's file names: MiniLM, or the one in "MODEL:WEIGHTS" of open_clip."""
    text = load_minilm() if name == MiniLM.name else load_clip(name).text
    return text.to(device)


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
            f"the file as {option} {model_name}:PATH, or use a small CLIP: {option} emoji"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return model


def fold_batch_norms(clip):
    """The same CLIP, with the batch norms of a ResNet in the convolutions before them: half the time on a CPU."""
    for module in clip.visual.modules():
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    clip.visual.to(memory_format=torch.channels_last)
    return clip


# ----------------------------------------------------------------------------------------------------------------------
# The small CLIP: MiniLM, a projection, and an image tower as in CLIP's ResNets.


def new_small(text):
    """A small CLIP whose tower and projection have random weights. text: a MiniLM."""
    from open_clip.modified_resnet import ModifiedResNet

    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start
    return FrozenClip(text, ModifiedResNet(**SMALL_TOWER), nn.Linear(text.width, SMALL_WIDTH), log_scale, "small")


def small_state(clip):
    """What a small CLIP has learned: all but the text encoder."""
    return {name: value for name, value in clip.state_dict().items() if not name.startswith("text.")}


def digest_of(tensors):
    """Sixteen digits that tell a small CLIP's weights."""
    sha256 = hashlib.sha256()
    for _, value in sorted(tensors.items()):
        sha256.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()[:16]


def save_small(clip, path, metadata):
    """Writes a small CLIP as safetensors. metadata: {name: text}, from what it was made."""
    save_file(small_state(clip), path, metadata)


def load_small(path):
    """Reads what save_small wrote; its name holds the digest of its weights. Raises UserError on any other file."""
    try:
        state = load_file(path)
        clip = new_small(load_minilm())
        lost = clip.load_state_dict(state, strict=False)
        if lost.unexpected_keys or any(not name.startswith("text.") for name in lost.missing_keys):
            raise KeyError(lost)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not a small CLIP, as training/small_clip.py writes it, or it is damaged") from error
    clip.name = f"small CLIP {digest_of(state)}"
    return clip


def made_from(path):
    """From what a small CLIP's file was made, {name: text}; {} for a file that does not say."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
