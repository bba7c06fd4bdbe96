"""What a run writes as it goes, so that it can be read while it runs and after a kill."""

import contextlib
import sys
from dataclasses import asdict

from base import bars, durable, environment, processes, run_files
from base.cli import BadInput, one_line
from run import report, resume
from run.tracker import Tracker


class Journal:
    """config.json, environment.json, metrics.jsonl, samples.jsonl and report.html of a run of train.py or
    sft.py, and a bar on the terminal. `with journal:` stands around the steps.

    Every rank has one and calls it alike; only rank 0 writes. config: the script's, all resolved; done: steps
    that an earlier life has made; name: of the bar; of_failure(step): lines of samples.jsonl about a step
    that ends the run. Raises BadInput as resume.open_metrics and open_samples, and when the disk cannot be
    written.
    """

    def __init__(self, directory, config, done, name, device, of_failure=lambda step: []):
        rank, world = processes.rank_and_world()
        self.writes, self.done, self.of_failure = rank == 0, done, of_failure
        self.directory, self.report_every, self.selection = directory, config.report_every, None
        self.of_bar = {"total": config.steps, "initial": done, "desc": name}
        if self.writes:
            self.metrics = resume.open_metrics(directory / "metrics.jsonl", done)
            self.samples = resume.open_samples(directory / "samples.jsonl", done)
            settings = {**asdict(config), "ranks": world, "device": str(device)}
            durable.write_json(directory / "config.json", settings)
            how = {"command": environment.command(), **environment.describe()}
            durable.write_json(directory / "environment.json", how)
            self.tracker = None
            if config.tracker != "none":
                self.tracker = Tracker(config.tracker, directory, settings)
            going_on = f", going on after step {done}" if done else ""
            print(f"run directory: {directory}{going_on}", flush=True)

    def __enter__(self):
        self.bar = bars.bar(**self.of_bar, unit="step", leave=False, disable=not self.writes)
        return self

    def __exit__(self, kind, error, traceback):
        """The steps are over, or an error has ended them, of which the user hears first."""
        self.bar.leave = error is None
        self.bar.close()
        if self.writes and self.tracker:
            self.tracker.close()
        if error and self.writes:
            with contextlib.suppress(BadInput):
                durable.append(self.samples, *self.of_failure(self.done + 1))
            self.report(f"stopped: {one_line(error)}")

    def step(self, line, show, samples, selection=None):
        """A step has ended. line: its metrics; show: the one of them that the bar shows; samples: its lines
        of samples.jsonl; selection: magnitudes and masks of its last update, which the report shows."""
        self.done, self.selection = line["step"], selection
        if self.writes:
            durable.append(self.samples, *samples)
            durable.append(self.metrics, line)
            short = f", {line['underfull']} groups short" if line.get("underfull") else ""
            shown = f"{show} {line[show]:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
            self.bar.set_postfix_str(shown + short, refresh=False)
            self.bar.update()
            if self.tracker:
                self.tracker.log(line)
            if self.report_every and self.done % self.report_every == 0:
                self.report("running")

    @contextlib.contextmanager
    def told(self):
        """An error in here, before or after the steps, stands in the report, too."""
        try:
            yield
        except BadInput as error:
            self.report(f"stopped: {one_line(error)}")
            raise

    def interrupted(self, flags):
        """A signal has ended the steps, and what they made is saved. flags: that name the run."""
        self.report("interrupted")
        if self.writes:
            print(f"interrupted after step {self.done}; {flags} --resume auto goes on", file=sys.stderr)

    def report(self, state):
        """Write report.html, unless --report-every is 0. state: see report.write. What keeps it from being
        written is a warning: no report stops a run."""
        if not self.writes or not self.report_every:
            return
        try:
            if self.selection and self.selection[1]:
                run_files.save_magnitudes(self.directory / "magnitudes.safetensors", *self.selection)
            report.write(self.directory, state)
        except BadInput as error:
            print(f"warning: no report: {error}", file=sys.stderr)
