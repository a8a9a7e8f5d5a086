"""The loop of a run: batches go in and reports come out; between them the log, pictures, checkpoints, and stops.

It serves any system that learns from captioned images, see System.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from common import distributed
from common.cli import UserError, first_line, signals
from common.distributed import say
from data import sources
from data.pairs import CAUSES

MOST_REJECTED = 20  # A run is stopped after so many updates in a row without finite gradients; a step has two updates.
LASTING = 500  # A symptom that lasts for so many steps is reported.
SYMPTOMS = {
    # What is told: whether a step's report shows it.
    "an expert gets next to no points (expert_min_share is below 1 %); the network does without its parameters": (
        lambda report: report.get("expert_min_share", 1) < 0.01
    ),
    "the discriminator is certain of every image (logits_real and logits_fake are more than 10 apart), so the "
    "generator has little to learn from; a higher r1_gamma or a lower lr_discriminator may help": (
        lambda report: report.get("logits_real", 0) - report.get("logits_fake", 0) > 10
    ),
    "the discriminator tells nothing apart any more (logits_real and logits_fake are the same)": (
        lambda report: abs(report.get("logits_real", 1) - report.get("logits_fake", 0)) < 1e-4
    ),
}
COME_AGAIN = 75  # the exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h


@contextlib.contextmanager
def stopping_when_asked():
    """→ a function that says whether Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 came, so that a run can stop where all is
    whole; a second Ctrl-C ends at once. A run that raises Stopped for it ends with the exit status COME_AGAIN.
    """
    asked, terminals = [], [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def ask(number, _):
        if number in signals("SIGHUP"):  # the terminal is gone, and what is written to it would raise
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if not asked:
            say("Stopping as soon as all is whole …")
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    former = {number: signal.signal(number, ask) for number in signals("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")}
    for number, handler in former.items():
        if handler == signal.SIG_IGN and number != signal.SIGINT:  # as nohup wants it; a shell's & ignores SIGINT
            signal.signal(number, handler)
    try:
        yield lambda: bool(asked)
    except sources.Stopped:
        sys.exit(COME_AGAIN)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class System(Protocol):
    """What the loop asks of the networks that learn."""

    device: torch.device
    batch: int  # images of a step, over all ranks
    parts: int  # that a batch is made in, where gradients are accumulated

    def step(self, number, batches):
        """One step from this rank's batches, one for each part → {name: scalar tensor}. The progress bar shows what is
        called `*_loss`; `rejected` counts updates that were left out."""

    def after_step(self, number):
        """What happens between steps, as evaluations → {name: number}."""

    def weights_are_finite(self):
        """Whether the networks may be saved."""

    def state_dict(self):
        """Everything the run needs to resume, as nested dicts of tensors and plain values."""

    def load_state_dict(self, state):
        """The inverse. Raises KeyError, RuntimeError and the like where it does not fit."""

    def draw_samples(self):
        """A PIL image to look at, and what is worth logging beside it, {name: [numbers]}."""

    def save_generator(self, path, state, notes):
        """Writes what sampling needs, from what state_dict gave."""

    @property
    def phase(self):
        """Where the system stands, in a word, for the progress bar."""


@dataclass
class Progress:
    """Where a run stands; part of its checkpoint. Noise, data and captions depend on seed and step number alone, so
    there is no state of a random number generator to keep."""

    step: int = 0
    skipped: Counter = field(default_factory=Counter)  # pairs of the data that were passed over, by cause
    rejected: int = 0  # updates that were left out because a gradient was not finite
    seconds: float = 0.0  # spent on steps and evaluations


class Loop:
    """Takes a system through its steps, until they are done or its minutes are over, whichever is first.

    options: the arguments of train.py that say how often to save and draw. asked_to_stop: of stopping_when_asked.
    """

    def __init__(self, system, folder, source, options, asked_to_stop, steps=math.inf, minutes=math.inf):
        self.system, self.folder, self.source, self.options = system, folder, source, options
        self.steps, self.minutes = steps, minutes
        self.progress, self.rejected_in_a_row, self.lasting = Progress(), 0, Counter()
        self.asked_to_stop, self.stopping = asked_to_stop, False

    # ------------------------------------------------------------------------------------------------------------------
    # Steps.

    def run(self):
        """Goes on up to the last step, or until the run is asked to stop."""
        p, system, options = self.progress, self.system, self.options
        share = p.step * system.parts, system.batch // system.parts, options.workers
        batches = sources.loader(self.source, *share, asked_to_stop=self.asked_to_stop)
        total = self.steps if self.steps < math.inf else None
        bar = tqdm(total=total, initial=p.step, unit="step", disable=not distributed.is_main(), dynamic_ncols=True)
        self.folder.open_log(p.step)
        saved_at = time.monotonic()
        self.stopping = self.out_of_time
        while p.step < self.steps and not self.stopping:
            started, cpu_started, phase = time.perf_counter(), time.process_time(), system.phase
            if (made := self.next_batches(batches)) is None:
                break
            report = self.make_step(made)
            p.seconds += (seconds := time.perf_counter() - started)
            cpu_seconds = time.process_time() - cpu_started  # what counts on a machine that others use too
            row = {"step": p.step, "images": p.step * system.batch, **report}
            row |= {"skipped": p.skipped.total(), "rejected": p.rejected}
            self.folder.log(row | {"seconds": round(seconds, 4), "cpu_seconds": round(cpu_seconds, 4)})
            last = p.step == self.steps or self.stopping
            if p.step % options.sample_every == 0 or last:
                self.draw_samples()
            if p.step % options.save_every == 0 or last or time.monotonic() - saved_at > 60 * options.save_minutes:
                self.save()
                saved_at = time.monotonic()
            losses = ", ".join(f"{name} {value:.2f}" for name, value in report.items() if name.endswith("_loss"))
            bar.set_postfix_str(f"{phase}, {system.batch / seconds:.0f} images/s, {losses}", refresh=False)
            bar.update()
        bar.close()
        self.folder.wait()
        if self.folder.saved_step != p.step:
            self.save()
            self.folder.wait()

    def next_batches(self, batches):
        """This rank's batches of a step; None on all ranks where one was asked to stop while it waited for its own."""
        made = None
        with distributed.together(), contextlib.suppress(sources.Stopped):
            made = [next(batches) for _ in range(self.system.parts)]
        return None if any(distributed.collect(made is None)) else made

    def make_step(self, step_batches):
        """→ the step's report, as plain numbers, the same on every rank."""
        p = self.progress
        skipped = sum((batch.skipped for batch in step_batches), Counter())
        report = self.reduce(self.system.step(p.step, step_batches), skipped)
        rejected = round(report.pop("rejected", 0))
        p.step, p.rejected = p.step + 1, p.rejected + rejected
        if rejected:
            say(f"step {p.step}: {rejected} update(s) left out, as a gradient was not finite")
        self.stop_if_rejected(rejected)
        self.tell_symptoms(report)
        return report | self.system.after_step(p.step)

    def stop_if_rejected(self, rejected):
        """Raises UserError after MOST_REJECTED updates in a row that were left out; all ranks see the same ones."""
        self.rejected_in_a_row = self.rejected_in_a_row + rejected if rejected else 0
        if self.rejected_in_a_row >= MOST_REJECTED:
            with distributed.together():
                raise UserError(
                    f"{self.rejected_in_a_row} updates in a row had gradients that are not finite, so the run is "
                    f"stopped. The last good checkpoint: {self.folder.last_good or 'none'}; the same command goes on "
                    "from there. If this comes again, lower the learning rates: --set lr_generator=… "
                    "lr_discriminator=…"
                )

    def tell_symptoms(self, report):
        """Warns, once, of what has gone wrong for LASTING steps in a row."""
        for symptom, shows in SYMPTOMS.items():
            self.lasting[symptom] = self.lasting[symptom] + 1 if shows(report) else 0
            if self.lasting[symptom] == LASTING:
                say(f"warning: for {LASTING} steps now {symptom}")

    def reduce(self, scalars, skipped):
        """Scalars of this rank → their means over ranks. Skipped pairs are summed; where one rank stops, all do."""
        names = [*scalars, *CAUSES, "stop"]
        device = next(iter(scalars.values())).device
        stop = self.asked_to_stop() or self.out_of_time
        mine = torch.tensor([*(skipped[cause] for cause in CAUSES), stop], dtype=torch.float32)
        values = torch.cat([torch.stack([value.detach().float() for value in scalars.values()]), mine.to(device)])
        report = dict(zip(names, distributed.mean(values).tolist(), strict=True))
        self.stopping = report.pop("stop") > 0
        for cause in CAUSES:
            self.progress.skipped[cause] += round(distributed.world_size() * report.pop(cause))
        return report

    @property
    def out_of_time(self):
        return self.progress.seconds > 60 * self.minutes

    # ------------------------------------------------------------------------------------------------------------------
    # Saving and resuming.

    def draw_samples(self):
        if distributed.is_main():
            picture, loads = self.system.draw_samples()
            self.folder.write_picture(picture, loads, self.progress.step)

    def save(self):
        """Writes all that the run needs to resume, unless a weight is not finite."""
        if not self.system.weights_are_finite():
            return
        state = {
            "progress": vars(self.progress) | {"skipped": dict(self.progress.skipped)},
            **self.system.state_dict(),
        }
        notes = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **self.folder.identity,
            "step": self.progress.step,
            "images": self.progress.step * self.system.batch,
            "seconds": round(self.progress.seconds),
            "machine": f"{distributed.world_size()} × {distributed.describe(self.system.device)}",
            "torch": torch.__version__,
        }
        write_generator = functools.partial(self.system.save_generator, notes=notes)
        self.folder.save(self.progress.step, state, self.options.keep, write_generator)

    def load(self, state):
        """Resumes from what save wrote. Raises UserError where it does not fit."""
        try:
            self.system.load_state_dict(state)
            self.progress = Progress(**state["progress"] | {"skipped": Counter(state["progress"]["skipped"])})
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this run: {first_line(error)}") from error
        self.folder.saved_step = self.progress.step
        say(f"Resuming from step {self.progress.step}.")

    def introduce(self, config):
        """Writes the configuration, and a checkpoint of the start. Raises UserError where that cannot be written."""
        config |= self.folder.identity | {"world_size": distributed.world_size(), "torch": torch.__version__}
        self.folder.write_config(config)
        if not self.folder.last_good:
            self.save()
            self.check_saved()

    def conclude(self):
        """Says how the run ended. Raises Stopped where it was asked to, before its end."""
        p = self.progress
        if p.skipped.total() or p.rejected:
            causes = ", ".join(f"{count} {cause}" for cause, count in p.skipped.most_common() if count)
            say(f"Of the data was skipped, counted at every reading: {causes or 'nothing'}.")
            say(f"{p.rejected} updates were left out as not finite.")
        self.check_saved()
        ended = "Done." if p.step == self.steps else "Stopped and saved; the same command resumes the run."
        if self.out_of_time:
            ended = f"Its {self.minutes} minutes are over; give more by --minutes to go on."
        elif p.step > self.steps:
            ended = f"Nothing was left to do for --steps {self.steps}; give more to go on. The run has"
        say(f"{ended} {p.step} steps. The generator: {self.folder.generator}")
        if p.step < self.steps and not self.out_of_time:
            raise sources.Stopped

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
