"""What a run writes as it goes, so that it can be read while it runs and after a kill."""

from base import bars, durable
from run import resume


class Journal:
    """metrics.jsonl, and a bar on the terminal, of a run of train.py or sft.py. `with journal:` stands around
    the steps.

    Every rank has one and calls it alike; only with `main`, on rank 0, does it write anything. steps, done:
    of the whole run, and those that an earlier life has made. Raises BadInput as resume.open_metrics, and
    when the disk cannot be written.
    """

    def __init__(self, directory, name, steps, done, main):
        self.main, self.directory = main, directory
        if main:
            self.metrics = resume.open_metrics(directory / "metrics.jsonl", done)
        self.of_bar = {"total": steps, "initial": done, "desc": name, "disable": not main}

    def __enter__(self):
        self.bar = bars.bar(**self.of_bar, unit="step", leave=False)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.leave = error is None
        self.bar.close()

    def step(self, line, shown):
        """A step has ended. line: its metrics; shown: the metric and its format to show on the bar."""
        if self.main:
            durable.append(self.metrics, line)
            tokens = f"{line['tokens_per_second']:,.0f} tokens/s"
            self.bar.set_postfix_str(f"{shown} {line[shown]:.3f}, {tokens}")
            self.bar.update()
