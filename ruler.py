"""RULER (arXiv 2404.06654), generated to the token: sets of samples, their cache, and scores. The tasks: ruler_tasks.py.

    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file("assets/tiny/tokenizer.json")
    rows = ruler.generate("vt", 4096, 500, 42, tokenizer, ruler.TEMPLATES["qwen3"], ruler.Corpora("data"))
    ruler.score("vt", "ABCDE, FGHIJ", rows[0]["outputs"])

Our own code, after the behaviour of github.com/NVIDIA/RULER since July 2025 (scripts/data/synthetic: niah.py,
variable_tracking.py, common_words_extraction.py, freq_words_extraction.py, qa.py): the same random numbers are drawn in
the same order, by the probes that size the haystack and by the samples that come out too long as well. docs/ruler.md says
which tasks are byte-equal to RULER's files, and how much of the window each fills. Where RULER would loop for ever (no
haystack fits) this module raises BadInput, after drawing the smallest haystack `TRIES` times as RULER would.
"""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from cli import BadInput
from ruler_data import PROMPTS, TEMPLATES, Corpora, Counter, additive  # noqa: F401 - callers use ruler.Corpora
from ruler_tasks import FWE_LEAST_BUDGET, KINDS, TASKS, Job, TooSmall, fit, fit_fwe, sample

VERSION = 1  # of the samples: raise it when the same arguments give other samples, so that caches are made anew


def generate(task_name, length, samples, seed, tokenizer, template, corpora, answer_prefix=True):
    """`samples` samples of a task whose tokens and tokens_to_generate together are at most `length`.

    template: the model's, with a {task_template} slot (TEMPLATES). Without `answer_prefix` the prompt ends with the
    template; examples inside the prompt keep theirs. -> list of {"index", "input", "answer_prefix", "outputs", "length"}:
    the prompt is input + answer_prefix, "outputs" the strings to be found, "length" its tokens + tokens_to_generate.
    Raises BadInput for a window too small, a missing or malformed file, or more samples than a QA file has questions.
    """
    task = _checked(task_name, length, samples, template, corpora)
    for fast in (True, False) if additive(tokenizer) else (False,):
        job = _job(task, length, seed, Counter(tokenizer, fast), template, corpora, answer_prefix)
        try:
            return _records(job, samples)
        except _Disagreement:  # the counts of this tokenizer do not add up after all: count whole texts
            continue
        except TooSmall as error:
            least = smallest_length(task_name, tokenizer, template, corpora, answer_prefix, above=length)
            raise BadInput(f"{task_name}, sample {error}: {length} tokens are too few; from {least} on all fit") from error


def smallest_length(task_name, tokenizer, template, corpora, answer_prefix=True, above=0):
    """The least length in tokens, more than `above`, at which every sample's smallest haystack fits."""
    task = _checked(task_name, 1, 1, template, corpora)
    for lowest, highest in ((1, 4095), (4096, math.inf)):  # RULER's steps and lists are other ones below 4096
        probe = max(lowest, 500 if task.kind == "fwe" else 1)  # fwe: a vocabulary larger than its smallest haystack uses
        job = _job(task, probe, 42, Counter(tokenizer, additive(tokenizer)), template, corpora, answer_prefix)
        recipe = KINDS[task.kind](job)
        # A draw that chance made longer than these 100 is drawn again; a question's documents are what they are.
        indices = range(min(500, len(corpora.questions(task.needs[0])[0])) if task.kind == "qa" else 100)
        size = max(recipe.step, recipe.least) if task.kind != "fwe" else recipe.least
        longest = max(job.count(recipe.draw(size, index)[0]) for index in indices) + task.tokens_to_generate
        if task.kind == "fwe":
            longest = max(longest, FWE_LEAST_BUDGET + task.tokens_to_generate)
        if above < highest and longest <= highest:
            return max(longest, lowest, above + 1)


class _Disagreement(Exception):
    """The sum of the pieces' counts is not the text's count."""


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


def _records(job, samples):
    task, budget = job.task, job.length - job.task.tokens_to_generate
    if budget < 1 or (task.kind == "fwe" and budget < FWE_LEAST_BUDGET):
        raise TooSmall(0)
    recipe = KINDS[task.kind](job)
    if task.kind == "fwe":
        size = fit_fwe(recipe, job.count, budget)
    else:
        size = fit(recipe, job.count, job.length, task.tokens_to_generate)
    job.corpora.check_words(task, size)
    records = []
    for index in range(samples):
        try:
            pieces, outputs = sample(recipe, size, index, job.count, job.length, task.tokens_to_generate)
        except TooSmall as error:
            raise TooSmall(index) from error
        text = "".join(pieces)
        tokens = job.count.full(text)
        if job.count.fast and tokens != job.count(pieces):
            raise _Disagreement
        cut = text.rindex(job.prefix[:10]) if job.prefix else len(text)
        record = {"index": index, "input": text[:cut], "answer_prefix": text[cut:], "outputs": outputs}
        records.append({**record, "length": tokens + task.tokens_to_generate})
    return records


# ---------------------------------------------------------------------------------------------------------------- build


def build(
    cache_dir,
    tasks,
    lengths,
    samples,
    seed,
    tokenizer_path,
    template_name,
    corpora,
    workers=None,
    answer_prefix=True,
):
    """Makes every (task, length) set that `cache_dir` does not have, in `workers` processes (None: one a core)
    -> {(task, length): path}.

    tokenizer_path: a tokenizer.json or the directory of a checkpoint. `read` reads a path. A set is made anew if it has
    fewer samples than asked for, or is damaged (then with a warning). Call it before an engine or CUDA is started: the
    workers are forks. Raises BadInput as `generate` does, and removes what the failed worker wrote.
    """
    if template_name not in TEMPLATES:
        raise BadInput(f"{template_name!r} is not a template; they are {', '.join(TEMPLATES)}")
    path = Path(tokenizer_path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer, tokenizer_hash = Tokenizer.from_file(str(path)), hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read as a tokenizer: {error}") from error
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    paths, jobs = {}, []
    for length in sorted(set(lengths), reverse=True):  # the longest first: they end last
        for name in dict.fromkeys(tasks):
            task = _checked(name, length, samples, TEMPLATES[template_name], corpora)
            made_from = [VERSION, name, length, seed, TEMPLATES[template_name], answer_prefix, tokenizer_hash]
            key = hashlib.sha256(json.dumps([*made_from, corpora.fingerprint(task)]).encode()).hexdigest()[:16]
            paths[name, length] = target = cache_dir / f"{name}-{length}-{key}.jsonl"
            if _held(target) < samples:
                arguments = (name, length, samples, seed, tokenizer, TEMPLATES[template_name], corpora, answer_prefix)
                jobs.append((target, arguments))
    with tqdm(total=sum(job[1][1] for job in jobs) * samples, desc="RULER", unit="token", unit_scale=True) as bar:
        if workers == 1:
            for job in jobs:
                bar.update(_write(*job) * samples)
        elif jobs:
            _parallel(jobs, workers, lambda length: bar.update(length * samples))
    return paths


_jobs = []  # what forked workers find; a tokenizer and essays are not sent through pipes


def _parallel(jobs, workers, done):
    global _jobs
    _jobs = jobs
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    pool = ProcessPoolExecutor(min(workers or os.cpu_count(), len(jobs)), mp_context=multiprocessing.get_context("fork"))
    try:
        for future in as_completed([pool.submit(_write_number, i) for i in range(len(jobs))]):
            done(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        _jobs = []
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _write_number(i):
    return _write(*_jobs[i])


def _write(target, arguments):
    """One JSON object a line, and a last line with the number of samples and the hash of the lines before it."""
    records = generate(*arguments)
    body = "".join(json.dumps(record) + "\n" for record in records).encode()
    end = json.dumps({"samples": len(records), "sha256": hashlib.sha256(body).hexdigest()}) + "\n"
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(body + end.encode())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
    return arguments[1]


def _held(path):
    """The number of samples in a set; 0 if there is none or (with a warning) if it is damaged."""
    if not path.exists():
        return 0
    *body, end = path.read_bytes().splitlines(keepends=True) or [b""]
    try:
        end = json.loads(end)
        whole = (end["samples"], end["sha256"]) == (len(body), hashlib.sha256(b"".join(body)).hexdigest())
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        warnings.warn(f"{path} is damaged and is made anew", stacklevel=3)
    return len(body) if whole else 0


def read(path, samples):
    """The first `samples` records of a set that `build` made."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(samples)]


# -------------------------------------------------------------------------------------------------------------- scoring


def clean(prediction):
    """RULER's post-processing of generated text: strip, control characters to line ends, strip."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction, outputs):
    """The fraction of `outputs` that occur in `prediction`, case ignored."""
    return sum(output.lower() in prediction.lower() for output in outputs) / len(outputs)


def string_match_part(prediction, outputs):
    """1.0 if any of `outputs` occurs in `prediction`, case ignored, else 0.0."""
    return float(any(output.lower() in prediction.lower() for output in outputs))


def score(task_name, prediction, outputs):
    """The score in [0, 1] of one generated text, without the answer prefix; a task's is the mean x 100, two decimals."""
    metric = {"all": string_match_all, "part": string_match_part}[TASKS[task_name].metric]
    return metric(clean(prediction), outputs)
