"""Trains Aurora: `python train.py` on a laptop, `torchrun train.py` on one GPU or on 64.

One step: a batch of captioned images; the discriminator learns to tell them from samples and right captions from wrong
ones; the generator learns against it and towards CLIP; the moving average follows. The resolution grows when the
generator's FID comes near the reference FID, the distance between two sets of real images.
"""

import argparse
import contextlib
import copy
import dataclasses
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from augment import NUM_CHANCES
from aurora import Generator
from clip import Text, load_clip
from common import distributed
from common.cli import HelpFormatter, UserError, first_line, natural_number, positive_int, told_in_one_line
from common.distributed import say
from data import sources
from data.pairs import CAUSES
from discriminator import Discriminator
from evaluation.metrics import expert_counts
from layers import full_precision, parameter_groups, pyramid
from losses import R1_INTERVAL, DiscriminatorLoss, generator_loss, wrong_captions
from presets import PRESETS, fitted_to
from sampling.inference import DTYPES, dtype_of
from sampling.pictures import grid, to_pil
from training.growth import Growth, Stage
from training.guard import Guard
from training.plan import HARDWARE, plan
from training.run_folder import RunFolder
from weights import checkpoint

NUM_PICTURES = 24
STATEFUL = ("generator", "discriminator", "ema", "optimizer_g", "optimizer_d")
COME_AGAIN = 75  # the exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="emoji", help="network sizes and training recipe, see presets.py")
    add("--data", help="emoji, shapes, a folder of images with .txt captions, or .tar shards (default: the preset's)")
    add("--out", type=Path, help="the run's folder (default: runs/PRESET)")
    add("--steps", type=positive_int, help="total steps of the run (default: the preset's)")
    add("--batch", type=positive_int, help="global batch, over all ranks (default: the preset's)")
    add("--accumulate", type=positive_int, default=1, help="parts to make each batch in, where memory is short")
    add("--seed", type=natural_number, default=0, help="of weights, data and noise")
    add(
        "--resume",
        default="auto",
        help="auto: go on with the run in --out, if there is one; no; or a file in its checkpoints",
    )
    add(
        "--clip",
        help="small, emoji, a file of training/small_clip.py, or MODEL:WEIGHTS of open_clip (default: the preset's)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of products; auto: bf16 where the device is fast at it",
    )
    add("--save-every", type=positive_int, default=250, help="steps between checkpoints")
    add("--save-minutes", type=positive_int, default=15, help="minutes between checkpoints, where steps are slow")
    add("--keep", type=positive_int, default=3, help="checkpoints to keep, the last ones")
    add("--sample-every", type=positive_int, default=50, help="steps between sample grids")
    add(
        "--workers",
        type=natural_number,
        default=1,
        help="processes that load data, for each rank; 0: none of their own",
    )
    add("--tensorboard", action="store_true", help="also write what `tensorboard --logdir OUT` shows")
    add("--plan", action="store_true", help="no training: what it would take, computed for GPUs, see plan.py")
    add("--gpus", type=positive_int, default=64, help="of --plan, beside 1, 8 and 64")
    add("--hardware", choices=HARDWARE, default="a100", help="of --plan")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.preset
    args.data = args.data or PRESETS[args.preset].recipe.data
    return args


@dataclass
class Progress:
    """Where a run stands; part of its checkpoint. Noise, data and captions of a step depend on its number alone, so
    there is no state of a random number generator to keep."""

    step: int = 0
    skipped: Counter = field(default_factory=Counter)  # pairs of the data that were passed over, by cause
    rejected: int = 0  # updates that were left out because a gradient was not finite
    seconds: float = 0.0  # spent on steps and evaluations


class Part(NamedTuple):
    """This rank's share of what a step learns from at a time: the global batch, or one of the parts it is made in."""

    real: dict[int, torch.Tensor]  # the pyramid of the images
    text: Text  # of their captions
    wrong: torch.Tensor  # [b], for each caption the index of another one in the part, over all ranks
    z: torch.Tensor  # [b, z_dim]
    chances: torch.Tensor  # [b, 2, NUM_CHANCES], of the augmentation of real images and of fake ones


class Run:
    """Everything a run holds. `train` goes through its steps; each method below it is one of their parts."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.recipe = PRESETS[args.preset].recipe
        self.batch = args.batch or self.recipe.batch
        self.steps = args.steps or self.recipe.steps
        self.check_batch()
        clip = args.clip or self.recipe.clip_model
        identity = {"preset": args.preset, "data": args.data, "batch": self.batch, "seed": args.seed, "clip": clip}
        self.folder = RunFolder(args.out, identity, args.tensorboard)
        state = self.folder.state(args.resume)
        with distributed.together():
            self.build(clip)
            self.progress = Progress()
            if state:
                self.load(state)
        self.guard = Guard(say)
        self.asked_to_stop = self.stopping = False
        self.set_stage()

    # ------------------------------------------------------------------------------------------------------------------
    # Setting up.

    def check_batch(self):
        ranks, parts = distributed.world_size(), self.args.accumulate
        if self.batch // parts < 2:
            raise UserError(
                f"--batch {self.batch} in {parts} part(s) leaves no wrong caption to compare with; take 2 or more each"
            )
        if self.batch % (ranks * parts):
            raise UserError(
                f"--batch {self.batch} cannot be shared by {ranks} ranks in {parts} parts; choose a multiple"
            )

    def build(self, clip):
        """The networks, their optimizers, and the data."""
        self.clip = load_clip(clip, self.device)
        preset = fitted_to(PRESETS[self.args.preset], self.clip.width, self.clip.map_shapes)
        torch.manual_seed(self.args.seed)
        self.generator = Generator(preset.generator).to(self.device)
        self.discriminator = Discriminator(preset.discriminator).to(self.device)
        self.generator.synthesis.recompute = self.recipe.recompute
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(parameter_groups(network, lr), betas=(0.0, 0.99), fused=True)
            for network, lr in (
                (self.generator, self.recipe.lr_generator),
                (self.discriminator, self.recipe.lr_discriminator),
            )
        )
        resolutions = [level.resolution for level in preset.generator.levels]
        self.growth = Growth(self.recipe, resolutions, self.clip, self.args.seed)
        self.source = sources.open_data(self.args.data, resolutions[-1], self.args.seed)

    def set_stage(self):
        """Lets the parameters of the active resolutions learn, and no others; DDP must not wait for the rest."""
        for level in self.generator.synthesis.levels:
            level.requires_grad_(level.resolution in self.growth.active)
        self.freeze_discriminator(False)
        self.parallel_generator = self.parallel(self.generator)
        self.discriminator_loss = self.parallel(DiscriminatorLoss(self.discriminator, self.clip, self.recipe))

    def freeze_discriminator(self, frozen):
        self.discriminator.requires_grad_(not frozen)
        resting = [str(r) for r in self.growth.resolutions if r not in self.growth.active]
        for modules in (self.discriminator.stages, self.discriminator.heads):
            for resolution in resting:
                modules[resolution].requires_grad_(False)

    def parallel(self, module):
        if distributed.world_size() == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Training.

    def train(self):
        """Goes on up to the last step, or to when the run is asked to stop → whether it was."""
        with self.stopping_when_asked():
            self.growth.measure_reference(self.source)
            self.introduce()
            self.make_steps()
            self.conclude()
        return self.progress.step < self.steps

    def make_steps(self):
        p, parts = self.progress, self.args.accumulate
        batches = sources.loader(self.source, p.step * parts, self.batch // parts, self.args.workers)
        bar = tqdm(total=self.steps, initial=p.step, unit="step", disable=not distributed.is_main(), dynamic_ncols=True)
        self.folder.open_log(p.step)
        saved_at = time.monotonic()
        while p.step < self.steps and not self.stopping:
            started = time.perf_counter()
            with distributed.together():
                step_batches = [next(batches) for _ in range(parts)]
            rejected = p.rejected
            resolution, report = self.growth.active[-1], self.step(step_batches)
            p.step += 1
            self.growth.stage.images += self.batch
            self.guard.watch(report, p.rejected - rejected, self.folder.last_good)
            if p.step % max(1, self.recipe.fid_every // self.batch) == 0:
                report |= self.growth.evaluate(self.ema)
            self.grow_if_learned()
            seconds = time.perf_counter() - started
            p.seconds += seconds
            row = {"step": p.step, "images": p.step * self.batch, "resolution": resolution, **report}
            self.folder.log(row | {"skipped": p.skipped.total(), "rejected": p.rejected, "seconds": round(seconds, 4)})
            last = p.step == self.steps or self.stopping
            if p.step % self.args.sample_every == 0 or last:
                self.draw_samples()
            if p.step % self.args.save_every == 0 or last or time.monotonic() - saved_at > 60 * self.args.save_minutes:
                self.save()
                saved_at = time.monotonic()
            bar.set_postfix_str(
                f"{resolution}×{resolution}, {self.batch / seconds:.0f} images/s, "
                f"D {report['d_loss']:.2f}, G {report['g_loss']:.2f}",
                refresh=False,
            )
            bar.update()
        bar.close()

    @contextlib.contextmanager
    def stopping_when_asked(self):
        """Ctrl-C, SIGTERM and SIGUSR1 let the step end, so that all is saved whole; a second Ctrl-C ends at once."""

        def ask(number, _):
            if not self.asked_to_stop:
                say("Stopping after this step …")
            self.asked_to_stop = True
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)

        former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def step(self, batches):
        """One step of both networks from the parts of a global batch → what happened, as plain numbers."""
        parts = [self.prepare(number, batch) for number, batch in enumerate(batches)]
        with torch.set_grad_enabled(len(parts) == 1), self.autocast():
            outputs = [self.draw(part) for part in parts]
        r1_interval = R1_INTERVAL if self.progress.step % R1_INTERVAL == 0 else 0

        def discriminate(part, output):
            fake = {r: image.detach() for r, image in output.pyramid.items()}
            return self.discriminator_loss(part.real, fake, part.text, part.wrong, part.chances, r1_interval)

        def generate(part, output):
            if len(parts) > 1:  # together their graphs would take the memory that making parts is to save
                output = self.draw(part)
            chances = part.chances[:, 1]
            return generator_loss(output, part.text, part.wrong, chances, self.discriminator, self.clip, self.recipe)

        d_report, d_norm = self.update(self.optimizer_d, self.discriminator_loss, discriminate, parts, outputs)
        self.freeze_discriminator(True)
        g_report, g_norm = self.update(self.optimizer_g, self.parallel_generator, generate, parts, outputs)
        self.freeze_discriminator(False)
        if d_norm.isfinite() and g_norm.isfinite():
            self.update_ema(torch.stack([full_precision(output.w.detach()).mean(0) for output in outputs]).mean(0))
        scalars = {"d_loss": d_report.pop("loss"), **d_report, "g_loss": g_report.pop("loss"), **g_report}
        scalars |= {"d_grad_norm": d_norm, "g_grad_norm": g_norm}
        scalars["expert_min_share"] = torch.stack([self.least_used_expert(output) for output in outputs]).min()
        skipped = sum((batch.skipped for batch in batches), Counter())
        for name, number in {"stop": self.asked_to_stop, **{cause: skipped[cause] for cause in CAUSES}}.items():
            scalars[name] = d_norm.new_tensor(float(number))
        return self.reduce(scalars)

    def prepare(self, number, batch):
        """A batch as the data source made it → Part, the `number`-th of this step."""
        ids = self.clip.tokenize(batch.captions)
        ranks, first = distributed.world_size(), distributed.rank() * len(ids)
        mine = slice(first, first + len(ids))
        z, chances = (x[number * ranks * len(ids) :][mine] for x in self.noise())
        real = pyramid(batch.images.to(self.device, non_blocking=True), self.growth.active)
        return Part(real, self.clip.encode_text(ids), wrong_captions(distributed.gather(ids))[mine], z, chances)

    def noise(self):
        """z and chances of the whole global batch; every rank draws all of it and takes its own."""
        number = (self.args.seed << 40) + self.progress.step
        generator = torch.Generator().manual_seed(number % 2**63)
        z = torch.randn(self.batch, self.generator.config.z_dim, generator=generator)
        return z.to(self.device), torch.rand(self.batch, 2, NUM_CHANCES, generator=generator).to(self.device)

    def draw(self, part):
        return self.parallel_generator(part.z, part.text.tokens, part.text.eot, self.growth.active[-1])

    def autocast(self):
        """bfloat16 where asked for; the modules keep routing, demodulation, distances and R1 in float32."""
        narrow = dtype_of(self.args.dtype, self.device) == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=narrow)

    def update(self, optimizer, module, objective, *parts):
        """One optimizer step by the mean of objective(part)["loss"] over the parts → what it reports, gradient norm.

        The ranks' gradients are averaged by DDP, around `module`, with the last part. Where the result is not finite,
        which it is on all ranks alike, the step is left out.
        """
        optimizer.zero_grad(set_to_none=True)
        reports, remaining = [], len(parts[0])
        for part in zip(*parts, strict=True):
            remaining -= 1
            waits = remaining and isinstance(module, DistributedDataParallel)
            with module.no_sync() if waits else contextlib.nullcontext():
                with self.autocast():
                    report = objective(*part)
                (report["loss"] / len(parts[0])).backward()
            reports.append({name: value.detach().float() for name, value in report.items()})
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            optimizer.step()
        else:
            self.progress.rejected += 1
            say(f"step {self.progress.step}: a gradient was not finite, so this update was left out")
        means = {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}
        return means, norm

    def reduce(self, scalars):
        """Scalars of this rank → their means over ranks; what was skipped is added up, and whether to stop told."""
        values = distributed.mean(torch.stack([value.detach().float() for value in scalars.values()])).tolist()
        report = dict(zip(scalars, values, strict=True))
        self.stopping = report.pop("stop") > 0  # on every rank alike
        for cause in CAUSES:
            self.progress.skipped[cause] += round(distributed.world_size() * report.pop(cause))
        return report

    @torch.no_grad()
    def update_ema(self, w):
        """The moving average, its half-life short at first so that it does not remember the initial weights.

        w: the mean of this step's latent codes, [w_dim].
        """
        half_life = min(self.recipe.ema_half_life, 0.05 * (self.progress.step + 1) * self.batch)
        decay = 0.5 ** (self.batch / max(half_life, 1e-8))
        self.generator.update_w_avg(distributed.mean(w))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)
        self.ema.w_avg.copy_(self.generator.w_avg)

    def least_used_expert(self, output):
        """The smallest share of points that any expert got at any layer in this batch; 1 if all got the same."""
        counts = expert_counts(self.generator.config, output.routes).values()
        return torch.stack([output.w.new_ones(()), *(count.min() / count.float().mean() for count in counts)]).min()

    def grow_if_learned(self):
        if reason := self.growth.reason_to_grow():
            stage, resolution = self.growth.stage, self.growth.active[-1]
            fids = f"FID {stage.best_fid:.3g}, reference {stage.reference_fid[resolution]:.3g}"
            say(f"{resolution}×{resolution} done: {fids}; {reason}.")
            self.growth.grow()
            self.set_stage()

    # ------------------------------------------------------------------------------------------------------------------
    # Telling and saving.

    def introduce(self):
        config = {name: str(value) for name, value in vars(self.args).items()} | self.folder.identity
        config |= {"steps": self.steps, "world_size": distributed.world_size(), "torch": torch.__version__}
        self.folder.write_config(config | {"recipe": dataclasses.asdict(self.recipe)})
        if not self.folder.last_good:
            self.save()
        if unknown := {word for caption in self.growth.fid_captions for word in self.clip.unknown_words(caption)}:
            say(
                f"note: the small CLIP does not know {len(unknown)} words of these captions, as {min(unknown)}; for "
                "such data take another, as --clip ViT-B-32-quickgelu:openai"
            )
        ranks = distributed.world_size()
        say(f"Training {self.args.preset} on {self.device}, {ranks} rank(s); all in {self.args.out}")

    def conclude(self):
        p, folder = self.progress, self.folder
        if p.skipped.total() or p.rejected:
            causes = ", ".join(f"{count} {cause}" for cause, count in p.skipped.most_common() if count)
            say(f"Of the data was skipped: {causes or 'nothing'}. {p.rejected} updates were left out as not finite.")
        with distributed.together():
            if distributed.is_main() and folder.saved_step != p.step:
                raise UserError(f"step {p.step} is not saved; the last good checkpoint: {folder.last_good or 'none'}")
        ended = "Stopped and saved; the same command goes on from here." if p.step < self.steps else "Done."
        say(f"{ended} {p.step} steps. The generator: {folder.generator}")
        say(f'Now: python sample.py "…" --checkpoint {folder.generator}')

    @torch.no_grad()
    def draw_samples(self):
        """A grid of fixed prompts and fixed z, by the moving average."""
        if not distributed.is_main():
            return
        captions = self.growth.captions[:NUM_PICTURES]
        text = self.clip.encode_text(self.clip.tokenize(captions))
        z = torch.randn(len(captions), self.ema.config.z_dim, generator=torch.Generator().manual_seed(1))
        output = self.ema(z.to(self.device), text.tokens, text.eot, self.growth.active[-1])
        counts = expert_counts(self.ema.config, output.routes)
        loads = {name: count / count.sum() for name, count in counts.items()}
        picture = grid([to_pil(image) for image in output.image], captions, columns=8)
        self.folder.write_picture(picture, loads, self.progress.step)

    def save_generator(self, path):
        notes = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **self.folder.identity,
            "step": self.progress.step,
            "images": self.progress.step * self.batch,
            "resolution": self.growth.active[-1],
            "seconds": round(self.progress.seconds),
            "machine": f"{distributed.world_size()} × {distributed.describe(self.device)}",
            "torch": torch.__version__,
        }
        checkpoint.save_generator(path, self.ema, self.clip, self.growth.active[-1], notes)

    def save(self):
        """Writes all that the run needs to go on, unless its weights may be about to break."""
        if not self.guard.trusts_the_weights:
            return
        state = {
            "world_size": distributed.world_size(),
            "progress": vars(self.progress) | {"skipped": dict(self.progress.skipped)},
            "stage": vars(self.growth.stage),
            **{name: getattr(self, name).state_dict() for name in STATEFUL},
        }
        self.folder.save(self.progress.step, state, self.args.keep, self.save_generator)

    def load(self, state):
        try:
            for name in STATEFUL:
                getattr(self, name).load_state_dict(state[name])
            self.progress = Progress(**state["progress"] | {"skipped": Counter(state["progress"]["skipped"])})
            self.growth.stage = Stage(**state["stage"])
            then, now = state["world_size"], distributed.world_size()
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit preset {self.args.preset}: {first_line(error)}") from error
        self.folder.saved_step = self.progress.step
        say(f"Going on from step {self.progress.step}.")
        if then != now:
            say(f"note: so far on {then} rank(s), now on {now}: the same but for rounding, and for the order of shards")


def main():
    args = parse_args()
    with told_in_one_line():
        if args.plan:
            print("Going through two steps with empty tensors; about a minute for a large preset …", flush=True)
            recipe = PRESETS[args.preset].recipe
            numbers = args.batch or recipe.batch, args.gpus, HARDWARE[args.hardware], args.workers
            print(*plan(args.preset, args.clip or recipe.clip_model, *numbers), sep="\n")
            return
        device = distributed.start(args.device)
        try:
            with distributed.losses_told():
                stopped_early = Run(args, device).train()
        finally:
            distributed.stop()
    if stopped_early:
        sys.exit(COME_AGAIN)


if __name__ == "__main__":
    main()
