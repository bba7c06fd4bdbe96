"""--eval-every: held-out accuracy during training; best/, the Hugging Face directory of the best step so far.

best/ is replaced as a whole. best.json in it says which step it is: step, metric (as --best names it), value.
"""

import math
import shutil

from base import durable, processes
from base.cli import BadInput
from run.held_out import evaluate

KEYS = ("accuracy", "accuracy_greedy")


class Best:
    """config: train.py's, whose --best is SET/KEY, KEY one of KEYS, SET a name of `held_out`, {name: rows}
    (default: the first); without it, the first's accuracy. Raises BadInput for another.

    value: the highest so far, over all lives of the run.
    """

    def __init__(self, config, held_out):
        self.config, self.held_out, self.value = config, held_out, -math.inf
        if not config.eval_every:
            return
        name, _, self.key = (config.best or KEYS[0]).rpartition("/")
        self.set = name or next(iter(held_out))
        self.metric = f"{self.set}/{self.key}"
        if self.set not in held_out or self.key not in KEYS:
            known = ", ".join(f"{name}/{key}" for name in held_out for key in KEYS)
            raise BadInput(f"--best {config.best} is not among {known}")

    def go_on(self, run, done):
        """Take up what the run in this directory has made in `done` steps. Every rank must call it."""
        self.directory = run / "best"

        def stored():
            if processes.rank_and_world()[0] != 0:
                return None
            durable.put_back(self.directory)
            if not done:  # a run begins: what is there is of an earlier life without a checkpoint
                shutil.rmtree(self.directory, ignore_errors=True)
            file = self.directory / "best.json"
            if not file.exists():
                return None
            value = durable.read_object(file).get("value")
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise BadInput(
                    f"{file} is not what a run has written: value {value!r:.40}; remove {self.directory}"
                )
            return value

        value = processes.gather_or_fail(stored)[0]
        self.value = -math.inf if value is None else value

    def evaluate(self, step, sample, model, dtype, main):
        """At every step of --eval-every, and the last -> {"held_out": what `evaluate` says}, else {}. If it
        is the best so far the model is written. Every rank must call it."""
        config = self.config
        if not config.eval_every or (step % config.eval_every and step < config.steps):
            return {}
        results = evaluate(
            self.held_out, sample, config.eval_completions, f"step {step}:" * main, show_bar=False
        )
        value = results[self.set][self.key]
        if value > self.value:
            self.value = value
            notes = {"best.json": {"step": step, "metric": self.metric, "value": value}}
            model.save_pretrained(self.directory, dtype, config.model, notes)
        return {"held_out": results}
