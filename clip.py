"""The frozen networks: a text encoder, which reads captions, and CLIP, which scores how well an image fits a caption.

Large presets use a CLIP of open_clip for both. Small presets download nothing: they use all-MiniLM-L6-v2, a sentence
encoder for English, and an image tower trained to match it (training/small_clip.py).
"""

import functools
import itertools
import logging
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import pad_sequence

from common.cli import UserError, first_line
from common.disk import digest_of
from layers import float32_region, full_precision, rms_norm

# PyTorch reads this at its first dense layer. With it, a ViT computes q, k and v in one matrix product; without it, in
# one product for each of 257 tokens, each with its own copy of the weights.
os.environ.setdefault("TORCH_LINEAR_FLATTEN_3D", "1")

MODELS = Path(__file__).parent / "models"
MINILM = MODELS / "minilm"
BUILT_IN = {
    "emoji": MODELS / "emoji_clip.safetensors",
    "judge": MODELS / "judge_clip.safetensors",  # for evaluation; no generator is trained against it
}
SMALL_WIDTH = 128  # of a small CLIP's embeddings
SMALL_TOWER = dict(layers=[1, 1, 1, 1], output_dim=SMALL_WIDTH, heads=8, image_size=32, width=16)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of RGB pixels
NUM_MAPS = 4  # feature maps of an image that the discriminator reads


class Text(NamedTuple):
    """The output of a text encoder for B captions."""

    tokens: torch.Tensor  # [B, T, width], features of every token after the last norm
    eot: torch.Tensor  # [B], index of the last token, which represents the whole caption
    embedding: torch.Tensor  # [B, D], of unit length


# ----------------------------------------------------------------------------------------------------------------------
# Text encoders: ids = tokenize(captions); encode(ids) → Text; read(captions) → Text. Messages use num_tokens_cut and
# unknown. Each has a name, a width (of the features of tokens) and a context_length (in tokens).


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: a BERT of 6 layers (Wang et al. 2020), trained on pairs of sentences by sentence-transformers.

    The last token of a caption is replaced by the mean over its tokens, so it represents the caption as in CLIP.
    Features have unit RMS, also as in CLIP. Beyond the end of a caption they are zero.
    """

    name = "all-MiniLM-L6-v2"
    width = 384
    context_length = 32  # the model could read 512, but Aurora would compute with all of them
    MAX_CACHED = 2**16  # captions, as training reads the same ones again

    def __init__(self):
        super().__init__()
        # Not nn.Embedding(n, width): on the meta device its random weights import torch.compile, which takes 2 seconds.
        tables = (torch.empty(n, self.width) for n in (30522, 512, 2))
        self.words, self.positions, self.types = map(nn.Embedding.from_pretrained, tables)
        self.norm = nn.LayerNorm(self.width, 1e-12)
        layer = nn.TransformerEncoderLayer(self.width, 12, 4 * self.width, 0.0, "gelu", 1e-12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.eval().requires_grad_(False)
        self.cache = {}  # {caption: its Text without padding}

    @functools.cached_property
    def tokenizer(self):
        from tokenizers import Tokenizer  # not at the top: a plan, which has no weights, needs none

        tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # "[PAD]" in a caption is plain text
        tokenizer.enable_truncation(self.context_length)
        tokenizer.enable_padding(length=self.context_length)
        return tokenizer

    def tokenize(self, captions):
        """Captions → token ids [B, context_length]; zero beyond the end. Long captions are cut."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(captions))]
        return torch.tensor(ids, device=self.words.weight.device)

    def num_tokens_cut(self, caption):
        """The number of tokens that do not fit."""
        return sum(len(more.ids) - more.ids.count(0) - 2 for more in self.tokenizer.encode(caption).overflowing)

    def unknown(self, caption):
        """The words of a caption that the model does not know: emoji, and words with letters that English lacks."""
        read, words = self.tokenizer.encode(caption), set()
        for token, word in zip(read.tokens, read.word_ids, strict=True):
            is_foreign = token.strip("#").isalpha() and not token.isascii()  # it knows their letters, but no such words
            if token == "[UNK]" or is_foreign:
                words.add(word)
        return [caption[slice(*read.word_to_chars(word))] for word in sorted(words)]

    def encode(self, ids):
        exists = ids != 0  # [B, T]
        length = exists.sum(1)
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        x = self.layers(self.norm(x), src_key_padding_mask=~exists) * exists[..., None]
        embedding = F.normalize(x.sum(1), dim=-1)
        last = torch.arange(ids.shape[1], device=ids.device) == length[:, None] - 1
        tokens = torch.where(last[..., None], embedding[:, None], x)
        return Text(rms_norm(tokens) * exists[..., None], length - 1, embedding)

    @torch.no_grad()
    def read(self, captions):
        """On a CPU, captions are cached. On a GPU, the cache would make the host wait for the device."""
        if self.words.weight.device.type != "cpu":
            return self.encode(self.tokenize(captions))
        if len(self.cache) > self.MAX_CACHED:
            self.cache.clear()
        with float32_region(self.norm.weight):
            for caption in captions:
                if caption not in self.cache:
                    ids = self.tokenize([caption])  # alone: in a batch, rounding depends on the other captions
                    tokens, eot, embedding = (x[0] for x in self.encode(ids[:, : ids.count_nonzero()]))
                    self.cache[caption] = Text(tokens.half(), eot, embedding)  # float16, like the weights on disk
        tokens, eot, embedding = zip(*(self.cache[caption] for caption in captions), strict=True)
        tokens = pad_sequence(tokens, batch_first=True).float()
        tokens = F.pad(tokens, (0, 0, 0, self.context_length - tokens.shape[1]))
        return Text(tokens, torch.stack(eot), torch.stack(embedding))


MINILM_NAMES = {  # {BERT's name: ours}
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
    """The text encoder of the small presets, one for the whole process: .to() moves it for all who use it. Raises
    UserError if its files are damaged.
    """
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
        with torch.device("meta"):  # random weights would take a second, and change the caller's random state
            encoder = MiniLM()
        encoder.load_state_dict(tensors, assign=True)
        encoder.tokenizer  # noqa: B018 - reads its file
    except Exception as error:  # safetensors, torch and tokenizers raise many types
        raise UserError(f"{MINILM} is damaged or incomplete ({first_line(error)}); get it again") from error
    return encoder


class ClipText(nn.Module):
    """The text tower of a model of open_clip's CLIP class."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name
        self.context_length, self.width = model.positional_embedding.shape
        from open_clip import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=self.context_length)
        encode, special = self.tokenizer.encode, set(self.tokenizer.all_special_ids)  # "<end_of_text>" in any spelling
        # Cached, as training reads the same captions again, and a GPU would wait for their tokens.
        self.tokenizer.encode = functools.lru_cache(2**16)(lambda text: [i for i in encode(text) if i not in special])

    def tokenize(self, captions):
        """Captions → token ids [B, context_length]. Long captions are cut. Any text is safe, emoji included."""
        return self.tokenizer(list(captions)).to(self.model.positional_embedding.device)

    def num_tokens_cut(self, caption):
        """The number of tokens that do not fit between those of start and end."""
        return max(0, len(self.tokenizer.encode(caption)) + 2 - self.context_length)

    def unknown(self, _):
        """The vocabulary contains every byte."""
        return []

    def encode(self, ids):
        m = self.model
        x = m.token_embedding(ids) + m.positional_embedding
        tokens = full_precision(m.ln_final(m.transformer(x, attn_mask=m.attn_mask)))
        eot = ids.argmax(-1)  # the end-of-text token has the largest id
        embedding = tokens[torch.arange(len(ids), device=ids.device), eot] @ m.text_projection
        return Text(tokens, eot, F.normalize(embedding, dim=-1))

    @torch.no_grad()  # not inference_mode: the result enters a training graph
    def read(self, captions):
        return self.encode(self.tokenize(captions))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP.


class FrozenClip(nn.Module):
    """A text encoder and an image tower that never change. Gradients pass through the tower to the images.

    text: a text encoder. visual: an image tower of open_clip. projection: maps the encoder's embeddings to the space of
    the images' embeddings. log_scale: a scalar, the logarithm of the factor of cosines. name: identifies it in files.
    """

    def __init__(self, text, visual, projection, log_scale, name):
        super().__init__()
        self.text, self.visual, self.projection, self.log_scale = text, visual, projection, log_scale
        self.name, self.width = name, text.width
        self.eval().requires_grad_(False)
        mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
        for buffer, value in (("mean", mean or OPENAI_MEAN), ("std", std or OPENAI_STD)):
            self.register_buffer(buffer, torch.tensor(value).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        """Stays in eval mode, also inside a network that is in training mode."""
        return super().train(False)

    @property
    def device(self):
        return self.mean.device

    @property
    def logit_scale(self):
        return self.log_scale.exp()

    def tokenize(self, captions):
        return self.text.tokenize(captions)

    def read(self, captions):
        """Captions → Text, with embeddings to compare with those of images."""
        return self.project(self.text.read(captions))

    def encode_text(self, ids):
        """The same, of token ids [B, T]."""
        return self.project(self.text.encode(ids))

    def project(self, text):
        return text._replace(embedding=F.normalize(self.projection(text.embedding), dim=-1))

    def encode_image(self, *images):
        """One or more batches [B, 3, R, R] in [−1, 1], each of its own R → the embeddings [ΣB, D] of all images."""
        return self.see(*images)[0]

    def see(self, *images):
        """The same → the embeddings, and NUM_MAPS feature maps [ΣB, C, side, side], from shallow to deep."""
        inputs = []
        for batch in images:
            pixels = F.interpolate((batch + 1) / 2, self.visual.image_size, mode="bicubic", antialias=True)
            inputs.append(((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last))
        seen = self.visual.forward_intermediates(torch.cat(inputs), indices=_map_blocks(self.visual))
        return seen["image_features"], seen["image_intermediates"]

    def map_shapes(self):
        """The (C, side) of each feature map."""
        _, maps = self.see(self.mean.new_zeros(1, 3, 1, 1))
        return tuple((x.shape[1], x.shape[2]) for x in maps)


def _map_blocks(visual):
    """The `indices` of forward_intermediates: of a ViT the ends of equal parts of its blocks; else the last stages."""
    if not hasattr(visual, "transformer"):
        return NUM_MAPS
    depth = len(visual.transformer.resblocks)
    return [depth * part // NUM_MAPS - 1 for part in range(1, NUM_MAPS + 1)]


def from_open_clip(model, name):
    """A model of open_clip's CLIP class → FrozenClip."""
    return FrozenClip(ClipText(model, name), model.visual, nn.Identity(), model.logit_scale, name)


def load_clip(spec, device="cpu"):
    """→ FrozenClip. Raises UserError.

    spec: a name in BUILT_IN, a file of save_small, or "MODEL:WEIGHTS" of open_clip, with WEIGHTS a tag or a file.
    """
    path = BUILT_IN.get(spec, Path(spec))
    if path.is_file():
        return fold_batch_norms(load_small(path)).to(device)
    import open_clip  # not at the top: it takes two seconds, and sampling with our own files does not need it

    model = create_open_clip(spec)
    if not isinstance(model, open_clip.CLIP):
        raise UserError(f"{spec}: not of OpenAI's CLIP architecture; use for example ViT-L-14-quickgelu:openai")
    return fold_batch_norms(from_open_clip(model, spec)).to(device)


def load_text(name, device="cpu"):
    """The text encoder that a generator file names: MiniLM, or that of "MODEL:WEIGHTS" of open_clip."""
    if name == MiniLM.name:
        return load_minilm().to(device)
    text = load_clip(name).text
    del text.model.visual  # of ViT-L 1.2 GB, which sampling does not use
    return text.to(device)


def create_open_clip(spec):
    """ "MODEL:WEIGHTS" → open_clip's model, of any class. Raises UserError."""
    import open_clip

    model_name, _, weights = spec.partition(":")
    if model_name not in open_clip.list_models():
        raise UserError(f"{spec}: neither a file nor MODEL:WEIGHTS of open_clip, such as ViT-L-14-quickgelu:openai")
    if weights == "openai" and "quickgelu" not in model_name and f"{model_name}-quickgelu" in open_clip.list_models():
        raise UserError(f"{spec}: OpenAI's weights use quick GELU; give {model_name}-quickgelu:openai")
    logging.disable()  # the hub logs at length what the error below says in one line
    try:
        with warnings.catch_warnings(action="ignore"):
            model = open_clip.create_model(model_name, pretrained=weights or None, require_pretrained=True)
    except Exception as error:  # open_clip and the hub raise many types if there are no weights
        raise UserError(
            f"{spec}: the weights are not available ({first_line(error)}). Download them on another machine "
            f"and give the file as {model_name}:PATH, or train with a small CLIP: train.py --clip emoji"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return model


def fold_batch_norms(clip):
    """Folds the batch norms of a ResNet into the convolutions before them, which halves the time on a CPU → clip."""
    for module in clip.visual.modules():
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    clip.visual.to(memory_format=torch.channels_last)
    return clip


# ----------------------------------------------------------------------------------------------------------------------
# The small CLIP: MiniLM, a projection, and an image tower like those of CLIP's ResNets.


def new_small(text):
    """A small CLIP with a MiniLM, and a tower and a projection with random weights."""
    from open_clip.modified_resnet import ModifiedResNet

    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start
    return FrozenClip(text, ModifiedResNet(**SMALL_TOWER), nn.Linear(text.width, SMALL_WIDTH), log_scale, "small")


def save_small(clip, path, metadata):
    """Writes a small CLIP without its text encoder as safetensors. metadata: {name: text}, how it was made."""
    learned = {name: value for name, value in clip.state_dict().items() if not name.startswith("text.")}
    path.write_bytes(save(learned, metadata))


def load_small(path):
    """Reads a file of save_small; the CLIP's name contains a digest of its weights. Raises UserError."""
    try:
        state = load_file(path)
        clip = new_small(load_minilm())
        lost = clip.load_state_dict(state, strict=False)
        if lost.unexpected_keys or any(not name.startswith("text.") for name in lost.missing_keys):
            raise KeyError(lost)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged, or not a small CLIP of training/small_clip.py; give another file"
        ) from error
    clip.name = f"small CLIP {digest_of(state)}"
    return clip
