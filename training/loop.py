"""What surrounds each step of a run: batches, means over ranks, the guard, the log, and when to draw, save and end.

train.py and baselines/shared.py call these in order. Only `overfitting` knows a network.
"""

import contextlib
import math
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from clip import Text
from common import distributed, stopping
from common.cli import UserError, first_line
from common.distributed import say
from data import sources
from data.pairs import CAUSES
from layers import pyramid
from upsampler import draw_input_noise, given_images

MOST_REJECTED = 20  # A run ends after so many rejected updates in consecutive steps; a step has two.
LASTING = 500  # A symptom is reported after this number of steps in a row.
WATCHED = 128  # images of each kind that overfitting is measured with, on every rank
AT_ONCE = 16  # of these images
TELLS_APART = 0.1  # the least difference of their mean logits that is more than chance


@dataclass
class Progress:
    """The progress of a run; part of its checkpoint. It has no state of a random number generator: noise, data and
    captions depend on the seed and the step's number (with shards, also on the numbers of ranks and workers).
    """

    step: int = 0
    skipped: Counter = field(default_factory=Counter)  # pairs of the data that could not be used, by cause
    rejected: int = 0  # updates that were skipped because a gradient was not finite
    seconds: float = 0.0  # spent on steps and evaluations


class Loop:
    """The loop of a run, until its last step or until its minutes are over:

        for number, batches in loop.steps(source):
            report = loop.count(learn(number, batches), batches)
            loop.log(report | {"resolution": …})
            if loop.draws: …
            if loop.saves: …

    folder: a RunFolder. options: train.py's arguments; those about workers, saving and drawing are used. batch: images
    of a step, over all ranks and micro-batches.
    """

    def __init__(self, folder, options, batch, micro_batches=1, last_step=math.inf, minutes=math.inf):
        self.folder, self.options, self.batch, self.micro_batches = folder, options, batch, micro_batches
        self.last_step, self.minutes = last_step, minutes
        self.progress, self.rejected_in_a_row = Progress(), 0
        self.lasting, self.reported = Counter(), set()  # symptoms: the number of steps in a row; those reported
        self.ends = False  # whether this step is the last, on all ranks

    def steps(self, source):
        """Yields each step's number and this rank's batches, one for each micro-batch."""
        p = self.progress
        first, size = p.step * self.micro_batches, self.batch // self.micro_batches
        loader = sources.loader(source, first, size, self.options.workers)
        self.folder.open_log(p.step)
        self.ends, self.saved_at = p.step >= self.last_step or self.out_of_time, time.monotonic()
        total = self.last_step if self.last_step < math.inf else None
        options = {"unit": "step", "disable": not distributed.is_main(), "dynamic_ncols": True}
        with tqdm(total=total, initial=p.step, **options) as self.bar:
            while not self.ends:
                self.started, self.cpu_started = time.perf_counter(), time.process_time()
                batches = self.next_batches(loader)
                if batches is None:
                    break
                yield p.step, batches

    def next_batches(self, loader):
        """None on all ranks if one of them was asked to stop while it waited for data."""
        batches = None
        with distributed.together(), contextlib.suppress(stopping.Stopped):
            batches = [next(loader) for _ in range(self.micro_batches)]
        return None if distributed.anywhere(batches is None) else batches

    def count(self, scalars, batches):
        """Counts a step → its report, {name: number}: the means of its scalars over ranks.

        The scalar `rejected` is the number of updates that were skipped as not finite; after MOST_REJECTED in
        consecutive steps this raises UserError. If one rank was asked to stop, all ranks stop.
        """
        p, skipped = self.progress, sum((batch.skipped for batch in batches), Counter())
        mine = [*(skipped[cause] for cause in CAUSES), stopping.asked() or self.out_of_time]
        values = torch.stack([value.detach().float() for value in scalars.values()])
        values = distributed.mean(torch.cat([values, torch.tensor(mine, dtype=torch.float32).to(values.device)]))
        report = dict(zip([*scalars, *CAUSES, "stop"], values.tolist(), strict=True))
        p.step += 1
        self.ends = report.pop("stop") > 0 or p.step >= self.last_step
        for cause in CAUSES:
            p.skipped[cause] += round(distributed.world_size() * report.pop(cause))
        if rejected := round(report.pop("rejected", 0)):
            say(f"step {p.step}: {rejected} update(s) skipped, because a gradient was not finite")
        p.rejected += rejected
        self.rejected_in_a_row = self.rejected_in_a_row + rejected if rejected else 0
        if self.rejected_in_a_row >= MOST_REJECTED:
            with distributed.together():
                raise UserError(
                    f"{self.rejected_in_a_row} updates in a row had gradients that are not finite. The same command "
                    f"goes on from the last good checkpoint: {self.folder.last_good or 'none'}. If this happens again, "
                    "lower the learning rates, for example with --set lr_generator=…"
                )
        return report

    def log(self, report):
        """Writes a line of the log, and moves the progress bar, which shows the values named `*_loss`.

        report: of `count`, with the active resolution as "resolution".
        """
        p, seconds = self.progress, time.perf_counter() - self.started
        p.seconds += seconds
        cpu_seconds = time.process_time() - self.cpu_started  # without data workers
        row = {"step": p.step, "images": p.step * self.batch, **report}
        row |= {"skipped": p.skipped.total(), "rejected": p.rejected}
        self.folder.log(row | {"seconds": round(seconds, 4), "cpu_seconds": round(cpu_seconds, 4)})
        losses = ", ".join(f"{name} {value:.2f}" for name, value in report.items() if name.endswith("_loss"))
        size = report["resolution"]
        self.bar.set_postfix_str(f"{size}×{size}, {self.batch / seconds:.0f} images/s, {losses}", refresh=False)
        self.bar.update()
        self.warn(report)

    def warn(self, report):
        """Reports a symptom once, after LASTING steps in a row; overfitting at once, as it is measured rarely."""
        found = {symptom: steps for steps, symptom in symptoms(report)}
        self.lasting = Counter({symptom: self.lasting[symptom] + 1 for symptom in found})
        for symptom, steps in self.lasting.items():
            if steps == found[symptom] and symptom not in self.reported:
                say(f"warning, for {steps} step(s) now: {symptom}")
                self.reported.add(symptom)

    @property
    def draws(self):
        """Whether a picture of samples is due; the last step has one. A step with NaN has none."""
        due = self.progress.step % self.options.sample_every == 0 or self.ends
        return due and not self.rejected_in_a_row and distributed.is_main()

    @property
    def saves(self):
        """Whether a checkpoint is due. The last step's is written after the loop."""
        waited = time.monotonic() - self.saved_at > 60 * self.options.save_minutes
        return not self.ends and (self.progress.step % self.options.save_every == 0 or waited)

    @property
    def out_of_time(self):
        return self.progress.seconds > 60 * self.minutes

    def notes(self, device):
        """What a generator's file says about its run, {name: value}."""
        return {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **self.folder.identity,
            "step": self.progress.step,
            "images": self.progress.step * self.batch,
            "seconds": round(self.progress.seconds),
            "machine": f"{distributed.world_size()} × {distributed.describe(device)}",
            "torch": torch.__version__,
        }

    def save(self, state, generator):
        """Writes a checkpoint. state: of the networks. generator: what is in the generator's file."""
        progress = vars(self.progress) | {"skipped": dict(self.progress.skipped)}
        self.folder.save(self.progress.step, {"progress": progress, **state}, generator, self.options.keep)
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def resuming(self, state):
        """Restores the progress from a checkpoint. In this context the networks are restored too; if they do not fit,
        it raises UserError.
        """
        try:
            self.progress = Progress(**state["progress"] | {"skipped": Counter(state["progress"]["skipped"])})
            yield
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this run: {first_line(error)}") from error
        say(f"Resuming from step {self.progress.step}.")

    def check_saved(self):
        """Raises UserError if this step is not on the disk."""
        step, folder = self.progress.step, self.folder
        with distributed.together():
            if distributed.is_main() and folder.saved_step != step:
                raise UserError(
                    f"step {step} is not saved; the last good checkpoint: {folder.last_good or 'none'}. Correct what "
                    "is reported above, and give the same command again"
                )

    def conclude(self):
        """Prints how the run ended. Raises Stopped if a signal ended it."""
        p = self.progress
        if p.skipped.total() or p.rejected:
            causes = ", ".join(f"{count} {cause}" for cause, count in p.skipped.most_common() if count)
            say(f"Skipped data, counted at every reading: {causes or 'none'}.")
            say(f"{p.rejected} updates were skipped, because a gradient was not finite.")
        self.check_saved()
        whole = f"The run has {p.step} steps. The generator: {self.folder.generator}"
        if p.step < self.last_step and not self.out_of_time:
            say(f"Stopped and saved; the same command resumes the run. {whole}")
            raise stopping.Stopped
        say(f"Done; more {'--minutes' if self.out_of_time else '--steps'} resume the run. {whole}")


def symptoms(report):
    """Yields what is wrong according to a step's report: the steps in a row after which it is reported, and words."""
    difference = report.get("logits_real", 1) - report.get("logits_fake", 0)
    if report.get("expert_min_share", 1) < 0.01:
        yield LASTING, "an expert gets almost no points (expert_min_share is below 1 %)"
    if difference > 10:
        advice = "the generator has little to learn from; a higher r1_gamma or a lower lr_discriminator may help"
        apart = "logits_real and logits_fake are more than 10 apart"
        yield LASTING, f"the discriminator is certain of every image ({apart}), so {advice}"
    if abs(difference) < 1e-4:
        yield LASTING, "the discriminator no longer tells real from generated (logits_real equals logits_fake)"
    if report.get("overfitting", 0) > 0.5:
        advice = "to it, held-out images look generated. More images help, or the recipe's `augment`"
        yield 1, f"the discriminator has memorized its training images (overfitting is above 0.5): {advice}"


def watched_pairs(source, clip, group=1):
    """Pairs to measure overfitting with → a list of (images [B, 3, R, R], clip.Text): first pairs of training, then
    held-out ones. None if the source holds too few out. B is a multiple of the discriminator's group.
    """
    pairs = []
    for held_out in (False, True):
        batch = next(source.evaluation_batches(WATCHED, held_out=held_out), None)
        size = len(batch.captions) // group * group if batch else 0
        if size == 0:
            return None
        pairs.append((batch.images[:size].to(clip.device), clip.read(batch.captions[:size])))
    return pairs


@torch.no_grad()
def overfitting(learner, pairs, seed):
    """Measures whether the discriminator memorizes images → {"logits_seen", "logits_held_out", "logits_generated",
    "overfitting"}; {} without pairs. pairs: of watched_pairs.

    overfitting is r_v of StyleGAN2-ADA (section 3) = (D(seen) − D(held out)) / (D(seen) − D(generated)), from the last
    prediction for the highest image: 0 if held-out images look like those of training, 1 if like generated ones. It
    is left out if the discriminator does not tell the two apart.
    """
    if not pairs:
        return {}
    seen, held_out = pairs
    config, rng = learner.generator.config, torch.Generator().manual_seed(seed)
    z = torch.randn(len(held_out[0]), config.z_dim, generator=rng)
    input_noise = draw_input_noise(config, len(held_out[0]), rng)

    def mean_logit(images, text, generated=False):
        """Scores the images, AT_ONCE at a time. generated: replace them by generated ones."""
        logits = []
        for first in range(0, len(images), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            shown, its_text = images[some], Text(*(x[some] for x in text))
            if generated:
                given = given_images(config, shown, input_noise[some])
                with learner.autocast():
                    shown = learner.ema(*given, z[some].to(shown.device), *its_text[:2], learner.active[-1]).pyramid
            else:
                shown = pyramid(shown, learner.active)
            logits.append(learner.score(shown, its_text))
        return torch.cat(logits).mean()

    real, unseen, fake = mean_logit(*seen), mean_logit(*held_out), mean_logit(*held_out, generated=True)
    values = {"logits_seen": real, "logits_held_out": unseen, "logits_generated": fake}
    if real - fake > TELLS_APART:
        values["overfitting"] = (real - unseen) / (real - fake)
    return {name: value.item() for name, value in values.items()}
