"""Trains Aurora: `python train.py` on a laptop, `torchrun train.py` on one GPU or on 64.

One step: a batch of captioned images; the discriminator learns to tell them from samples and right captions from wrong
ones; the generator learns against it and towards CLIP; the moving average follows. The resolution grows when the
generator's FID comes near the reference FID, the distance between two sets of real images.
"""

import argparse
import copy
import dataclasses
import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import distributed
from aurora import Generator
from clip import load_clip
from discriminator import Discriminator
from errors import HelpFormatter, UserError, first_line, natural_number, positive_int, told_in_one_line
from layers import parameter_groups
from losses import DiscriminatorLoss, generator_loss, wrong_captions
from metrics import expert_counts, fake_features, fid, pyramid, real_features
from pictures import labelled_grid
from presets import PRESETS, fitted_to

R1_INTERVAL = 16  # steps; R1 is computed once in so many and weighed by as much (StyleGAN2, section 4.1)
PATIENCE = 10  # evaluations without a better FID after which a stage ends
NUM_PICTURES = 24


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="shapes", help="network sizes and training recipe, see presets.py")
    add(
        "--data",
        default="shapes",
        help="shapes (drawn on the fly), a folder of images with .txt captions, or .tar shards",
    )
    add("--out", type=Path, help="the run's folder (default: runs/PRESET)")
    add("--steps", type=positive_int, help="total steps of the run (default: the preset's; shapes: 20000)")
    add("--batch", type=positive_int, help="global batch, over all ranks (default: the preset's; shapes: 32)")
    add("--seed", type=natural_number, default=0, help="of weights, data and noise")
    add("--resume", default="auto", help="auto: go on with the run in --out, if there is one; no; or a checkpoint.pt")
    add(
        "--clip", help="small, a clip.safetensors, or MODEL:WEIGHTS of open_clip (default: the preset's; shapes: small)"
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--save-every", type=positive_int, default=250, help="steps between checkpoints")
    add("--sample-every", type=positive_int, default=50, help="steps between sample grids")
    add(
        "--workers",
        type=natural_number,
        default=1,
        help="processes that load data, for each rank; 0: none of their own",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.preset
    return args


@dataclass
class Progress:
    """Where a run stands; part of its checkpoint."""

    step: int = 0
    stage: int = 0  # index of the active resolution
    stage_images: int = 0  # real images seen at this resolution
    best_fid: float = float("inf")  # at this resolution
    evaluations_since_best: int = 0
    reference_fid: dict[int, float] = field(default_factory=dict)
    skipped: int = 0  # broken pairs of the data that were passed over
    rejected: int = 0  # updates that were left out because a gradient was not finite
    seconds: float = 0.0  # spent on steps and evaluations


class Run:
    """Everything a run holds. `train` goes through its steps; each method below it is one of their parts."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.recipe = PRESETS[args.preset].recipe
        self.batch = args.batch or self.recipe.batch
        self.steps = args.steps or self.recipe.steps
        if self.batch < 2:
            raise UserError("--batch 1 leaves no wrong caption to compare with; choose at least 2")
        if self.batch % distributed.world_size():
            raise UserError(
                f"--batch {self.batch} cannot be shared by {distributed.world_size()} ranks; choose a multiple"
            )
        self.identity = {
            "preset": args.preset,
            "data": args.data,
            "batch": self.batch,
            "seed": args.seed,
            "clip": args.clip or self.recipe.clip_model,
        }
        self.prepare_folder()
        resumed = self.find_checkpoint()

        self.clip = load_clip(self.identity["clip"], device)
        preset = fitted_to(PRESETS[args.preset], self.clip.width, self.clip.map_shapes)
        torch.manual_seed(args.seed)
        self.generator = Generator(preset.generator).to(device)
        self.discriminator = Discriminator(preset.discriminator).to(device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(parameter_groups(network, lr), betas=(0.0, 0.99), fused=True)
            for network, lr in (
                (self.generator, self.recipe.lr_generator),
                (self.discriminator, self.recipe.lr_discriminator),
            )
        )
        self.resolutions = [level.resolution for level in preset.generator.levels]
        self.source = data.open_data(args.data, self.resolutions[-1], args.seed)
        self.progress = Progress()
        self.asked_to_stop = self.stopping = False
        if resumed:
            self.load(resumed)
        self.set_stage()

    # ------------------------------------------------------------------------------------------------------------------
    # Setting up.

    def prepare_folder(self):
        try:
            self.args.out.mkdir(parents=True, exist_ok=True)
            (self.args.out / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.args.out} cannot be written: {error.strerror}") from error

    def find_checkpoint(self):
        """The checkpoint to go on from, loaded, or None for a new run."""
        existing, orphan = self.args.out / "checkpoint.pt", self.args.out / "generator_ema.safetensors"
        if orphan.exists() and not existing.exists():
            raise UserError(f"{self.args.out} holds a generator but no checkpoint.pt to go on from; give another --out")
        if self.args.resume == "no":
            if existing.exists():
                raise UserError(
                    f"--resume no, but {self.args.out} holds a run; give another --out, or remove that folder"
                )
            return None
        path = existing if self.args.resume == "auto" else Path(self.args.resume)
        if existing.exists() and path.resolve() != existing.resolve():
            raise UserError(f"--resume {path}, but {self.args.out} holds a run of its own; give another --out")
        if self.args.resume == "auto" and not path.exists():
            return None
        if not path.is_file():
            raise UserError(f"--resume {path}: no such checkpoint; use auto to go on in --out, or no to start afresh")
        state = checkpoint.load_run(path)
        changed = [name for name, value in self.identity.items() if state["identity"].get(name) != value]
        if changed:
            now = ", ".join(f"--{name} {state['identity'].get(name)}" for name in changed)
            raise UserError(f"the run in {path} was started with {now}; repeat that, or give another --out")
        return state

    def set_stage(self):
        """Lets the parameters of the active resolutions learn, and no others; DDP must not wait for the rest."""
        active = self.resolutions[self.progress.stage]
        self.active = self.resolutions[: self.progress.stage + 1]
        for level in self.generator.synthesis.levels:
            level.requires_grad_(level.resolution <= active)
        self.freeze_discriminator(False)
        self.parallel_generator = self.parallel(self.generator)
        self.discriminator_loss = self.parallel(DiscriminatorLoss(self.discriminator, self.clip, self.recipe))

    def freeze_discriminator(self, frozen):
        self.discriminator.requires_grad_(not frozen)
        resting = [str(r) for r in self.resolutions if r not in self.active]
        for modules in (self.discriminator.stages, self.discriminator.heads):
            for resolution in resting:
                modules[resolution].requires_grad_(False)

    def parallel(self, module):
        if distributed.world_size() == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)

    # ------------------------------------------------------------------------------------------------------------------
    # Training.

    def train(self):
        self.write_config()
        self.prepare_evaluation()
        if unknown := {word for caption in self.fid_captions for word in self.clip.unknown_words(caption)}:
            say(
                f"note: the small CLIP does not know {len(unknown)} words of these captions, as {min(unknown)}; for "
                "such data take another, as --clip ViT-B-32-quickgelu:openai"
            )
        say(f"Training {self.args.preset} on {self.device}, {distributed.world_size()} rank(s); all in {self.args.out}")
        p, batches = self.progress, data.loader(self.source, self.progress.step, self.batch, self.args.workers)
        bar = tqdm(total=self.steps, initial=p.step, unit="step", disable=not distributed.is_main(), dynamic_ncols=True)
        log = self.open_log()
        self.stop_after_this_step_on_interrupt()
        while p.step < self.steps and not self.stopping:
            started = time.perf_counter()
            resolution, report = self.active[-1], self.step(next(batches))
            p.step += 1
            p.stage_images += self.batch
            if p.step % max(1, self.recipe.fid_every // self.batch) == 0:
                report |= self.evaluate()
            self.grow_if_learned()
            seconds = time.perf_counter() - started
            p.seconds += seconds
            if distributed.is_main():
                row = {"step": p.step, "images": p.step * self.batch, "resolution": resolution, **report}
                log.write(json.dumps(row | {"seconds": round(seconds, 4)}) + "\n")
                log.flush()
            last = p.step == self.steps or self.stopping
            if p.step % self.args.sample_every == 0 or last:
                self.draw_samples()
            if p.step % self.args.save_every == 0 or last:
                self.save()
            bar.set_postfix_str(
                f"{resolution}×{resolution}, {self.batch / seconds:.0f} images/s, "
                f"D {report['d_loss']:.2f}, G {report['g_loss']:.2f}",
                refresh=False,
            )
            bar.update()
        bar.close()
        if p.skipped or p.rejected:
            say(f"{p.skipped} broken pairs of the data were skipped, {p.rejected} updates left out as not finite.")
        name = self.args.out / "generator_ema.safetensors"
        ended = "Stopped and saved; the same command goes on from here." if p.step < self.steps else "Done."
        say(f'{ended} {p.step} steps. The generator: {name}\nNow: python sample.py "…" --checkpoint {name}')

    def stop_after_this_step_on_interrupt(self):
        """Ctrl-C and SIGTERM let the step end, so that what is saved is whole; a second one ends at once."""

        def ask(number, _):
            self.asked_to_stop = True
            signal.signal(number, signal.default_int_handler)
            say("Stopping after this step …")

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)

    def step(self, batch):
        """One step of both networks → what happened, as plain numbers."""
        self.progress.skipped += batch.skipped
        real = pyramid(batch.images.to(self.device, non_blocking=True), self.active)
        ids = self.clip.tokenize(batch.captions)
        text = self.clip.encode_text(ids)
        mine = slice(distributed.rank() * len(ids), (distributed.rank() + 1) * len(ids))
        wrong = wrong_captions(distributed.gather(ids))[mine]
        r1_interval = R1_INTERVAL if self.progress.step % R1_INTERVAL == 0 else 0

        with self.autocast():
            output = self.parallel_generator(self.noise()[mine], text.tokens, text.eot, self.active[-1])
            fake = {r: image.detach() for r, image in output.pyramid.items()}
            d_report = self.discriminator_loss(real, fake, text, wrong, r1_interval)
        d_norm = self.update(self.optimizer_d, d_report["loss"])

        self.freeze_discriminator(True)
        with self.autocast():
            g_report = generator_loss(output, text, wrong, self.discriminator, self.clip, self.recipe)
        g_norm = self.update(self.optimizer_g, g_report["loss"])
        self.freeze_discriminator(False)

        if d_norm.isfinite() and g_norm.isfinite():
            self.update_ema(output)
        scalars = {"d_loss": d_report.pop("loss"), **d_report, "g_loss": g_report.pop("loss"), **g_report}
        scalars |= {"d_grad_norm": d_norm, "g_grad_norm": g_norm, "expert_min_share": self.least_used_expert(output)}
        scalars["stop"] = d_norm.new_tensor(self.asked_to_stop)
        values = distributed.mean(torch.stack([value.detach().float() for value in scalars.values()])).tolist()
        report = dict(zip(scalars, values, strict=True))
        self.stopping = report.pop("stop") > 0  # on every rank alike
        return report | {"skipped": self.progress.skipped, "rejected": self.progress.rejected}

    def autocast(self):
        """bfloat16 on a GPU; the modules keep routing, demodulation, distances and R1 in float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def noise(self):
        """z of the whole global batch, [batch, z_dim]; every rank draws all of it and takes its own."""
        number = (self.args.seed << 40) + self.progress.step
        generator = torch.Generator().manual_seed(number % 2**63)
        return torch.randn(self.batch, self.generator.config.z_dim, generator=generator).to(self.device)

    def update(self, optimizer, loss):
        """One optimizer step, left out on every rank alike where a gradient is not finite → the gradient's norm."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            optimizer.step()
        else:
            self.progress.rejected += 1
            say(f"step {self.progress.step}: a gradient was not finite, so this update was left out")
        return norm

    @torch.no_grad()
    def update_ema(self, output):
        """The moving average, its half-life short at first so that it does not remember the initial weights."""
        half_life = min(self.recipe.ema_half_life, 0.05 * (self.progress.step + 1) * self.batch)
        decay = 0.5 ** (self.batch / max(half_life, 1e-8))
        self.generator.update_w_avg(distributed.mean(output.w.float().mean(0)))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)
        self.ema.w_avg.copy_(self.generator.w_avg)

    def least_used_expert(self, output):
        """The smallest share of points that any expert got at any layer in this batch; 1 if all got the same."""
        counts = expert_counts(self.generator.config, output.routes).values()
        return torch.stack([output.w.new_ones(()), *(count.min() / count.float().mean() for count in counts)]).min()

    # ------------------------------------------------------------------------------------------------------------------
    # Growing.

    def prepare_evaluation(self):
        """Two disjoint sets of real images: their FID is the reference, one lends its captions and one its features."""
        count = self.recipe.fid_samples
        features, captions = real_features(
            self.clip, self.source.evaluation(), 2 * count, self.resolutions, self.device
        )
        if len(captions) < 4:
            raise UserError(f"--data {self.args.data} holds {len(captions)} readable pairs; training needs at least 4")
        half = len(captions) // 2
        self.picture_captions = captions[:NUM_PICTURES]
        self.fid_captions = captions[:half]
        self.fid_features = {r: f[half : 2 * half] for r, f in features.items()}
        reference = {r: fid(f[:half], f[half : 2 * half]) for r, f in features.items()}
        self.progress.reference_fid = {r: agreed(value, self.device) for r, value in reference.items()}

    def evaluate(self):
        """The moving average's FID at the active resolution, beside its reference."""
        p, active = self.progress, self.active[-1]
        features = fake_features(self.ema, self.clip, self.fid_captions, active, self.args.seed)
        value = agreed(fid(features, self.fid_features[active]), self.device)
        p.evaluations_since_best = 0 if value < p.best_fid else p.evaluations_since_best + 1
        p.best_fid = min(p.best_fid, value)
        return {"fid": value, "reference_fid": p.reference_fid[active]}

    def grow_if_learned(self):
        """Goes on to the next resolution when this one's FID is near the reference, or stops falling, or time is up."""
        p, active = self.progress, self.active[-1]
        if active == self.resolutions[-1]:
            return
        learned = p.best_fid <= self.recipe.fid_factor * p.reference_fid[active]
        over = p.stage_images >= self.recipe.images_per_stage[active]
        stalled = p.evaluations_since_best >= PATIENCE
        if learned or over or stalled:
            reasons = {"it is near the reference": learned, "it stopped falling": stalled, "that took its images": over}
            why = next(reason for reason, holds in reasons.items() if holds)
            say(f"{active}×{active} done: FID {p.best_fid:.3g}, reference {p.reference_fid[active]:.3g}; {why}.")
            p.stage, p.stage_images, p.best_fid, p.evaluations_since_best = p.stage + 1, 0, float("inf"), 0
            self.set_stage()

    # ------------------------------------------------------------------------------------------------------------------
    # Files.

    def write_config(self):
        if distributed.is_main():
            config = {name: str(value) for name, value in vars(self.args).items()} | self.identity
            config |= {"steps": self.steps, "world_size": distributed.world_size(), "torch": torch.__version__}
            config["recipe"] = dataclasses.asdict(self.recipe)
            (self.args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if not (self.args.out / "checkpoint.pt").exists():
                self.save()

    def open_log(self):
        """metrics.jsonl, without the lines of steps that are about to be made again."""
        if not distributed.is_main():
            return None
        path = self.args.out / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if 0 < step_of(line) <= self.progress.step]
        path.write_text("".join(line + "\n" for line in kept))
        return path.open("a")

    @torch.no_grad()
    def draw_samples(self):
        """A grid of fixed prompts and fixed z, by the moving average."""
        if not distributed.is_main():
            return
        text = self.clip.encode_text(self.clip.tokenize(self.picture_captions))
        z = torch.randn(len(self.picture_captions), self.ema.config.z_dim, generator=torch.Generator().manual_seed(1))
        images = self.ema(z.to(self.device), text.tokens, text.eot, self.active[-1]).image
        grid = labelled_grid(images, self.picture_captions, columns=8)
        grid.save(self.args.out / "samples" / f"step_{self.progress.step:07d}.png")

    def save_generator(self):
        notes = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **self.identity,
            "step": self.progress.step,
            "images": self.progress.step * self.batch,
            "resolution": self.active[-1],
            "seconds": round(self.progress.seconds),
            "machine": f"{distributed.world_size()} × {distributed.describe(self.device)}",
            "torch": torch.__version__,
        }
        path = self.args.out / "generator_ema.safetensors"
        checkpoint.save_generator(path, self.ema, self.clip, self.active[-1], notes)

    def save(self):
        if not distributed.is_main():
            return
        state = {
            "identity": self.identity,
            "progress": vars(self.progress),
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
        }
        checkpoint.save_run(self.args.out / "checkpoint.pt", state)
        self.save_generator()

    def load(self, state):
        try:
            for name in ("generator", "discriminator", "ema", "optimizer_g", "optimizer_d"):
                getattr(self, name).load_state_dict(state[name])
            self.progress = Progress(**state["progress"])
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit preset {self.args.preset}: {first_line(error)}") from error
        say(f"Going on from step {self.progress.step}.")


def step_of(line):
    """The step of a line of metrics.jsonl, or 0 for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 0


def agreed(value, device):
    """A number on which all ranks agree to the last bit, so that they grow together."""
    return distributed.mean(torch.tensor(value, dtype=torch.float64, device=device)).item()


def say(message):
    if distributed.is_main():
        tqdm.write(message)


def main():
    args = parse_args()
    with told_in_one_line():
        device = distributed.start(args.device)
        try:
            Run(args, device).train()
        finally:
            distributed.stop()


if __name__ == "__main__":
    main()
