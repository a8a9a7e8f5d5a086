"""Draws pictures from text: `python sample.py "a small red circle on a gray background"`."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import distributed
import inference
from checkpoint import DEMO, atomically, load_generator
from errors import HelpFormatter, UserError, finite_number, first_line, natural_number, positive_int, told_in_one_line
from pictures import labelled_grid

NUM_MEAN = 256  # latents behind a prompt's mean code
BATCH = 16


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or more texts, each in quotes")
    add("--prompts", type=Path, help="a UTF-8 text file with a prompt on each line")
    add("--num", type=positive_int, default=4, help="pictures for each prompt")
    add("--seed", type=natural_number, default=0, help="the same seed gives the same pictures")
    add("--truncation", type=finite_number, default=1.0, help="psi: 1 is all variety, 0 each prompt's mean picture")
    add(
        "--checkpoint",
        type=Path,
        default=DEMO,
        help="generator_ema.safetensors of a run, or the authors' aurora_v1.pth",
    )
    add(
        "--clip", help="MODEL:WEIGHTS of open_clip, to read a large CLIP from a file; default: what the checkpoint says"
    )
    add("--out", type=Path, default=Path("sample.png"), help="the picture to write")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=inference.DTYPES, default="fp32", help="bf16: faster, in half the memory, nearly the same")
    add("--compile", action="store_true", help="torch.compile: minutes before the first picture, for very many of them")
    return parser.parse_args(argv)


def read_prompts(args):
    """The prompts of the command line and of the file. Raises UserError where there is none, or one is empty."""
    prompts = list(args.prompt)
    if args.prompts:
        try:
            prompts += [line for line in args.prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"--prompts {args.prompts} is not UTF-8 text; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"--prompts {args.prompts} cannot be read: {error.strerror}") from error
    if not prompts:
        raise UserError(
            'nothing to draw; give a prompt, as: python sample.py "a small red circle on a gray background"'
        )
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; say what to draw")
    return prompts


def check_prompts(clip, prompts):
    """Says which parts of the prompts the CLIP cannot take in."""
    for prompt in prompts:
        shown = prompt if len(prompt) <= 60 else prompt[:60] + "…"
        if cut := clip.num_tokens_cut(prompt):
            print(f'note: "{shown}" is {cut} tokens too long for this CLIP; its end is left out')
        elif unknown := clip.unknown_words(prompt):
            print(f'note: "{shown}": never seen in training: {", ".join(unknown[:10])}')


def check_writable(path):
    """Fails before the work rather than after it."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--out {path}: no picture format is called {path.suffix or 'so'}; use .png or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from error


def save(picture, path):
    """Writes a PIL image, whole or not at all: what stood at the path before is kept where it fails."""
    try:
        atomically(path, lambda temporary: picture.save(temporary, Image.registered_extensions()[path.suffix.lower()]))
    except (OSError, ValueError, KeyError) as error:
        size = f"{picture.width}×{picture.height}"
        raise UserError(f"--out {path} cannot be written at {size} ({first_line(error)}); try .png or less") from error


@torch.no_grad()
def draw(generator, clip, prompt, num, seed, truncation=1.0):
    """`num` pictures of a prompt → [num, 3, R, R]. Their latents depend on the seed alone.

    Truncation is toward the prompt's own mean code: w ← w̄_c + ψ(w − w̄_c), w̄_c over NUM_MEAN latents.
    """
    text = clip.encode_text(clip.tokenize([prompt]))
    global_text, local_text = generator.text_head(text.tokens, text.eot)

    def codes(count, seed):
        z = torch.randn(count, generator.config.z_dim, generator=torch.Generator().manual_seed(seed))
        return generator.mapping(z.to(clip.device), global_text.expand(count, -1))

    mean = codes(NUM_MEAN, seed=0).mean(0)
    w = mean + truncation * (codes(num, seed) - mean)
    with inference.autocast(generator):
        images = [generator.synthesis(part, local_text.expand(len(part), -1, -1)).image for part in w.split(BATCH)]
    return torch.cat(images).clamp(-1, 1)


def main():
    args = parse_args()
    with told_in_one_line():
        prompts = read_prompts(args)
        check_writable(args.out)
        generator, clip, _ = load_generator(args.checkpoint, distributed.start(args.device), args.clip)
        inference.prepare(generator, inference.DTYPES[args.dtype], args.compile)
        check_prompts(clip, prompts)
        progress = tqdm(prompts, unit="prompt", disable=len(prompts) < 2, leave=False)
        images = [draw(generator, clip, prompt, args.num, args.seed, args.truncation) for prompt in progress]
        labels = [prompt for prompt in prompts for _ in range(args.num)]
        save(labelled_grid(torch.cat(images), labels, columns=args.num), args.out)
        size = images[0].shape[-1]
        print(f"{len(labels)} pictures of {size}×{size} by {args.checkpoint.name}, drawn in {args.out.resolve()}")


if __name__ == "__main__":
    main()
