"""A run's metrics in trackio, Weights & Biases or TensorBoard, too, with the keys of metrics.jsonl; what is
nested there has a slash here: seconds/rollout.

    pip install --no-deps -r requirements-trackers.txt
    python train.py --tracker tensorboard      # then: tensorboard --logdir runs

trackio and tensorboard write to this machine's disk; wandb does with WANDB_MODE=offline. Their own
environment variables hold, such as TRACKIO_DIR. A run that is resumed goes on in the same run there:
tracker.json in its directory says which (kind, id) and the last step that was sent (step).
"""

import importlib.util
import uuid

from base import durable, run_files
from base.cli import BadInput

KINDS = ["none", "trackio", "wandb", "tensorboard"]
PROJECT = "longact"


def check(kind):
    """Raises BadInput if the package is not there."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        install = "wandb" if kind == "wandb" else "--no-deps -r requirements-trackers.txt"
        raise BadInput(f"--tracker {kind} is not installed: .venv/bin/pip install {install}")


class Tracker:
    """.log(line) for each line of metrics.jsonl, then .close(). settings: shown as the run's. Raises BadInput
    for a damaged tracker.json, and when the package does not start."""

    def __init__(self, kind, directory, settings):
        self.file = directory / "tracker.json"
        self.state = {"kind": kind, "id": uuid.uuid4().hex[:8], "step": 0}
        if self.file.exists():
            before = run_files.read_json(self.file)
            if type(before.get("step")) is not int or not isinstance(before.get("id"), str):
                raise BadInput(f'{self.file} is not what train.py leaves: "id", "step"; remove it')
            if before.get("kind") == kind:
                self.state = before
        name = f"{directory.name}-{self.state['id']}"
        try:
            self.send, self.close = STARTERS[kind](directory, name, self.state["id"], settings)
        except Exception as error:  # of another program: a network, a login, a disk of its own
            raise BadInput(f"--tracker {kind} does not start: {error!r}") from error

    def log(self, line):
        """Send a step, unless an earlier life of the run has sent it."""
        if line["step"] > self.state["step"]:
            numbers = {key: x for key, x in run_files.flat(line).items() if run_files.is_number(x)}
            self.send(numbers, numbers.pop("step"))
            self.state["step"] = line["step"]
            durable.write_json(self.file, self.state)


# Each: (directory, name, id, settings) -> send(numbers, step), close().


def _trackio(directory, name, id, settings):
    import trackio

    trackio.init(project=PROJECT, name=name, config=settings, resume="allow", embed=False)
    return lambda numbers, step: trackio.log(numbers, step=step), trackio.finish


def _wandb(directory, name, id, settings):
    import wandb

    run = wandb.init(name=name, id=id, resume="allow", config=settings, dir=str(directory))
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _tensorboard(directory, name, id, settings):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))
    writer.add_text("settings", "\n".join(f"- {key}: {value}" for key, value in settings.items()))

    def send(numbers, step):
        for key, number in numbers.items():
            writer.add_scalar(key, number, step)
        writer.flush()

    return send, writer.close


STARTERS = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}
