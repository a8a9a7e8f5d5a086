"""The authors' released weights, `aurora_v1.pth`, in our generator.

Every size is read from the names and shapes of the state dict, except the number of heads.
"""

import contextlib
import re
from collections.abc import Mapping

import torch

from aurora import Generator
from presets import GeneratorConfig, Level

NUM_HEADS = 8

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


def load_official(source):
    """The generator with the authors' weights, in float32 and eval mode.

    source: the dict in `aurora_v1.pth`, with the moving average `generator_smooth` or else `generator`; or a state dict
    of tensors or arrays. Raises ValueError if names or shapes are not an Aurora generator's.
    """
    names = {"generator_smooth", "generator", "synthesis.net.0.0.freqs"}
    if not isinstance(source, Mapping) or names.isdisjoint(source):
        raise ValueError("this is not a checkpoint of the authors' generator: its names are others")
    state = source.get("generator_smooth", source.get("generator", source))
    with reading("Aurora's generator"):
        config, prefixes = read_architecture({name: tuple(value.shape) for name, value in state.items()})
        with torch.device("meta"):
            generator = Generator(config)
        renames = [(f"^{re.escape(theirs)}", prefix) for theirs, prefix in prefixes.items()]
        translated = stack_experts(renamed(state, renames + RENAMES))
        generator.load_state_dict(reshaped(translated, generator), assign=True)
    return generator.requires_grad_(True).eval()


def read_architecture(shapes):
    """{name: shape} → the GeneratorConfig, and {their prefix: our prefix} for the synthesis network."""
    resolutions = numbers(shapes, r"synthesis\.output_res_(\d+)x\d+\.bias")
    convs, attentions = group_layers(shapes)
    prefixes = {f"synthesis.output_res_{r}x{r}.": f"synthesis.levels.{i}.to_rgb." for i, r in enumerate(resolutions)}
    for i, blocks in enumerate(convs):
        prefixes |= {theirs: f"synthesis.levels.{i}.blocks.{j}." for j, theirs in enumerate(blocks)}
    for i, blocks in enumerate(attentions):
        prefixes |= {theirs: f"synthesis.levels.{i}.attentions.{j}." for j, theirs in enumerate(blocks)}
    prefixes["synthesis.net.0.0."] = "synthesis.levels.0.blocks.0.fourier."
    prefixes["synthesis.net.0.1."] = "synthesis.levels.0.blocks.0.conv."

    (text_dim,) = shapes["text_head.transformer.res_blocks.0.ln_1.weight"]
    mapping_dim, mapping_input = shapes["mapping.dense0.weight"]
    attention_dims = [shape[0] for name, shape in shapes.items() if name.endswith("self_attn.to_v.weight")]
    config = GeneratorConfig(
        levels=tuple(read_level(shapes, *level) for level in zip(resolutions, convs, attentions, strict=True)),
        fourier_channels=shapes["synthesis.net.0.0.freqs"][0],
        z_dim=mapping_input - text_dim,
        w_dim=shapes["w_avg"][0],
        mapping_layers=len(numbers(shapes, r"mapping\.dense(\d+)\.")),
        mapping_dim=mapping_dim,
        clip_width=shapes.get("text_head.align_dim.weight", (text_dim, text_dim))[1],
        text_dim=text_dim,
        text_layers=len(numbers(shapes, r"text_head\.transformer\.res_blocks\.(\d+)\.")),
        mix_tokens=False,
        num_heads=NUM_HEADS,
        head_dim=max(attention_dims, default=NUM_HEADS) // NUM_HEADS,
    )
    return config, prefixes


def group_layers(shapes):
    """Their single list of layers → for each resolution, the prefixes of its convolution and attention blocks."""
    convs, attentions = [[]], [[]]
    for layer in numbers(shapes, r"synthesis\.net\.(\d+)\."):
        theirs = f"synthesis.net.{layer}.0."
        if theirs + "norm.weight" in shapes:
            attentions[-1].append(theirs)
            continue
        if theirs + "conv1.filter" in shapes:  # only the upsampling convolution, a resolution's first, has one
            convs.append([])
            attentions.append([])
        convs[-1].append(theirs)
    return convs, attentions


def read_level(shapes, resolution, convs, attentions):
    num_kernels, _, channels, *_ = shapes[f"synthesis.output_res_{resolution}x{resolution}.weight"]
    attention = re.escape((attentions or ["none"])[0])
    # The start block has a single convolution, after its Fourier features.
    last_conv = "synthesis.net.0.1." if convs == ["synthesis.net.0.0."] else convs[-1] + "conv2."
    return Level(
        resolution,
        channels,
        num_blocks=len(convs),
        num_kernels=num_kernels,
        attn_depth=len(numbers(shapes, attention + r"attn_blocks\.(\d+)\.")),
        num_experts=len(numbers(shapes, attention + r"attn_blocks\.0\.ff\.net\.(\d+)\.0\.")),
        deformable=last_conv + "mtm_bias" in shapes,
    )


def numbers(shapes, pattern):
    """The different numbers that match (\\d+) in the names, sorted."""
    matches = (re.match(pattern, name) for name in shapes)
    return sorted({int(match[1]) for match in matches if match})


def stack_experts(translated):
    """Stacks the experts of each layer, whose names end in [0], [1], …"""
    stacks = {}
    for name in [name for name in translated if name.endswith("]")]:
        stack, number = re.fullmatch(r"(.*)\[(\d+)\]", name).groups()
        stacks.setdefault(stack, {})[int(number)] = translated.pop(name)
    return translated | {name: torch.stack([value for _, value in sorted(x.items())]) for name, x in stacks.items()}


# ----------------------------------------------------------------------------------------------------------------------
# For the weights of any authors: other names, other shapes of the same numbers, other scales.


@contextlib.contextmanager
def reading(what):
    """Raises ValueError, in one line, if a state dict does not fit."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"this is not the authors' state of {what}, or not all of it: … {reason}") from error


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
