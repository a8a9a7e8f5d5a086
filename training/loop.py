"""What a run's steps need: batches, means over ranks, the guard, the log, and when to draw, save and end.

train.py and baselines/shared.py have the order of things. Nothing here knows a network, but for `overfitting`.
"""

import contextlib
import math
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

MOST_REJECTED = 20  # A run is stopped after so many updates in a row without finite gradients; a step has two updates.
LASTING = 500  # A symptom that lasts for so many steps is reported.
WATCHED = 128  # images of each kind that overfitting is measured with, shared by the ranks
AT_ONCE = 16  # of these


@dataclass
class Progress:
    """Where a run stands; part of its checkpoint. Noise, data and captions depend on seed and step number alone, so
    there is no state of a random number generator to keep."""

    step: int = 0
    skipped: Counter = field(default_factory=Counter)  # pairs of the data that were passed over, by cause
    rejected: int = 0  # updates that were left out because a gradient was not finite
    seconds: float = 0.0  # spent on steps and evaluations


class Loop:
    """Takes a run through its steps until the last, or until its minutes are over, whichever is first:

        for number, batches in loop.steps(source):
            report = loop.count(learn(number, batches), batches)
            loop.log(report)
            if loop.draws: …
            if loop.saves: …

    folder: a RunFolder. options: the arguments of train.py that say how often to save and draw. batch: images of a
    step, over all ranks and micro-batches.
    """

    def __init__(self, folder, options, batch, micro_batches=1, last_step=math.inf, minutes=math.inf):
        self.folder, self.options, self.batch, self.micro_batches = folder, options, batch, micro_batches
        self.last_step, self.minutes = last_step, minutes
        self.progress, self.rejected_in_a_row = Progress(), 0
        self.lasting, self.told = Counter(), set()  # symptoms, and for how many steps now; those that were reported
        self.ends = False  # whether this step is the last, on all ranks

    def steps(self, source):
        """Yields the number of a step and this rank's batches of it, one for each micro-batch."""
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
        """None on all ranks if one was asked to stop while it waited for its own."""
        batches = None
        with distributed.together(), contextlib.suppress(stopping.Stopped):
            batches = [next(loader) for _ in range(self.micro_batches)]
        return None if any(distributed.collect(batches is None)) else batches

    def count(self, scalars, batches):
        """A step was made → its report, {name: number}, the same on every rank: the means of its scalars.

        `rejected` of the scalars counts updates that were left out as not finite. Raises UserError after MOST_REJECTED
        of them in a row. Skipped pairs are summed; where one rank is to stop, all do.
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
            say(f"step {p.step}: {rejected} update(s) left out, as a gradient was not finite")
        p.rejected += rejected
        self.rejected_in_a_row = self.rejected_in_a_row + rejected if rejected else 0
        if self.rejected_in_a_row >= MOST_REJECTED:
            with distributed.together():
                raise UserError(
                    f"{self.rejected_in_a_row} updates in a row had gradients that are not finite. The same command "
                    f"goes on from the last good checkpoint: {self.folder.last_good or 'none'}. If this comes again, "
                    "lower the learning rates: --set lr_generator=… lr_discriminator=…"
                )
        return report

    def log(self, report):
        """Writes a line of the log, and moves the progress bar, which shows what is called `*_loss`."""
        p, seconds = self.progress, time.perf_counter() - self.started
        p.seconds += seconds
        cpu_seconds = time.process_time() - self.cpu_started  # what counts on a machine that others use too
        row = {"step": p.step, "images": p.step * self.batch, **report}
        row |= {"skipped": p.skipped.total(), "rejected": p.rejected}
        self.folder.log(row | {"seconds": round(seconds, 4), "cpu_seconds": round(cpu_seconds, 4)})
        losses = ", ".join(f"{name} {value:.2f}" for name, value in report.items() if name.endswith("_loss"))
        size = report["resolution"]
        self.bar.set_postfix_str(f"{size}×{size}, {self.batch / seconds:.0f} images/s, {losses}", refresh=False)
        self.bar.update()
        self.warn(report)

    def warn(self, report):
        """Says, once, what has gone wrong for LASTING steps in a row; overfitting is measured too rarely for that."""
        self.lasting = Counter({symptom: self.lasting[symptom] + 1 for symptom in symptoms(report)})
        for symptom, steps in self.lasting.items():
            enough = 1 if "overfitting" in symptom else LASTING
            if steps == enough and symptom not in self.told:
                say(f"warning, for {steps} step(s) now: {symptom}")
                self.told.add(symptom)

    @property
    def draws(self):
        """Whether a picture of samples is due; the last step has one. Of NaN there is none."""
        due = self.progress.step % self.options.sample_every == 0 or self.ends
        return due and not self.rejected_in_a_row and distributed.is_main()

    @property
    def saves(self):
        """Whether a checkpoint is due. That of the last step comes after the loop."""
        waited = time.monotonic() - self.saved_at > 60 * self.options.save_minutes
        return not self.ends and (self.progress.step % self.options.save_every == 0 or waited)

    @property
    def out_of_time(self):
        return self.progress.seconds > 60 * self.minutes

    # ------------------------------------------------------------------------------------------------------------------
    # Saving and resuming.

    def notes(self, device):
        """What a generator file says about its run."""
        return {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **self.folder.identity,
            "step": self.progress.step,
            "images": self.progress.step * self.batch,
            "seconds": round(self.progress.seconds),
            "machine": f"{distributed.world_size()} × {distributed.describe(device)}",
            "torch": torch.__version__,
        }

    def save(self, state, generator):
        """Writes a checkpoint: state, what the networks need to go on, and generator, what makes its file."""
        progress = vars(self.progress) | {"skipped": dict(self.progress.skipped)}
        self.folder.save(self.progress.step, {"progress": progress, **state}, generator, self.options.keep)
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def resuming(self, state):
        """Goes on where a checkpoint was written. In this context the networks do so too; a UserError says if they do
        not fit.
        """
        try:
            self.progress = Progress(**state["progress"] | {"skipped": Counter(state["progress"]["skipped"])})
            yield
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this run: {first_line(error)}") from error
        say(f"Resuming from step {self.progress.step}.")

    def check_saved(self):
        """Raises UserError where this step is not on the disk."""
        step, folder = self.progress.step, self.folder
        folder.wait()
        with distributed.together():
            if distributed.is_main() and folder.saved_step != step:
                raise UserError(
                    f"step {step} is not saved; the last good checkpoint: {folder.last_good or 'none'}. Mend what was "
                    "told above, and give the same command again"
                )

    def conclude(self):
        """Says how the run ended. Raises Stopped where it was asked to, before its end."""
        p = self.progress
        if p.skipped.total() or p.rejected:
            causes = ", ".join(f"{count} {cause}" for cause, count in p.skipped.most_common() if count)
            say(f"Of the data was skipped, counted at every reading: {causes or 'nothing'}.")
            say(f"{p.rejected} updates were left out as not finite.")
        self.check_saved()
        if self.out_of_time:
            ended = f"Its {self.minutes} minutes are over; give more by --minutes to go on."
        elif p.step < self.last_step:
            ended = "Stopped and saved; the same command resumes the run."
        elif p.step == self.last_step:
            ended = "Done."
        else:
            ended = f"Nothing was left to do for --steps {self.last_step}; give more to go on. The run has"
        say(f"{ended} {p.step} steps. The generator: {self.folder.generator}")
        if p.step < self.last_step and not self.out_of_time:
            raise stopping.Stopped


# ----------------------------------------------------------------------------------------------------------------------
# The guard.


def symptoms(report):
    """What a step's report shows to be wrong, in words."""
    difference = report.get("logits_real", 1) - report.get("logits_fake", 0)
    if report.get("expert_min_share", 1) < 0.01:
        yield "an expert gets next to no points (expert_min_share is below 1 %)"
    if difference > 10:
        yield (
            "the discriminator is certain of every image (logits_real and logits_fake are more than 10 apart), so the "
            "generator has little to learn from; a higher r1_gamma or a lower lr_discriminator may help"
        )
    if abs(difference) < 1e-4:
        yield "the discriminator tells nothing apart any more (logits_real and logits_fake are the same)"
    if report.get("overfitting", 0) > 0.5:
        yield (
            "the discriminator knows its training images by heart (overfitting is above 0.5): it takes held-out ones "
            "for generated ones. More images help, or the recipe's `augment`"
        )


def watched_pairs(source, clip):
    """Images to measure overfitting with, [B, 3, R, R] each with its clip.Text: first those that training sees, then
    held-out ones; None if none is held out.
    """
    pairs = []
    for held_out in (False, True):
        batch = next(source.evaluation(WATCHED, held_out=held_out), None)
        if batch is None:
            return None
        pairs.append((batch.images.to(clip.device), clip.read(batch.captions)))
    return pairs


@torch.no_grad()
def overfitting(learner, pairs, seed):
    """Whether the discriminator learns images by heart → {"logits_seen", "logits_held_out", "logits_generated",
    "overfitting"}; nothing without pairs to ask about, see watched_pairs.

    overfitting is r_v of StyleGAN2-ADA (section 3) = (D(seen) − D(held out)) / (D(seen) − D(generated)), by the last
    prediction for the highest image: 0 if held-out images look like those it learns from, 1 if like generated ones.
    """
    if not pairs:
        return {}
    seen, held_out = pairs
    config, noise = learner.generator.config, torch.Generator().manual_seed(seed)
    z = torch.randn(len(held_out[0]), config.z_dim, generator=noise)
    small = draw_input_noise(config, len(held_out[0]), noise)

    def mean_logit(images, text, generated):
        """Every rank takes a share of the images."""
        mine = torch.arange(distributed.rank(), len(images), distributed.world_size())
        total = images.new_zeros(2)
        for some in mine.split(AT_ONCE) if len(mine) else ():
            which = some.to(images.device)
            shown, captions = images[which], Text(*(x[which] for x in text))
            if generated:
                given = given_images(config, shown, small[some])
                with learner.autocast():
                    shown = learner.ema(*given, z[some].to(shown.device), *captions[:2], learner.active[-1]).pyramid
            else:
                shown = pyramid(shown, learner.active)
            logits = learner.score(shown, captions)
            total += torch.stack([logits.sum(), logits.new_full((), len(some))])
        total, count = distributed.mean(total)
        return total / count

    real, new, fake = mean_logit(*seen, False), mean_logit(*held_out, False), mean_logit(*held_out, True)
    ratio = (real - new) / (real - fake).clamp(min=1e-6)
    values = {"logits_seen": real, "logits_held_out": new, "logits_generated": fake, "overfitting": ratio}
    return {name: value.item() for name, value in values.items()}
