"""RULER (arXiv 2404.06654), generated to the token: sets of samples, their cache, and scores. The tasks:
tasks.py.

    from evals.ruler import sets as ruler
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file("assets/tiny/tokenizer.json")
    rows = ruler.generate("vt", 4096, 500, 42, tokenizer, ruler.TEMPLATES["qwen3"], ruler.Corpora())
    ruler.score("vt", "ABCDE, FGHIJ", rows[0]["outputs"])

Our own code, which behaves as github.com/NVIDIA/RULER since July 2025 (scripts/data/synthetic: niah.py,
variable_tracking.py, common_words_extraction.py, freq_words_extraction.py, qa.py): the same random numbers
are drawn in the same order, also by the probes that size the haystack and by the samples that come out too
long. docs/ruler.md says which tasks are byte-equal to RULER's files, and how much of the window each fills.
Where RULER would loop for ever because no haystack fits, this module raises BadInput, after it has drawn the
smallest haystack TRIES (tasks.py) times as RULER would.
"""

import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import re
import sys
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from tokenizers import Tokenizer

from base import bars, durable, limits
from base.cli import BadInput
from evals.ruler.tasks import FWE_LEAST_BUDGET, KINDS, TASKS, Job, TooSmall, fit, fit_fwe, sample
from evals.ruler.texts import PROMPTS, TEMPLATES, Corpora, Counter, additive  # noqa: F401 - callers use ruler.Corpora

# Of the samples: raise it when the same arguments give other samples, so that caches are made again.
VERSION = 3


def generate(task_name, length, samples, seed, tokenizer, template, corpora, answer_prefix=True):
    """-> list of `samples` samples of a task, each of at most `length` tokens, tokens_to_generate included.

    A sample is {"index", "input", "answer_prefix", "outputs", "length"}: the prompt is input + answer_prefix,
    "outputs" are the strings to be found, "length" is its tokens + tokens_to_generate. template: the model's,
    with a {task_template} slot (TEMPLATES). Without `answer_prefix` the prompt ends with the template;
    examples inside the prompt keep theirs. Raises BadInput for a window too small, a missing or malformed
    file, or more samples than a QA file has questions.
    """
    for records in _attempts(task_name, length, samples, seed, tokenizer, template, corpora, answer_prefix):
        try:
            return list(records)
        except _Disagreement:
            continue


def encode(task_name, text, tokenizer, template):
    """A sample's input + answer_prefix -> token ids (list of int), as `generate` counted them: an added
    token that a document spells is text."""
    return _counter(TASKS[task_name], tokenizer, False, template).encode(text)


def enough(task_name, tokenizer, template, corpora, answer_prefix=True, samples=500):
    """The lengths in tokens that are enough for a task -> list of (from, to), both included; `to` may be
    infinite.

    Enough is what the smallest haystack takes in the longest of 100 draws (qa: for the longest of the first
    `samples` questions); `generate` draws again what comes out longer, so a few tokens less may be enough
    too. There can be two ranges, because RULER has other steps and lists below 4096.
    """
    task, ranges = _checked(task_name, 1, 1, template, corpora), []
    count = _counter(task, tokenizer, additive(tokenizer), template)
    for lowest, highest in ((1, 4095), (4096, math.inf)):
        # fwe: 500 tokens give a vocabulary larger than its smallest haystack uses.
        probe = max(lowest, 500) if task.kind == "fwe" else lowest
        job = _job(task, probe, 42, count, template, corpora, answer_prefix)
        recipe = KINDS[task.kind](job)
        indices = range(min(samples, len(corpora.questions(task.needs[0])[0])) if task.kind == "qa" else 100)
        size = max(recipe.step, recipe.least) if task.kind != "fwe" else recipe.least
        longest = max(job.count(recipe.draw(size, index)[0]) for index in indices) + task.tokens_to_generate
        if task.kind == "fwe":
            longest = max(longest, FWE_LEAST_BUDGET + task.tokens_to_generate)
        if longest <= highest:
            ranges.append((max(longest, lowest), highest))
    return ranges


def _ranges_text(ranges):
    """[(1470, 4095), (5433, inf)] -> "1470 to 4095, or 5433 and more are enough" """
    joined = ranges[:1]
    for least, most in ranges[1:]:
        if least == joined[-1][1] + 1:
            joined[-1] = joined[-1][0], most
        else:
            joined.append((least, most))
    texts = [f"{least} and more" if most == math.inf else f"{least} to {most}" for least, most in joined]
    return f"{', or '.join(texts)} are enough"


class _Disagreement(Exception):
    """The counts of the pieces do not add up to the count of the text."""


def _checked(task_name, length, samples, template, corpora):
    if task_name not in TASKS:
        raise BadInput(f"{task_name!r} is not a RULER task; they are {', '.join(TASKS)}")
    if length < 1 or samples < 1:
        raise BadInput(f"{task_name}: length {length} and samples {samples} must be at least 1")
    if template.count("{task_template}") != 1:
        raise BadInput(f"{task_name}: the template must have one slot {{task_template}}, not {template!r}")
    task = TASKS[task_name]
    corpora.check(task, length)
    if task.kind == "qa" and samples > (most := len(corpora.questions(task.needs[0])[0])):
        raise BadInput(f"{task_name}: {samples} samples, but {task.needs[0]} has {most} answerable questions")
    return task


def _job(task, length, seed, count, template, corpora, answer_prefix):
    prefix = PROMPTS[task.kind][1] if answer_prefix else ""
    return Job(task, length, seed, random.Random(seed), template, prefix, corpora, count)


def _counter(task, tokenizer, fast, template):
    # cwe has no documents, and its example repeats the template: there all control tokens are the template's.
    return Counter(tokenizer, fast, None if task.kind == "cwe" else template)


def _attempts(task_name, length, samples, seed, tokenizer, template, corpora, answer_prefix):
    """Yields iterators over the same records: the first may raise _Disagreement, because the counts of this
    tokenizer's pieces do not add up after all; the second counts whole texts."""
    task = _checked(task_name, length, samples, template, corpora)
    for fast in (True, False) if additive(tokenizer) else (False,):
        count = _counter(task, tokenizer, fast, template)
        yield _records(_job(task, length, seed, count, template, corpora, answer_prefix), samples)


def _records(job, samples):
    task, budget, index = job.task, job.length - job.task.tokens_to_generate, 0
    try:
        if budget < 1 or (task.kind == "fwe" and budget < FWE_LEAST_BUDGET):
            raise TooSmall
        recipe = KINDS[task.kind](job)
        if task.kind == "fwe":
            size = fit_fwe(recipe, job.count, budget)
        else:
            size = fit(recipe, job.count, job.length, task.tokens_to_generate)
        job.corpora.check_words(task, size)
        for index in range(samples):
            pieces, outputs = sample(recipe, size, index, job.count, job.length, task.tokens_to_generate)
            text = "".join(pieces)
            tokens = job.count.full(text)
            if job.count.fast and tokens != job.count(pieces):
                raise _Disagreement
            cut = text.rindex(job.prefix[:10]) if job.prefix else len(text)
            record = {"index": index, "input": text[:cut], "answer_prefix": text[cut:], "outputs": outputs}
            yield {**record, "length": tokens + task.tokens_to_generate}
    except TooSmall as error:
        model = job.count.tokenizer, job.model_template
        ranges = enough(task.name, *model, job.corpora, bool(job.prefix), samples)
        raise BadInput(
            f"{task.name}, sample {index}: {job.length} tokens are too few; {_ranges_text(ranges)}"
        ) from error


# ------------------------------------------------------------------------------------------------------ build


def build(
    cache_dir,
    tasks,
    lengths,
    samples,
    seed,
    tokenizer_path,
    template,
    corpora,
    workers=None,
    answer_prefix=True,
):
    """Make every (task, length) set that `cache_dir` does not have, in `workers` processes (None: one per
    core) -> {(task, length): path}, for `read`.

    tokenizer_path: a tokenizer.json or the directory of a checkpoint. template: the name of one of TEMPLATES,
    or a text with a {task_template} slot. A set is made again if it has fewer
    samples than asked for, or is damaged (then with a warning). Call this before an engine or CUDA is
    started: the workers are forks. Two processes with one `cache_dir` make sets one after the other. Raises
    BadInput as `generate` does, for all sets too small at once, and for a directory that cannot be written; a
    set is kept whole or not at all.
    """
    template, path = TEMPLATES.get(template, template), Path(tokenizer_path)
    if "{task_template}" not in template:
        raise BadInput(f"{template!r} is not a template; they are {', '.join(TEMPLATES)}")
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        limits.check(path, limits.LARGEST_TEXT)
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read as a tokenizer: {error}") from error
    cache_dir, paths, sets = Path(cache_dir), {}, []
    for length in sorted(set(lengths), reverse=True):  # the longest first: they end last
        for name in dict.fromkeys(tasks):
            task = _checked(name, length, samples, template, corpora)
            made_from = [VERSION, name, length, seed, template, answer_prefix, tokenizer_hash]
            key = durable.digest(json.dumps([*made_from, corpora.fingerprint(task)]))
            paths[name, length] = cache_dir / f"{name}-{length}-{key}.jsonl"
            arguments = (name, length, samples, seed, tokenizer, template, corpora, answer_prefix)
            sets.append((paths[name, length], arguments))
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        missing = [(target, arguments) for target, arguments in sets if _held(target) < samples]
        if missing:
            _refuse_too_small(paths, tokenizer, template, corpora, answer_prefix, samples)
            _make(cache_dir, missing, samples, workers)
    except OSError as error:
        what = error.filename or "writing"
        raise BadInput(f"{cache_dir} cannot keep samples: {error.strerror} ({what})") from error
    return paths


def _refuse_too_small(sets, tokenizer, template, corpora, answer_prefix, samples):
    """Raises BadInput if not all `sets`, (task, length), fit; it names these, and the tasks that do fit."""
    small, fitting = [], []
    for name in dict.fromkeys(name for name, _ in sets):
        ranges = enough(name, tokenizer, template, corpora, answer_prefix, samples)
        lengths = sorted(length for other, length in sets if other == name)
        outside = [str(n) for n in lengths if not any(least <= n <= most for least, most in ranges)]
        if outside:
            small.append(f"{name} at {', '.join(outside)} ({_ranges_text(ranges)})")
        else:
            fitting.append(name)
    if small:
        fix = f"--tasks {' '.join(fitting)} fit" if fitting else "choose other --lengths"
        raise BadInput(f"too few tokens for {'; '.join(small)}; {fix}")


def _make(cache_dir, sets, samples, workers):
    # The operating system releases the lock when the process ends; forks do not inherit it.
    with open(cache_dir / "lock", "w") as lock:
        if not durable.try_lock(lock, cache_dir):
            print(f"another process makes samples in {cache_dir}; waiting for it", file=sys.stderr)
            fcntl.lockf(lock, fcntl.LOCK_EX)
            sets = [(target, arguments) for target, arguments in sets if _held(target) < samples]
        for leftover in cache_dir.glob("*.tmp"):  # of processes that were killed
            leftover.unlink()
        total = sum(arguments[1] * samples for _, arguments in sets)
        with bars.bar(total=total, desc="RULER", unit="token", unit_scale=True) as bar:
            if workers == 1:
                for target, arguments in sets:
                    _write(target, arguments, bar.update)
            elif sets:
                _parallel(sets, workers, bar)


# What forked workers inherit, so that tokenizers and essays are not sent through pipes: the sets to make, and
# a shared number, the tokens made so far.
_sets, _made = [], None


def _parallel(sets, workers, bar):
    global _sets, _made
    fork = multiprocessing.get_context("fork")
    _sets, _made = sets, fork.Value("q")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    pool = ProcessPoolExecutor(min(workers or os.cpu_count(), len(sets)), fork, initializer=_end_with_parent)
    try:
        left = [pool.submit(_write_number, i) for i in range(len(sets))]
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(_made.value - bar.n)
            for future in done:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        _sets = []
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _end_with_parent():
    """End this worker when its parent ends: if that was killed, it would wait for ever."""
    parent = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_number(i):
    def made(tokens):
        with _made.get_lock():
            _made.value += tokens

    _write(*_sets[i], made)


def _write(target, arguments, made):
    """One JSON object a line, written as it is made, and a last line with the number of samples and the hash
    of the lines before it. made(tokens) is called for each sample."""
    length = arguments[1]
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
        try:
            for records in _attempts(*arguments):
                digest, number = hashlib.sha256(), 0
                try:
                    for record in records:
                        number += 1
                        line = (json.dumps(record) + "\n").encode()
                        file.write(line)
                        digest.update(line)
                        made(length)
                    break
                except _Disagreement:
                    made(-length * number)
                    file.seek(0)
                    file.truncate()
            file.write((json.dumps({"samples": number, "sha256": digest.hexdigest()}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _held(path):
    """The number of samples in a set; 0 if there is none or (with a warning) if it is damaged."""
    if not path.exists():
        return 0
    digest, number, last = hashlib.sha256(), -1, b""
    with limits.opened(path) as file:
        for line in file:
            digest.update(last)
            number, last = number + 1, line
    try:
        end = json.loads(last)
        whole = (end["samples"], end["sha256"]) == (number, digest.hexdigest())
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        print(f"warning: {path} is damaged and is made again", file=sys.stderr)
    return number if whole else 0


def read(path, samples):
    """Yields the first `samples` records of a set that `build` made."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, itertools.islice(file, samples))


# ---------------------------------------------------------------------------------------------------- scoring


def clean(prediction):
    """RULER's post-processing of generated text: strip, control characters to line ends, strip."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction, outputs):
    """The fraction of `outputs` that occur in `prediction`, case ignored."""
    return sum(output.lower() in prediction.lower() for output in outputs) / len(outputs)


def string_match_part(prediction, outputs):
    """1.0 if any of `outputs` occurs in `prediction`, case ignored, else 0.0."""
    return float(any(output.lower() in prediction.lower() for output in outputs))


def found(prediction, outputs):
    """Those of `outputs` that occur in one generated text, without the answer prefix."""
    text = clean(prediction).lower()
    return [output for output in outputs if output.lower() in text]


def score(task_name, prediction, outputs):
    """The score in [0, 1] of one generated text, without the answer prefix. A task's score is the mean x 100,
    with two decimals."""
    metric = {"all": string_match_all, "part": string_match_part}[TASKS[task_name].metric]
    return metric(clean(prediction), outputs)
