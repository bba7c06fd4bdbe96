"""What a run needs to go on after it was interrupted: there is always a whole one on disk, and only a whole
one is read.

    DIR/LATEST                             the newest checkpoint's name ("none yet" from the start to the
                                           first); those after it are of an earlier life
    DIR/step-000100/shard-*.safetensors    of each rank: weights (masters), AdamW's moments and steps, and
                                           the script's tensors
                    state.json             what else the script must know: counters, settings, random states
                    manifest.json          bytes and SHA-256 of each of these files

torch.distributed.checkpoint writes and reads the tensors, so what 2 ranks saved 1 or 8 go on with. Its
default format is made of pickles (.metadata and the shards), which can run code when they are read; its
Hugging Face storage is not: it is safetensors, whose headers say where a shard belongs. Everything else is
JSON. All ranks must see the same DIR.

A checkpoint is written under another name, every file synced to disk, renamed when it is whole, and named in
LATEST; only then are old ones removed. Training waits meanwhile: writing beside it would need a second copy
of all shards, and save a minute of what some twenty steps take.
"""

import itertools
import json
import os
import random
import re
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from base import durable, limits
from base.cli import BadInput
from base.processes import gather_or_fail, rank_and_world
from core.checkpoint import local_part
from prompts import rewards, sources

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant

NONE_YET = "none yet"  # in LATEST

# --------------------------------------------------------------------------------------------------- the run


def lock_run(run, which, script, flag):
    """Make or enter the directory of a run -> its lock, which holds as long as this process lives. which: ""
    for a new run, "auto" or a checkpoint's path to go on. script: whose run it is; flag: that names the
    directory. Raises BadInput as durable.claim, and if the run exists and should not, or if the path is not
    one of its checkpoints."""
    inside = run / "checkpoints"
    ours = Path(which).is_dir() and Path(os.path.realpath(which)).parent == Path(os.path.realpath(inside))
    if which not in ("", "auto") and not ours:
        what = f"it must be auto or one of {inside}/step-N"
        raise BadInput(f"--resume {which} is not a checkpoint of this run: {what}")
    lock = durable.claim(run, f"run of {script}", ["metrics.jsonl", "checkpoints"], flag)
    if not which and set(os.listdir(run)) != {"lock"}:
        raise BadInput(f"{run} exists; --resume auto goes on with it, or choose another {flag} or remove it")
    return lock


def new_name():
    """A name for a run that is given none: date and time, and a number if another began in that second. Its
    directory is made at once."""
    now = time.strftime("%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        name = now if number == 1 else f"{now}-{number}"
        try:
            Path("runs", name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"runs/{name} cannot be made: {error.strerror}") from error
        return name


# --------------------------------------------------------------------------------------- what is in a state


def random_states():
    """States of the global generators of Python, numpy and torch, in what JSON can hold. Nothing of ours
    draws from them; a reward function may."""
    state = numpy.random.get_state(legacy=False)
    state["state"]["key"] = state["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": state, "torch": torch.get_rng_state().tolist()}
    return states | {"cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None}


def set_random_states(states):
    """states: of every rank that saved; a rank that was not among them takes another's. Raises BadInput for
    what random_states did not make."""
    own = states[rank_and_world()[0] % len(states)]
    try:
        version, words, gauss = own["python"]
        random.setstate((version, tuple(words), gauss))
        key = numpy.array(own["numpy"]["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**own["numpy"], "state": {**own["numpy"]["state"], "key": key}})
        torch.set_rng_state(torch.tensor(own["torch"], dtype=torch.uint8))
        if own["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(own["cuda"], dtype=torch.uint8))
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        problem = "the states of random generators in state.json are not what a run has written"
        raise BadInput(f"--resume: {problem}; remove that checkpoint") from error


SOURCE = "source of --reward"  # in the settings: {module:function: digest of the module's file}


def settings(config, may_change):
    """What must be the same when a run goes on: all settings but those that may change, and what is in the
    model's and the data's files, wherever they lie now. Only rank 0 reads them; elsewhere {}."""
    if rank_and_world()[0] != 0:
        return {}
    fixed = {key: value for key, value in asdict(config).items() if key not in may_change}
    return fixed | contents(config) | {SOURCE: rewards.source_digests(getattr(config, "reward", []))}


def contents(config):
    """{"contents of --model": digest of its files, ...}, also of --data and of train.py's --eval-data."""
    model = [Path(config.model) / name for name in ("config.json", "tokenizer.json")]
    model += sorted(Path(config.model).glob("*.safetensors"))
    files = {"model": model, "data": config.data, "eval-data": getattr(config, "eval_data", [])}
    return {f"contents of --{name}": sources.digest(paths) for name, paths in files.items()}


# Without LoRA that is everything; frozen weights are in the model's own files, whose digest is in `settings`.
WHAT_TRAINS = StateDictOptions(ignore_frozen_params=True)


def tensors_of(model, optimizer, extra):
    """{name: tensor} for torch.distributed.checkpoint, of what trains. They are the model's and the
    optimizer's own: what is read into them is there."""
    fresh = not optimizer.state
    weights, moments = get_state_dict(model, optimizer, options=WHAT_TRAINS)
    if fresh:  # it has taken a step without gradients to have states
        for values in optimizer.state.values():
            values["step"].zero_()
    tensors = {f"weight {name}": tensor for name, tensor in weights.items()}
    for name, values in moments["state"].items():
        tensors |= {f"{key} {name}": value for key, value in values.items()}
    return tensors | {f"extra {name}": tensor for name, tensor in extra.items()}


# ----------------------------------------------------------------------------------------------------- save

# Bytes of the tensors whose shards share a file on each rank; while it is written they are twice in memory.
FILE_BYTES = 2**33


def save(directory, step, model, optimizer, state, extra, keep):
    """Write directory/step-<step>, the newest of at most `keep`. Every rank must call it.

    state: what JSON can hold, of which rank 0's is written, but state["random"] of every rank; extra: {name:
    tensor}, equal on all ranks. Raises BadInput, with the checkpoints before it as they were, when the disk
    does not take it.
    """
    rank = rank_and_world()[0]
    final = directory / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    tensors = tensors_of(model, optimizer, extra)

    def begin():
        if rank == 0:
            durable.new_directory(partial)
        return state["random"]

    def write_shard():
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors.values()]
        before = [total - size for total, size in zip(itertools.accumulate(sizes), sizes)]
        files = {name: 1 + at // FILE_BYTES for name, at in zip(tensors, before)}
        writer = dcp.HuggingFaceStorageWriter(partial, files, save_distributed=True)  # it syncs the files
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        return {path.name: digest(path) for path in partial.glob(f"shard-{rank + 1:05d}-*")}

    def publish(states, shards):
        if rank != 0:
            return
        durable.write(partial / "state.json", json.dumps({**state, "step": step, "random": states}))
        files = {name: entry for shard in shards for name, entry in shard.items()}
        files["state.json"] = digest(partial / "state.json")
        durable.write(partial / "manifest.json", json.dumps({"files": files}, indent=1) + "\n")
        durable.publish(partial, final)
        durable.write(directory / "LATEST", final.name + "\n")
        kept = sorted((path for path in steps_in(directory) if number(path) <= step), key=number)[-keep:]
        for path in set(filter(is_ours, directory.iterdir())) - set(
            kept
        ):  # older, of another life, unfinished
            durable.remove(path)

    try:
        gather_or_fail(publish, gather_or_fail(begin), gather_or_fail(write_shard))
    except BadInput as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise BadInput(
            f"step {step} cannot be saved in {directory}: {error}; earlier checkpoints are as they were"
        ) from error


def digest(path):
    return {"bytes": os.path.getsize(path), "sha256": durable.sha256(path)}


def steps_in(directory):
    return [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]


def number(path):
    return int(path.name.removeprefix("step-"))


def is_ours(path):
    """Whether `save` made this directory, and so may remove it: a step that says itself which it is, or what
    is left of one whose writing was interrupted. A copy under another name is the user's."""
    if re.fullmatch(r"step-\d{6,}\.(partial|old)", path.name):
        return True
    try:
        return path in steps_in(path.parent) and read_state(path)["step"] == number(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_state(path):
    return limits.parse_json(limits.read_text(path / "state.json", None))


def checked_state(path):
    """read_state's, for a checkpoint to go on from. Raises BadInput for what `save` did not write."""
    try:
        state = read_state(path)
        counters = [state[key] for key in ("step", "prompts_drawn", "skips_in_a_row") if key in state]
        good = state["step"] == number(path) and all(type(n) is int and 0 <= n < 2**53 for n in counters)
        good = good and isinstance(state["settings"], dict) and isinstance(state["random"], list)
        good = good and state["random"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise BadInput(f"--resume: {path / 'state.json'} is not what a run has written; remove {path}")
    return state


# ----------------------------------------------------------------------------------------------------- find


def find(directory, which, fixed, usual=None):
    """The checkpoint to go on from, verified and named in LATEST -> (its directory, its state), or (None,
    None) without one.

    which: "auto", the newest in `directory` that is whole, with a warning for each that is not; or the path
    of one in there. fixed: `settings` of the run that wants to go on; usual: a config of defaults, which may
    have settings that its program did not have when it began. Every rank must call it; they share the
    reading. Raises BadInput for a path that is not whole, if none is whole, and if settings or files are not
    those of the run.
    """
    candidates = gather_or_fail(candidates_for, directory, which)[0]
    for path in candidates:
        problem = next(filter(None, gather_or_fail(damage, path)), None)
        if problem is None:
            break
        if which != "auto":
            raise BadInput(f"--resume: {problem}")
        if rank_and_world()[0] == 0:
            text = f"warning: {problem}; trying the checkpoint before {path.name}"
            print(text, file=sys.stderr, flush=True)
    else:
        if candidates:
            what = f"none of the {len(candidates)} checkpoints in {directory} is whole"
            raise BadInput(f"--resume: {what}; see the warnings")
        return None, None
    state = checked_state(path)
    gather_or_fail(compare, path, state, fixed, usual)
    if rank_and_world()[0] == 0:
        durable.write(directory / "LATEST", path.name + "\n")  # what came after it comes again
    return path, state


def candidates_for(directory, which):
    """Paths to try, the best first. Only rank 0 looks: it has made the run's directory, which the others may
    be too early to see."""
    if rank_and_world()[0] != 0:
        return []
    if which != "auto":
        return [directory / Path(which).name]
    newest, steps = directory / "LATEST", sorted(steps_in(directory), key=number, reverse=True)
    text = newest.read_text(errors="replace").strip().rstrip("/") if newest.is_file() else None
    if text is None and not steps:
        written = sorted({path.name for path in directory.parent.iterdir()} - {"lock", directory.name})
        if written:
            what = f"{directory.parent} has {written[0]} of a run, but no checkpoint in {directory}"
            raise BadInput(
                f"--resume auto: {what} to go on from; bring that back, or remove the run to begin anew"
            )
    if text in (None, NONE_YET):
        return steps
    if not steps:
        raise BadInput(
            f"--resume: {newest} names {text!r:.40}, but there is no checkpoint; remove the run to begin anew"
        )
    if directory / text in steps:
        return [path for path in steps if number(path) <= number(directory / text)]
    what = f"{newest} names {text!r:.40}, which is not there; trying {steps[0].name}"
    print(f"warning: {what}", file=sys.stderr)
    return steps


def damage(path):
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    rank, world = rank_and_world()
    try:
        files = limits.parse_json(limits.read_text(path / "manifest.json"))["files"]
        wrong = sorted(files.keys() ^ {file.name for file in path.iterdir() if file.name != "manifest.json"})
        if wrong:
            return f"{path / wrong[0]} {'is missing' if wrong[0] in files else 'is not of this checkpoint'}"
        for name in sorted(files)[rank::world]:
            written, found = files[name]["bytes"], os.path.getsize(path / name)
            if written != found:
                return f"{path / name} is damaged: it has {found:,} bytes, {written:,} were written"
            if digest(path / name) != files[name]:
                return f"{path / name} is damaged: its SHA-256 is not that of manifest.json"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{path}/manifest.json is damaged: {error!r}"
    return None


RENAMED = {"saliency_tokens": "tokens"}  # setting -> its name in runs of before 2026-11-26


def compare(path, state, fixed, usual):
    """Raises BadInput for the first setting that is another than in the state of a checkpoint. One that the
    state lacks was added to the program since, and may be at its default."""
    for key, now in fixed.items():
        if key == SOURCE:
            warn_of_changed_rewards(path, state["settings"].get(SOURCE, {}), now)
            continue
        old_name = RENAMED.get(key, key)
        before = state["settings"].get(key, state["settings"].get(old_name, getattr(usual, key, None)))
        if isinstance(now, list) and isinstance(before, str):  # --reward took one name before 2026-11-26
            before = [before]
        if key.startswith("contents") and before != now:
            raise BadInput(f"--resume {path}: the {key} are not what the run began with")
        if before != now:
            raise BadInput(f"--resume {path}: {key} was {before}, now it is {now}")


def warn_of_changed_rewards(path, before, now):
    for name, digest_now in now.items():
        if before.get(name, digest_now) != digest_now:
            what = f"the file of --reward {name} is another than when {path} was written"
            print(f"warning: {what}; from here on it scores", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------- load


def load(path, model, optimizer):
    """Put weights and optimizer states back, bit for bit -> extra {name: tensor} as saved, on the CPU. Every
    rank must call it, in any number. Raises BadInput for tensors that are not this model's, or not finite."""
    reader = dcp.HuggingFaceStorageReader(path)
    stored = reader.read_metadata().state_dict_metadata
    extra = {
        name.removeprefix("extra "): torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in stored.items()
        if name.startswith("extra ")
    }
    tensors = tensors_of(model, optimizer, extra)
    for name in sorted(tensors.keys() | stored.keys()):
        if name not in tensors or name not in stored or tensors[name].shape != stored[name].size:
            raise BadInput(f"{path} is of another model: {name.split(' ', 1)[1]} differs")

    def fill():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        for name, tensor in tensors.items():
            if not local_part(tensor).isfinite().all():
                raise BadInput(f"{path}: {name} has values that are not finite")

    gather_or_fail(fill)
    return extra


# -------------------------------------------------------------------------------------------------- metrics


def open_metrics(path, step):
    """Cut metrics.jsonl to the lines of steps 1 to `step` -> the file, for durable.append. With step 0 a run
    begins, and LATEST says that there is no checkpoint yet. Raises BadInput if lines are missing."""
    if step == 0:
        latest = path.parent / "checkpoints" / "LATEST"
        latest.parent.mkdir(exist_ok=True)
        durable.write(latest, NONE_YET + "\n")
    lines = []
    try:
        if path.exists():
            lines = limits.read_text(path, None).splitlines(keepends=True)[:step]
        whole = [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise BadInput(
            f"{path} does not have the lines of steps 1 to {step}, which the checkpoint goes on from"
        )
    durable.write(path, "".join(lines))
    return open(path, "ab", buffering=0)


def open_samples(path, step):
    """Cut samples.jsonl to the lines of steps 1 to `step` -> the file, for durable.append. A file that is not
    there begins empty: nothing is computed from it. Raises BadInput for a damaged line among those kept."""
    path.touch()
    end, damaged = 0, 0
    with open(path, "rb") as file:
        for place, line in enumerate(file, 1):
            found = re.fullmatch(rb'\{"step": (\d+), .*\}\n', line)
            if found and int(found[1]) <= step:
                end += len(line)
                if damaged:
                    raise BadInput(f"{path}: line {damaged} is damaged; remove that line, or the file")
            else:
                damaged = damaged or place  # or of a later step, or half written
    os.truncate(path, end)
    durable.sync(path)
    return open(path, "ab", buffering=0)
