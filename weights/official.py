"""The authors' released weights, `aurora_v1.pth`, in our generator."""

import dataclasses
import re

import torch

from aurora import Generator
from presets import PRESETS

RELEASE = dataclasses.replace(PRESETS["aurora-64"].generator, mix_tokens=False)  # its configuration

# Their names → ours, applied in order. A name that becomes "" has nothing learned: constant resampling filters, a
# transform of the Fourier features that a user may set, and the second name of each MLP.
RENAMES = [
    (r".*(\.filter|\.transform|\.mlp\.c_fc\..*|\.mlp\.c_proj\..*)$", ""),
    (r"^text_head\.align_dim\.", "text_head.align."),
    (r"^text_head\.transformer\.res_blocks\.(\d+)\.(?:attn\.)?", r"text_head.blocks.\1."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.c_fc\.", ".mlp_in."),
    (r"\.c_proj\.", ".mlp_out."),
    (r"^mapping\.dense(\d+)\.", r"mapping.layers.\1."),
    (r"\.filter_weight\.", ".kernel_mix."),
    (r"\.mtm_(\w+)", r".field.\1"),
    (r"\.skip_connection\.", ".skip_conv."),
    (r"\.attn_blocks\.", ".blocks."),
    (r"\.(self|cross)_attn\.", r".\1_attention."),
    (r"\.proj_out\.0\.", ".proj_out."),
    (r"\.ff\.routing\.", ".router.to_logits."),
    (r"\.ff\.net\.(\d+)\.0\.proj\.weight$", r".experts.proj_in[\1]"),
    (r"\.ff\.net\.(\d+)\.0\.proj\.bias$", r".experts.bias_in[\1]"),
    (r"\.ff\.net\.(\d+)\.2\.weight$", r".experts.proj_out[\1]"),
    (r"\.ff\.net\.(\d+)\.2\.bias$", r".experts.bias_out[\1]"),
]


def load_official(source, config=RELEASE):
    """The generator with the authors' weights, in float32 and eval mode.

    source: the dict in `aurora_v1.pth`, with the moving average `generator_smooth` or else `generator`; or a state dict
    of tensors or arrays. Raises ValueError if its names or shapes are not those of this configuration.
    """
    with torch.device("meta"):
        generator = Generator(config)
    try:
        state = source.get("generator_smooth", source.get("generator", source))
        translated = stack_experts(renamed(state, layer_names(config) + RENAMES))
        generator.load_state_dict(reshaped(translated, generator), assign=True)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(
            f"this is not the authors' state of Aurora's generator, not all of it, or of another size: … {reason}"
        ) from error
    return generator.requires_grad_(True).eval()


def layer_names(config):
    """Their single list of layers → our levels, in the form of RENAMES.

    A level has their layers in turn: a convolution block and, if it has attention, an attention block.
    """
    start = "synthesis.levels.0.blocks.0."  # Fourier features and a single convolution
    names = [(r"^synthesis\.net\.0\.0\.", start + "fourier."), (r"^synthesis\.net\.0\.1\.", start + "conv.")]
    layer = 0
    for i, level in enumerate(config.levels):
        ours, side = f"synthesis.levels.{i}.", level.resolution
        names.append((rf"^synthesis\.output_res_{side}x{side}\.", ours + "to_rgb."))
        for j in range(level.num_blocks):
            for kind in ("blocks", "attentions") if level.attn_depth else ("blocks",):
                names.append((rf"^synthesis\.net\.{layer}\.0\.", f"{ours}{kind}.{j}."))
                layer += 1
    return names


def stack_experts(translated):
    """Stacks the experts of each layer, whose names end in [0], [1], …"""
    stacks = {}
    for name in [name for name in translated if name.endswith("]")]:
        stack, number = re.fullmatch(r"(.*)\[(\d+)\]", name).groups()
        stacks.setdefault(stack, {})[int(number)] = translated.pop(name)
    return translated | {name: torch.stack([value for _, value in sorted(x.items())]) for name, x in stacks.items()}


def renamed(state, renames):
    """The authors' tensors or arrays under our names, in float32.

    renames: regular expressions and their replacements, applied in order. A tensor whose name becomes "" is dropped.
    """
    translated = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name:
            translated[name] = torch.as_tensor(value).float()
    return translated


def reshaped(translated, network):
    """Tensors under our names, reshaped to a network's shapes, which may differ in sides of 1, and at its scale."""
    ours, state = network.state_dict(), dict(translated)
    for name, value in state.items():
        if name in ours and value.squeeze().shape == ours[name].squeeze().shape:
            state[name] = value.reshape(ours[name].shape)
    for prefix, module in network.named_modules():
        for name, scale in getattr(module, "lr_scale", {}).items():  # by which the authors multiply weights in use
            if (name := f"{prefix}.{name}") in state:  # a layer without bias also has a scale for it
                state[name] = state[name] * scale
    return state
