"""The text tower of a small CLIP, with open_clip's names for its weights: what sampling needs of a CLIP.

open_clip computes the same (a test holds the two together), but imports torchvision and timm first, which takes longer
than a picture.
"""

from collections import OrderedDict

import torch
from torch import nn

from text import quick_gelu


class QuickGelu(nn.Module):
    def forward(self, x):
        return quick_gelu(x)


class Block(nn.Module):
    """A pre-norm transformer block over tokens [B, T, C]."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGelu(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, attn_mask):
        q = self.ln_1(x)
        x = x + self.attn(q, q, q, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, attn_mask):
        for block in self.resblocks:
            x = block(x, attn_mask)
        return x


class TextTower(nn.Module):
    """The `model` of a FrozenClip that reads text and sees no images. Its weights are to be loaded."""

    visual = None

    def __init__(self, vocab_size, embed_dim, context_length, width, heads, layers):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        self.transformer = Transformer(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        mask = torch.full((context_length, context_length), -torch.inf).triu(1)  # a token attends to those before it
        self.register_buffer("attn_mask", mask, persistent=False)
