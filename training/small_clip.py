"""Trains a small CLIP on any captioned pictures, in minutes on a CPU, if no CLIP's weights can be downloaded.

    python -m training.small_clip --data emoji --out clip.safetensors

The text encoder, MiniLM, already reads English and is frozen; an image tower and a projection of sentence codes learn.
This is locked-image tuning (Zhai et al. 2022) with the roles of the towers exchanged. The small CLIP also understands
words that no caption contains.
"""

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip import BUILT_IN, load_minilm, new_small, save_small
from common import distributed, stopping
from common.cli import (
    MADE_BY,
    Parser,
    UserError,
    a_path,
    add_data,
    check_file,
    errors_in_one_line,
    natural_number,
)
from common.disk import atomically
from common.distributed import say
from data import sources
from layers import resize
from weights.generator_file import read_safetensors

RESOLUTIONS = (4, 8, 8, 16, 16, 32, 32, 32)  # of the pictures, for an eighth of a batch each: the losses use all
LR = 2e-3
MISLED_AFTER = 0.6  # share of the steps before pictures are misled, see mislead
REACH = 0.1  # of `mislead` in the last step
POOL = 16  # batches drawn at a time; half of them contain captions that are neighbours in the alphabet
STEPS = 1000, 4000  # least and most, by default
MAX_PAIRS = 50_000  # in memory


def train_small_clip(source, steps=None, batch=128, seed=0, device="cpu"):
    """Trains a small CLIP on the pairs of a source of 32×32 images → FrozenClip. The same seed gives the same weights.

    steps: by default the number of pairs, within STEPS. Raises UserError if all captions are the same, and Stopped if
    the process is asked to stop.

    Half of the batches contain captions that are neighbours in the alphabet and so differ in a word or two. Random
    captions alone would teach it to tell a face from a flag, but not skin tones and styles.
    """
    pairs = list(until_stopped(itertools.islice(source.examples(), MAX_PAIRS)))
    source.report(source.skips)
    if len({line for _, captions in pairs for line in captions}) < 2:
        raise UserError("all captions are the same, and a small CLIP learns from differences; give other captions")
    steps = steps or min(max(len(pairs), STEPS[0]), STEPS[1])
    pixels = torch.stack([((image + 1) * 127.5).round().byte() for image, _ in pairs])
    captions = [lines for _, lines in pairs]
    del pairs  # its pictures take four times the memory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = new_small(load_minilm()).to(device)
        clip.log_scale.requires_grad_(True)
        for module in (clip.visual, clip.projection):
            module.requires_grad_(True).train()
        learned = [parameter for parameter in clip.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, LR, betas=(0.9, 0.98), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
        batches = draw_batches(captions, batch)
        for step in until_stopped(tqdm(range(steps), desc="training a small CLIP", unit="step")):
            index, texts = next(batches)
            images = [x.to(device) for x in at_all_resolutions(pixels[index].float() / 127.5 - 1)]
            after = (step / steps - MISLED_AFTER) / (1 - MISLED_AFTER)
            text_codes = clip.text.read(texts).embedding
            learn(clip, optimizer, schedule, images, text_codes, REACH * after if after > 0 else None)
    return clip.requires_grad_(False).eval()


def clip_for(data, preset):
    """The preset's CLIP; "train" if this is the small one of emoji and --data are others."""
    return "train" if preset.clip_model in BUILT_IN and data != "emoji" else preset.clip_model


def clip_of_new_run(path, data, caption_key, seed, device):
    """The main rank trains a small CLIP on a run's data and writes it to `path`, unless the run's last start did.

    Raises UserError if the file is not of a run, and Stopped if the run is asked to stop.
    """
    with distributed.together(), contextlib.suppress(stopping.Stopped):
        made = {"data": str(data), "caption-key": str(caption_key), "seed": str(seed), "text": load_minilm().name}
        former = read_safetensors(path)[0] if path.is_file() else None
        if former is not None and "caption-key" not in former:
            raise UserError(f"{path} is not of a run, which writes its small CLIP there; give another --out")
        if distributed.is_main() and former != made:
            source = sources.open_data(data, 32, seed, caption_key)
            say("First a small CLIP learns from these pictures and captions: a few minutes on one CPU core.")
            clip = train_small_clip(source, seed=seed, device=device)
            atomically(path, lambda temporary: save_small(clip, temporary, made))
    if distributed.broadcast(stopping.asked()):
        raise stopping.Stopped


def until_stopped(things):
    """Yields the things. Raises Stopped if the process is asked to stop."""
    for thing in things:
        if stopping.asked():
            raise stopping.Stopped
        yield thing


def learn(clip, optimizer, schedule, images, codes, reach):
    """One step. codes [B, D]: of the captions. reach: of `mislead`; None: do not mislead."""
    text_features = F.normalize(clip.projection(codes), dim=-1)
    if reach is not None:
        images = mislead(clip, images, text_features.detach(), reach)
    loss = contrast(clip, images, text_features)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()
    clip.log_scale.data.clamp_(max=math.log(100))  # as CLIP


def contrast(clip, images, text_features):
    """CLIP's loss between captions and images. images: a list of batches of different sizes.

    The loss would be the same if the captions that are equal shared their targets, as their features are equal too.
    """
    image_features = F.normalize(clip.encode_image(*images), dim=-1)
    logits = clip.logit_scale * image_features @ text_features.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def mislead(clip, images, text_features, reach):
    """Moves every pixel so that the captions fit less, by up to `reach`, of a range of 2 → images.

    This is one step along the sign of the gradient (Goodfellow et al. 2015). The gradients of networks trained on such
    images change what people see; those of other networks are noise to people (Santurkar et al. 2019).
    """
    images = [part.detach().requires_grad_() for part in images]
    gradients = torch.autograd.grad(contrast(clip, images, text_features), images)
    amounts = [reach * torch.rand(len(part), 1, 1, 1, device=part.device) for part in images]
    return [(x + amount * g.sign()).detach() for x, amount, g in zip(images, amounts, gradients, strict=True)]


def draw_batches(captions, batch):
    """Yields (indices [batch], texts) without end. Half of the batches contain similar texts."""
    while True:
        pool = torch.randint(len(captions), (POOL * batch,)).tolist()
        drawn = [(captions[i][torch.randint(len(captions[i]), ()).item()], i) for i in pool]
        half = len(drawn) // 2
        arranged = [*drawn[:half], *sorted(drawn[half:])]
        for part in torch.randperm(POOL).tolist():
            texts, index = zip(*arranged[part * batch : (part + 1) * batch], strict=True)
            yield torch.tensor(index), list(texts)


def at_all_resolutions(images):
    """Images [B, 3, 32, 32] → a list of batches, an eighth of the images at each of RESOLUTIONS, highest first."""
    parts = zip(images.tensor_split(len(RESOLUTIONS)), RESOLUTIONS[::-1], strict=True)
    return [resize(part, r) for part, r in parts if len(part)]


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add_data(parser.add_argument)
    parser.add_argument("--out", type=a_path, required=True, help="the file to write, for --clip of train.py")
    parser.add_argument("--seed", type=natural_number, default=0)
    args = parser.parse_args()
    with errors_in_one_line():
        check_file(args.out)
        if args.out.suffix != ".safetensors":
            raise UserError(f"--out {args.out}: name a file that ends with .safetensors")
        source = sources.open_data(args.data, 32, args.seed, args.caption_key)
        source.announce()
        clip = train_small_clip(source, STEPS[1], seed=args.seed)
        about = {MADE_BY: f"training.small_clip --data {args.data} --seed {args.seed}"}
        atomically(args.out, lambda temporary: save_small(clip, temporary, about))
        print(f"A small CLIP for --clip of train.py: {args.out}")


if __name__ == "__main__":
    main()
