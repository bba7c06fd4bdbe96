"""How far a run has come: what its next step, or its next life, begins with beside weights and moments."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from base import durable, plot, run_files
from base.cli import BadInput
from run import resume


@dataclass
class Progress:
    """At the end of a step. Masks and magnitudes are of the last update that was made; before: held-out
    accuracy at the start; random: states of the global generators; saved: the step of the newest
    checkpoint."""

    random_rows: torch.Generator  # what --rule random draws from
    step: int = 0
    prompts_drawn: int = 0
    skips_in_a_row: int = 0
    before: dict | None = None
    masks: dict = field(default_factory=dict)  # {weight name: bool (rows,)}
    magnitudes: dict = field(default_factory=dict)  # {projection name: (heads, D) fp32}
    random: dict | None = None
    saved: int = 0

    def finish_update(self, magnitudes, masks):
        self.magnitudes, self.masks, self.skips_in_a_row = magnitudes, masks, 0

    def skip_update(self, step, most):
        """An update was left out since its numbers were not finite. Raises BadInput after more than `most` in
        a row."""
        self.skips_in_a_row += 1
        if self.skips_in_a_row > most:
            raise BadInput(
                f"step {step}: loss or gradient was not finite in {self.skips_in_a_row} updates in a row "
                f"(--max-skips {most}); start anew with a lower --learning-rate"
            )

    def finish_step(self, step, prompts):
        self.step, self.prompts_drawn = step, self.prompts_drawn + prompts
        self.random = resume.random_states()

    @contextmanager
    def saved_before_it_stops(self, where, save):
        """An error between updates saves, then stops the run: no finished step is lost. where: what the
        message begins with."""
        try:
            yield
        except BadInput as error:
            if self.saved < self.step:
                save()
            raise BadInput(f"{where}: {error}") from error

    def write_results(self, directory, after):
        """What a run leaves at its end beside the model: results.json and figures. after: held-out accuracy,
        {} without held-out prompts."""
        if after:
            durable.write_json(directory / "results.json", {"before": self.before, "after": after})
        plot.reward_curve(directory)
        if self.masks:  # unless every update was skipped
            run_files.save_magnitudes(directory / "magnitudes.safetensors", self.magnitudes, self.masks)
            plot.heatmap(directory)

    # ------------------------------------------------------------------------------------------- checkpoints

    def save(self, directory, model, optimizer, settings, keep):
        """Write directory/step-N, see resume.save. settings: what may not change when the run goes on."""
        state = {
            name: getattr(self, name)
            for name in ("step", "prompts_drawn", "skips_in_a_row", "before", "random")
        }
        state |= {"settings": settings, "random_rows": self.random_rows.get_state().tolist()}
        tensors = {f"mask {name}": mask for name, mask in self.masks.items()}
        tensors |= {f"magnitude {name}": magnitude for name, magnitude in self.magnitudes.items()}
        self.saved = self.step
        resume.save(directory, self.step, model, optimizer, state, tensors, keep)

    def find(self, directory, which, settings, usual, steps):
        """The checkpoint of a run that --resume `which` goes on from, or None; its counters are taken over at
        once. settings, usual: see resume.find. Raises BadInput as it does, and if there are more than `steps`
        steps in it."""
        found = resume.find(directory / "checkpoints", which, settings, usual) if which else (None, None)
        path, state = found
        if path:
            for name in ("step", "prompts_drawn", "skips_in_a_row", "before"):
                setattr(self, name, state[name])
            self.saved, self.random = self.step, state["random"]
            self.random_rows.set_state(torch.tensor(state["random_rows"], dtype=torch.uint8))
        if self.step > steps:
            raise BadInput(f"--steps {steps}: the run has made {self.step} already")
        return path

    def load(self, path, model, optimizer, device):
        """Weights, moments, masks, magnitudes and the states of random generators, from what `find` found."""
        extra = resume.load(path, model, optimizer)
        self.masks, self.magnitudes = (
            {name.removeprefix(kind): t.to(device) for name, t in extra.items() if name.startswith(kind)}
            for kind in ("mask ", "magnitude ")
        )
        resume.set_random_states(self.random)
        self.random = resume.random_states()
