"""A guard on a run that nobody watches: it says in plain words what goes wrong, and ends what cannot get better."""

import collections

from common.cli import UserError

LIMIT = 20  # A run is stopped after so many updates in a row without finite gradients; a step has two updates.
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


class Guard:
    """Looks at the report of every step. say: where to tell it."""

    def __init__(self, say):
        self.say = say
        self.lasting = collections.Counter()
        self.rejected_in_a_row = 0

    def watch(self, report, rejected, checkpoint):
        """report: what a step returned; rejected: how many of its updates were left out; checkpoint: the last good one.

        Raises UserError after LIMIT updates in a row that were not finite; all ranks see the same ones.
        """
        self.rejected_in_a_row = self.rejected_in_a_row + rejected if rejected else 0
        if self.rejected_in_a_row >= LIMIT:
            raise UserError(
                f"{self.rejected_in_a_row} updates in a row had gradients that are not finite, so the run is stopped. "
                f"The last good checkpoint: {checkpoint or 'none'}; the same command goes on from there. Should this "
                "come again, lower the learning rates: --set lr_generator=… lr_discriminator=…"
            )
        for symptom, shows in SYMPTOMS.items():
            self.lasting[symptom] = self.lasting[symptom] + 1 if shows(report) else 0
            if self.lasting[symptom] == LASTING:
                self.say(f"warning: for {LASTING} steps now {symptom}")
