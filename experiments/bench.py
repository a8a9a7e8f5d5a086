"""How near Aurora comes to what this machine can do.

    python -m experiments.bench                                 # every case
    python -m experiments.bench --cases experts --out bench.json   # some, and the figures in a file

First the machine's own ceilings: matrix products in float32 and bfloat16, and copies. Then every case beside its floor,
the time its multiplications would take at the speed of a large matrix product. Of a shared machine no two minutes are
alike, so product and case take turns, and only ratios mean anything. FLOP are those of the plain formulas: what a
faster way computes twice is not counted twice.
"""

import argparse
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import attend, l2_attention
from aurora import Generator
from common import distributed
from common.cli import HelpFormatter, UserError, a_path, check_file, positive_int, told_in_one_line
from data import sources
from experiments.stopwatch import HEAD, Machine, Note
from experts import Experts, expert, routed_experts, sliced_experts
from presets import PRESETS, Level
from router import Router
from sampling import inference
from sampling.inference import DTYPES
from sampling.pictures import to_pil
from train import build
from train import parse_args as training_args
from training.cuda_graph import WARM_UP
from weights.checkpoint import DEMO, load_generator

# ----------------------------------------------------------------------------------------------------------------------
# The cases. Each yields its rows.


@torch.no_grad()
def sampling(machine):
    """The release's generator, 1,166 M parameters, random weights."""
    for dtype in DTYPES:
        generator = inference.prepare(new_generator(PRESETS["aurora-64"].generator, machine.device), DTYPES[dtype])
        for batch in (1, 4, 8, 16):
            call = sampler(generator, batch)
            yield machine.measure(f"sample, aurora-64, batch {batch}, {dtype}", call, dtype)
            if machine.device.type == "cuda":
                yield machine.measure(f"the same from a CUDA graph, batch {batch}, {dtype}", graph(call), dtype, call)


def graph(call):
    """The call, recorded once and played back from then on."""
    for _ in range(3):
        call()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


@torch.no_grad()
def rounding(machine):
    """What bfloat16 changes in a picture, by the same routes, and how many points take another by themselves."""
    generator, clip, _ = load_generator(DEMO, machine.device)
    captions = next(sources.loader(sources.open_data("emoji", 64, seed=0), 0, 64, 0)).captions
    text = clip.read(captions)
    latents = torch.randn(64, generator.config.z_dim, device=machine.device)
    yield compare_dtypes("the demo model, 64 captions", generator, latents, text.tokens, text.eot)
    generator = new_generator(PRESETS["aurora-64"].generator, machine.device)
    for parameter in generator.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)  # else to-RGB, which starts at zero, would hide everything
    latents, tokens = (torch.randn(*shape, device=machine.device) for shape in ((4, 128), (4, 16, 768)))
    yield compare_dtypes("aurora-64, random weights", generator, latents, tokens, latents.new_full((4,), 15).long())


def compare_dtypes(name, generator, *inputs):
    exact = inference.prepare(generator)(*inputs)
    local_text = generator.text_head(*inputs[1:])[1]
    narrow = inference.prepare(copy.deepcopy(generator), torch.bfloat16)
    routers = [module for module in narrow.modules() if isinstance(module, Router)]
    with inference.autocast(narrow):
        taken = narrow.synthesis(exact.w, local_text).routings
        for router, routing in zip(routers, exact.routings.values(), strict=True):
            router.register_forward_hook(replayed(routing.expert_index))
        rounded = narrow.synthesis(exact.w, local_text).image
    moved = [taken[name].expert_index != routing.expert_index for name, routing in exact.routings.items()]
    moved = torch.cat([x.flatten() for x in moved]).float().mean().item()
    error = (rounded - exact.image).abs().max().item()
    span = (exact.image.max() - exact.image.min()).item()
    return Note(
        f"bf16, {name}: {100 * moved:.2f} % of the points take another route; by float32's routes the pictures, "
        f"which span {span:.2f}, differ by at most {error:.4f}"
    )


def replayed(route):
    """A hook that makes a Router send points [B, N] where `route` says."""
    return lambda _, inputs, routing: routing.sent_to(route)


@torch.no_grad()
def image_sizes(machine):
    """small-64 with more levels on top, which have neither attention nor experts."""
    config = PRESETS["small-64"].generator
    for resolution in (32, 64, 128, 256):
        levels = [level for level in config.levels if level.resolution <= resolution]
        while levels[-1].resolution < resolution:
            levels.append(Level(2 * levels[-1].resolution, levels[-1].channels // 2, num_blocks=2))
        generator = new_generator(dataclasses.replace(config, levels=tuple(levels)), machine.device)
        inference.prepare(generator)
        case = f"sample, small-64 made for {resolution}×{resolution}, batch 4, fp32"
        yield machine.measure(case, sampler(generator, 4), "fp32")


def new_generator(config, device):
    with torch.device(device):
        return Generator(config)


def sampler(generator, batch):
    """A pass of the synthesis network from random codes; text head and mapping are run once a prompt."""
    config, device = generator.config, generator.w_avg.device
    w = torch.randn(batch, config.w_dim, device=device)
    local_text = torch.randn(batch, 76, config.text_dim, device=device)

    def sample():
        with inference.autocast(generator):
            return generator.synthesis(w, local_text)

    return sample


def training(machine):
    """Steps of train.py at the highest resolution, one in 16 with R1; the small CLIP stands in for a large one."""
    for preset, batch in (("emoji", 32), ("small-64", 8)):
        for number, kind in ((1, ""), (0, ", with R1")):
            step = training_step(preset, batch, number, machine.device)
            yield machine.measure(f"training step, {preset}, batch {batch}{kind}, fp32", step, "fp32")


def training_step(preset, batch, number, device):
    """Step `number` of a run at its highest resolution, to be repeated with any batch; every 16th is with R1."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["--preset", preset, "--dtype", "fp32", "--batch", str(batch), "--clip", "emoji"]
        args += ["--out", folder, "--workers", "0"]
        run = build(training_args(args), device)
    learner = run.learner
    learner.learn_at(learner.resolutions)
    images = next(sources.loader(run.source, 0, batch, 0))
    if device.type == "cuda":  # so that a graph is recorded, where train.py takes one
        for other in (0, 1) * (WARM_UP + 1):
            learner.step(other, learner.prepare(0, other, [images]))

    def step(images=images):
        learner.step(number, learner.prepare(0, number, [images]))

    return step


def streaming(machine):
    """Steps of `emoji` from a batch in memory, and from shards of JPEGs of 256×256 that one worker reads."""
    batch = PRESETS["emoji"].recipe.batch
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), count=3, pictures=500)
        step = training_step("emoji", batch, 1, machine.device)
        batches = sources.loader(sources.open_data(folder, 64, seed=0), 0, batch, workers=1)
        for name, source in (("memory", itertools.repeat(next(batches))), ("shards", batches)):
            stream = functools.partial(lambda source: step(next(source)), source)
            yield machine.measure(f"training step, emoji, batch {batch}, from {name}, fp32", stream, "fp32", step)


def write_shards(folder, count, pictures):
    """Emoji, enlarged, as img2dataset would have saved them."""
    examples = sources.open_data("emoji", 64, seed=0).examples()
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * pictures, (shard + 1) * pictures):
                (image, captions), jpeg = next(examples), io.BytesIO()
                to_pil(image).resize((256, 256)).save(jpeg, "JPEG", quality=95)
                for suffix, content in (("jpg", jpeg.getvalue()), ("txt", captions[0].encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def ranks(machine):
    """train.py on all cores as one process with so many threads, and as so many ranks with one thread each."""
    cores, rates = torch.get_num_threads(), {}
    launchers = {1: [], cores: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores)]}
    for number in [*launchers] * 3:
        with tempfile.TemporaryDirectory() as folder:
            options = f"train.py --preset emoji --device cpu --workers 0 --steps 40 --out {folder}".split()
            environment = {**os.environ, "OMP_NUM_THREADS": str(cores // number)}
            root = Path(__file__).parent.parent
            command = [sys.executable, *launchers[number], *options]
            subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
        seconds = statistics.median(row["seconds"] for row in rows[5:] if "fid" not in row)
        rates.setdefault(number, []).append(PRESETS["emoji"].recipe.batch / seconds)
    one, several = (statistics.median(rates[number]) for number in launchers)
    yield Note(f"emoji on {cores} cores: one rank {one:.1f} images/s, {cores} ranks {several:.1f}: {several / one:.2f}")


def gigagan(machine):
    """A step of theirs and one of ours without R1, at 64×64, batch 8, with about 9.9 M + 5.6 M parameters each.

    Not the same work: theirs is without text, as its README has it; ours reads captions and looks through the small
    CLIP. pip install --no-deps gigagan-pytorch accelerate beartype einops ema-pytorch kornia kornia_rs numerize psutil
    """
    try:
        from gigagan_pytorch import GigaGAN
    except ImportError as error:
        raise UserError(
            f"--cases gigagan needs other packages ({error}); this function's docstring says which"
        ) from None
    same = {"image_size": 64, "dim_max": 512, "dim_capacity": 8, "num_skip_layers_excite": 4, "unconditional": True}
    with tempfile.TemporaryDirectory() as folder:
        gan = GigaGAN(
            generator={"style_network": {"dim": 64, "depth": 4}, **same},
            discriminator=same,
            model_folder=f"{folder}/models",
            results_folder=f"{folder}/results",
        )
    images = torch.randn(8, 3, 64, 64)
    batches = itertools.repeat(images)

    def theirs():
        gan.train_discriminator_step(batches)
        gan.train_generator_step(batch_size=8)

    yield machine.measure("training step, gigagan-pytorch, batch 8, fp32", theirs, "fp32")
    PRESETS["small-64, narrow"] = narrow(PRESETS["small-64"])
    ours = training_step("small-64, narrow", 8, 1, machine.device)
    yield machine.measure("training step, small-64 of about as many parameters, fp32", ours, "fp32")


def narrow(preset):
    """small-64 with 3/8 of its channels: 9.4 M parameters in the generator, 5.8 M in the discriminator."""

    def levels(config):
        return tuple(
            dataclasses.replace(level, channels=max(32, round(level.channels * 3 / 8 / 32) * 32))
            for level in config.levels
        )

    text = {"text_dim": 128, "text_layers": 1}
    generator = dataclasses.replace(
        preset.generator,
        levels=levels(preset.generator),
        fourier_channels=192,
        w_dim=128,
        mapping_dim=128,
        num_heads=2,
        **text,
    )
    discriminator = dataclasses.replace(
        preset.discriminator, levels=levels(preset.discriminator), num_heads=4, clip_channels=64, **text
    )
    return dataclasses.replace(preset, generator=generator, discriminator=discriminator)


def experts(machine):
    """Forward and backward of routed experts of width 512, every one of them of the same size, points spread evenly."""
    gpu = machine.device.type == "cuda"
    points, dtype = (65536, "bf16") if gpu else (4096, "fp32")
    ways = {"one slice after another": sliced_experts, "grouped_mm": grouped_experts}
    if gpu:
        ways["Triton"] = routed_experts
    x, _, *stacks = expert_leaves(points, 1, machine.device, DTYPES[dtype])
    dense = forward_and_backward(lambda x, *stacks: expert(x, *(s[0] for s in stacks)), x, *stacks)
    yield machine.measure(f"one dense FFN, {points} points, {dtype}", dense, dtype)
    for num_experts in (1, 4, 16, 64):
        leaves = expert_leaves(points, num_experts, machine.device, DTYPES[dtype])
        index = torch.arange(points, device=machine.device) * 7919 % num_experts
        for name, way in ways.items():
            call = forward_and_backward(lambda x, gate, *s, way=way, index=index: way(x, index, gate, *s), *leaves)
            yield machine.measure(f"{num_experts} experts, {name}, {points} points, {dtype}", call, dtype, dense)
        size = sum(stack.numel() * stack.element_size() for stack in leaves[2:])
        milliseconds = 3 * size / machine.ceilings["copy, GB/s"] / 1e6
        yield Note(
            f"their weights, {size / 2**20:.0f} MB, read twice, and gradients written: {milliseconds:.2f} ms at least"
        )


def expert_leaves(points, num_experts, device, dtype):
    module = Experts(512, num_experts).to(device, dtype)
    x, gate = torch.randn(points, 512, device=device, dtype=dtype), torch.rand(points, device=device, dtype=dtype)
    return [t.requires_grad_() for t in (x, gate)] + [*module.parameters()]


def grouped_experts(points, expert_index, gate, proj_in, bias_in, proj_out, bias_out):
    """PyTorch's own routed product in the experts' place, for comparison."""
    sorted_index, order = expert_index.sort()
    experts = torch.arange(len(proj_in), device=points.device)
    ends = torch.searchsorted(sorted_index, experts, right=True).int()
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    a, g = (product(points[order], proj_in.mT, offs=ends) + bias_in[sorted_index]).chunk(2, dim=-1)
    out = product(a * F.gelu(g), proj_out.mT, offs=ends) + bias_out[sorted_index]
    return torch.empty_like(out).index_copy(0, order, out) * gate[:, None]


def attention(machine):
    """L2 self-attention of one image, 8 heads of 64, in inference and in training."""
    dtype = "bf16" if machine.device.type == "cuda" else "fp32"
    for side in (8, 16, 32, 64):
        qkv = torch.randn(3, 1, 8, side * side, 64, device=machine.device, dtype=DTYPES[dtype])
        leaves = [x.requires_grad_() for x in qkv]
        unreal = [x.detach().to("meta", torch.float32).requires_grad_() for x in leaves]  # whose maps take no memory
        infer, plain = (
            torch.no_grad()(lambda function=function, leaves=leaves: function(*leaves))
            for function, leaves in ((l2_attention, leaves), (plain_attention, unreal))
        )
        yield machine.measure(f"attention, {side}×{side}, {dtype}", infer, dtype, plain)
        train = forward_and_backward(l2_attention, *leaves)
        plain = forward_and_backward(plain_attention, *unreal)
        yield machine.measure(f"attention, {side}×{side}, forward and backward, {dtype}", train, dtype, plain)


def plain_attention(q, k, v):
    """What l2_attention computes, with the whole map in memory."""
    return attend(*(x.flatten(0, 1) for x in (q, k, v)))


def forward_and_backward(function, *leaves):
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


CASES = {
    "sample": sampling,
    "rounding": rounding,
    "sizes": image_sizes,
    "train": training,
    "streaming": streaming,
    "ranks": ranks,
    "gigagan": gigagan,
    "experts": experts,
    "attention": attention,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[c for c in CASES if c != "gigagan"], help="which cases"
    )
    parser.add_argument("--seconds", type=positive_int, default=2, help="to spend on each figure, at least")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=a_path, help="a .json file for the figures")
    args = parser.parse_args()
    with told_in_one_line():
        if args.out:
            check_file(args.out)
        torch.manual_seed(0)
        device = distributed.start(args.device)
        machine = Machine(device, args.seconds)
        print(f"{distributed.describe(device)}, PyTorch {torch.__version__}")
        print(
            ", ".join(f"{name.replace(',', ':', 1)} {rate:.0f}" for name, rate in machine.ceilings.items()),
            HEAD,
            sep="\n\n",
        )
        rows = []
        for case in args.cases:
            for row in tqdm(CASES[case](machine), desc=case, unit="case", leave=False):
                rows.append(row)
                tqdm.write(str(row))
        if args.out:
            figures = {
                "machine": distributed.describe(device),
                "torch": torch.__version__,
                "ceilings": machine.ceilings,
            }
            content = json.dumps(figures | {"rows": [vars(row) for row in rows]}, indent=1) + "\n"
            args.out.write_text(content, "utf-8")


if __name__ == "__main__":
    main()
