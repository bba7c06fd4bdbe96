"""What an evaluation leaves: results that outlive the process, in a directory that holds

settings.json      everything that the scores depend on; a directory with other settings is refused
results.jsonl      one finished sample a line: id, task, length, seed, expected, prediction, answer (what was
                   read in it, null if nothing), score, prompt_tokens, completion_tokens, finished (it ended
                   by itself), what the script adds, and with --log-prompts prompt, its text. Ranks above 0
                   write results.<rank>.jsonl, which rank 0 takes in at the end, or when an interrupted run is
                   started again
results.json       settings, versions, machine, scores with 95% intervals (the script's)
results.md         what the script prints: settings in words, tables in Markdown
lock               says "evaluation", so that nothing else writes here (base/durable.py); locked by the
                   evaluation that does. The file stays
"""

import json
import re
import sys
from pathlib import Path

from base import durable, environment, limits, processes
from base.cli import BadInput, brief


class Results:
    """The finished samples of an evaluation in the directory `out`. .done: the set of their (id, seed).

    expected: {(id, seed): (task, length)} of all samples of the evaluation. Raises BadInput if the directory
    holds something else, or results of other settings or samples, or if another evaluation is writing there:
    rank 0 holds the directory's lock as long as it lives."""

    def __init__(self, out, settings, expected):
        self.out, self.settings, self.expected = Path(out), settings, expected
        self.done = processes.on_rank_0(self._start)
        self.file = None

    def _start(self):
        settings_file = self.out / "settings.json"
        self.lock = durable.claim(self.out, "evaluation", ["settings.json"])
        if settings_file.exists():
            if difference := different(read_settings(settings_file), self.settings):
                raise BadInput(
                    f"{self.out} holds results of other settings: {difference}; "
                    "choose another --out or remove it"
                )
        elif list(self.out.glob("results*.jsonl")):
            raise BadInput(
                f"{self.out} has results and no settings.json: settings unknown; choose another --out"
            )
        else:
            durable.write_json(settings_file, self.settings)
        return {(record["id"], record["seed"]) for record in self._collect()}

    def _collect(self):
        """All finished samples, sorted; they are then all in results.jsonl, and the other ranks' files
        removed."""
        files = sorted(self.out.glob("results*.jsonl"))
        records = {(record["id"], record["seed"]): record for file in files for record in read_results(file)}
        if others := records.keys() - self.expected.keys():
            item, seed = min(others)
            raise BadInput(
                f"{self.out} holds a sample that is not of this evaluation: {item}, seed {seed}; "
                "remove its line"
            )
        for key, record in records.items():
            if (found := (record["task"], record["length"])) != self.expected[key]:
                raise BadInput(
                    f"{self.out} holds {key[0]} as one of {brief(found)}, not {brief(self.expected[key])}; "
                    "remove its line"
                )

        def place(key):  # numbered ids are in the order of their numbers
            return records[key]["task"], records[key]["length"], len(key[0]), key

        records = [records[key] for key in sorted(records, key=place)]
        durable.write(self.out / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        for file in files:
            if file.name != "results.jsonl":
                file.unlink()
        return records

    def write(self, record):
        """One more finished sample, on any rank. Raises BadInput when the disk does not take it."""
        if self.file is None:
            rank = processes.rank_and_world()[0]
            name = f"results.{rank}.jsonl" if rank else "results.jsonl"
            self.file = open(self.out / name, "ab", buffering=0)
        durable.append(self.file, record)

    def read(self):
        """All samples; for rank 0, after engine.evaluate. Raises BadInput if one has no result."""
        records = self._collect()
        if missing := self.expected.keys() - {(record["id"], record["seed"]) for record in records}:
            item, seed = min(missing)
            raise BadInput(
                f"{self.out} has no result of {len(missing)} of {len(self.expected)} samples, "
                f"such as {item}, seed {seed}; the same command makes them"
            )
        return records

    def write_report(self, tensor_parallel, report, text):
        """results.json: settings, versions and machine, then what the dictionary `report` says. results.md:
        the lines of `text`, which are printed too."""
        whole = {"settings": self.settings, **environment.describe(tensor_parallel), **report}
        durable.write_json(self.out / "results.json", whole)
        durable.write(self.out / "results.md", "\n".join(text) + "\n")
        print("\n".join([*text, "", f"results: {self.out}/results.json, .md, .jsonl"]))


def different(old, new):
    """The first setting that differs, as text with both values; "" if none does."""
    for key in (*new, *old):
        if key not in old or key not in new or old[key] != new[key]:
            there, here = (brief(settings[key]) if key in settings else "absent" for settings in (old, new))
            return f"{key.replace('_', ' ')} {there} there, {here} here"
    return ""


def results_file(path):
    """The results.jsonl at `path`, which is the file or its directory. Raises BadInput if there is none."""
    path = Path(path)
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.exists():
        raise BadInput(f"{file} does not exist")
    return file


def read_results(path):
    """The samples of a results file. Raises BadInput as read_lines does, and for a sample's second line."""
    records, seen = read_lines(path, wrong_in), set()
    for number, record in enumerate(records, 1):
        key = record["id"], record["seed"]
        if key in seen:
            raise BadInput(
                f"{path}, line {number} is another result of {key[0]}, seed {key[1]}; remove one of the two"
            )
        seen.add(key)
    return records


def read_lines(path, wrong_in):
    """The objects of a JSONL file. A last line that a killed process left unfinished is left out, with a
    warning. wrong_in(object): what is wrong with it, "" if nothing is. Raises BadInput for a file that cannot
    be read and for a line with something wrong in it."""
    try:
        with limits.opened(path) as file:
            *lines, rest = file.read().split(b"\n")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if rest:
        print(f"warning: {path}: the last line is unfinished and is left out", file=sys.stderr)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = limits.parse_json(line)
        except (ValueError, RecursionError):
            record = None
        if wrong := wrong_in(record):
            raise BadInput(f"{path}, line {number} is not a result: {wrong}; remove the line or the file")
        records.append(record)
    return records


KINDS = {
    "id": (str,),
    "task": (str,),
    "length": (int, str),
    "seed": (int,),
    "prediction": (str,),
    "score": (int, float),
    "prompt_tokens": (int,),
    "completion_tokens": (int,),
    "finished": (bool,),
}
MOST = {"score": 1}  # other numbers: 2^53, above which floats cannot hold every integer
SURROGATE = re.compile("[\ud800-\udfff]")  # unpaired: no terminal can show it


def wrong_in(record):
    """What is wrong with a line of a results file; "" if nothing is."""
    if not isinstance(record, dict):
        return "no JSON object"
    for key, kinds in KINDS.items():
        if key not in record:
            return f"no {key}"
        value = record[key]
        number = type(value) in (int, float)
        if type(value) not in kinds or (
            number and not 0 <= value <= MOST.get(key, 2**53)
        ):  # NaN is refused too
            return f"{key} is {brief(value)}"
        if isinstance(value, str) and SURROGATE.search(value):
            return f"{key} has an unpaired surrogate"
    return ""


def read_settings(path):
    """The settings of an evaluation. Raises BadInput for a file that is not its settings.json."""
    try:
        settings = limits.parse_json(limits.read_text(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    checkpoint = settings.get("checkpoint") if isinstance(settings, dict) else None
    if not isinstance(checkpoint, str) or SURROGATE.search(checkpoint):
        raise BadInput(f'{path} is not an evaluation\'s: it must be an object with the "checkpoint"')
    return settings


def weights_fingerprint(checkpoint):
    """A hash of all safetensors files: some seconds for 8B parameters, which are about to be read anyway."""
    return durable.digest_of_files(sorted(Path(checkpoint).glob("*.safetensors")))[:16]
