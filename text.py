"""The text head: learned attention over the frozen text encoder's tokens. Generator and discriminator own one each."""

import torch
import torch.nn.functional as F
from torch import nn

from attention import merge_heads, split_heads
from layers import Linear, full_precision


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """A pre-norm transformer block over tokens [B, T, D], in CLIP's own form (quick GELU, 4× MLP)."""

    def __init__(self, dim, num_heads, lr_mul):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_qkv = Linear(dim, 3 * dim, lr_mul=lr_mul)
        self.to_out = Linear(dim, dim, lr_mul=lr_mul)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp_in = Linear(dim, 4 * dim, lr_mul=lr_mul)
        self.mlp_out = Linear(4 * dim, dim, lr_mul=lr_mul)

    def attention(self, x, mask):
        q, k, v = (split_heads(t, self.num_heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp_out(quick_gelu(self.mlp_in(self.norm2(x))))


class TextHead(nn.Module):
    """The text encoder's token features [B, T, clip_width] and eot [B] → global text t_g [B, D] and local text
    [B, T−1, D].

    t_g is the token at eot, the end of the text; the local text is every other token, padding included, in order, as in
    the release.
    mix_tokens: whether a token attends to the whole text up to eot, or only to itself. The release attends over the
    batch axis, so at batch 1 each token attends only to itself: its weights need mix_tokens=False. Ours mix.
    """

    def __init__(self, clip_width, dim, num_layers, num_heads, lr_mul, mix_tokens=True):
        super().__init__()
        # The bias starts at 1, as in the release.
        self.align = nn.Identity() if clip_width == dim else Linear(clip_width, dim, bias_init=1.0, lr_mul=lr_mul)
        self.blocks = nn.ModuleList(TextBlock(dim, num_heads, lr_mul) for _ in range(num_layers))
        self.mix_tokens = mix_tokens

    def forward(self, tokens, eot):
        position = torch.arange(tokens.shape[1], device=tokens.device)
        if self.mix_tokens:
            mask = (position <= eot[:, None])[:, None, None]  # [B, 1, 1, T]: the whole text
        else:
            mask = position == position[:, None]  # [T, T]: itself
        x = full_precision(self.align(tokens))  # the blocks add to it in float32
        for block in self.blocks:
            x = block(x, mask)
        others = position[:-1] + (position[:-1] >= eot[:, None])  # [B, T−1]: 0 … T−1 without eot
        return x[torch.arange(len(x), device=x.device), eot], x.take_along_dim(others[..., None], dim=1)
