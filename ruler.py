"""RULER's 13 tasks (arXiv 2404.06654), generated to the token: prompts, answers and scores.

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
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import string
import tempfile
import uuid
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import ruler_data
from cli import BadInput
from ruler_data import NOISE, PROMPTS, TEMPLATES, Corpora, Counter, additive, lines

VERSION = 1  # of the samples: raise it when the same arguments give other samples, so that caches are made anew
TRIES = 100  # redraws of the smallest haystack before a window is called too small


@dataclass(frozen=True)
class Task:
    """One of the 13: its generator (`kind`) with parameters, the answer's budget in tokens, "all" or "part" of the
    outputs to be found, and the files it needs by RULER's names (ruler_data.FILES)."""

    name: str
    kind: str
    parameters: dict = field(default_factory=dict)
    tokens_to_generate: int = 128
    metric: str = "all"
    needs: tuple = ()


def _niah(name, haystack, key="words", value="numbers", keys=1, values=1, queries=1):
    parameters = dict(haystack=haystack, key=key, value=value, keys=max(keys, queries), values=values, queries=queries)
    return Task(name, "niah", parameters, 128, needs=("PaulGrahamEssays.json",) if haystack == "essay" else ())


TASKS = {
    task.name: task
    for task in (
        _niah("niah_single_1", "noise"),
        _niah("niah_single_2", "essay"),
        _niah("niah_single_3", "essay", value="uuids"),
        _niah("niah_multikey_1", "essay", keys=4),
        _niah("niah_multikey_2", "needle"),
        _niah("niah_multikey_3", "needle", key="uuids", value="uuids"),
        _niah("niah_multivalue", "essay", values=4),
        _niah("niah_multiquery", "essay", queries=4),
        Task("vt", "vt", {"hops": 4}, 30),
        Task("cwe", "cwe", {"common": 10}, 120, needs=("english_words.json",)),
        Task("fwe", "fwe", {"alpha": 2.0, "letters": 6}, 50),
        Task("qa_1", "qa", {}, 32, "part", ("squad.json",)),
        Task("qa_2", "qa", {}, 32, "part", ("hotpotqa.json",)),
    )
}

DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()  # per cent of the essay's sentences
FWE_LEAST_WORDS = 74  # from here on floor(n k^-2 / zeta(2)) differs between k = 4 and k = 5: the top three are no tie
FWE_LEAST_BUDGET = 250  # tokens: five coded words, of which three are the answer

# ----------------------------------------------------------------------------------------------------------- the tasks
# A kind is a function (job) -> Recipe. recipe.draw(size, index) draws the index-th sample with a haystack of `size`
# units (index None: a probe of the size) and returns (pieces of the full text, outputs).


@dataclass
class Job:
    """What the generators share. `template`: full text with {context}; rng stands for Python's global generator."""

    task: Task
    length: int
    seed: int
    rng: random.Random
    model_template: str
    prefix: str
    corpora: Corpora
    count: Counter

    @property
    def template(self):
        return self.model_template.replace("{task_template}", PROMPTS[self.task.kind][0]) + self.prefix

    def shuffle(self, items):
        """RULER's fixed permutation: the same for every list of one length, and the global generator does not move."""
        random.Random(self.seed).shuffle(items)


@dataclass
class Recipe:
    draw: object
    step: int  # units taken away from a sample that is too long
    least: int = 1  # units without which there is no sample
    unit: int = 0  # units of the probe that measures tokens per unit (0: step)
    extra: int = 0  # tokens that probes leave out


def niah(job):
    """Needles "One of the special magic numbers for KEY is: VALUE." in an essay, in noise or among other needles."""
    p, rng = job.task.parameters, job.rng
    kind, template = p["value"], job.template
    if p["queries"] * p["values"] == 1:  # RULER's singular, on the model's template as well
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            template = template.replace(old, new)
        kind = kind[:-1]
    head, tail = template.replace("{type_needle_v}", kind).split("{context}")
    tail = tail[1:]  # its line end belongs to the haystack's last line
    words = ruler_data.keys()

    def new(kind):
        if kind == "words":
            return rng.choice(words)
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def needle(key, value):
        root, dash, rest = key.partition("-") if p["key"] == "words" else (key, "", "")
        return [f"One of the special magic {p['value']} for", " " + root, dash + rest, " is:", f" {value}."]

    def draw(size, index):
        keys, values, needles = [], [], []
        for _ in range(p["keys"]):
            keys.append(new(p["key"]))
            values.append([new(p["value"]) for _ in range(p["values"])])
            needles += [needle(keys[-1], value) for value in values[-1]]
        job.shuffle(needles)
        pieces = lines(head)
        if p["haystack"] == "essay":
            sentences = job.corpora.sentences(size)
            places = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
            spaced = [" " + sentence for sentence in sentences]
            for start, end, hidden in zip([0, *places], [*places, len(sentences)], [*needles, []]):
                block = spaced[start:end] or [" "]  # blocks are joined by spaces even if they are empty
                if hidden is needles[0]:
                    block[0] = block[0][1:]
                pieces += block
                pieces += [" ", *hidden] if hidden else []
            pieces.append("\n")
        else:
            if p["haystack"] == "noise":
                hay = [[NOISE]] * size
            else:
                hay = [needle(new(p["key"]), new(p["value"])) for _ in range(size)]
            for place, hidden in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles):
                hay.insert(place, hidden)
            for line in hay:
                pieces += line[:-1]
                pieces.append(line[-1] + "\n")
        queried = rng.sample(range(p["keys"]), p["queries"])
        asked = [keys[i] for i in queried]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        return pieces + lines(tail.replace("{query}", query)), [value for i in queried for value in values[i]]

    step = 500 if p["haystack"] == "essay" else 25 if job.length >= 4096 else 5
    return Recipe(draw, step)


def vt(job):
    """A chain of variable assignments in noise, after a short example of the same task with other names."""
    rng, hops = job.rng, job.task.parameters["hops"]
    numbers = np.random.RandomState(job.seed)  # for numpy's global generator
    task_template, task_prefix = PROMPTS["vt"]

    def chain(size, letters, value):
        names = []
        while len(set(names)) <= hops:  # RULER draws five, and fails when two are equal
            names += ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(max(1, hops + 1 - len(names)))]
        names = list(dict.fromkeys(names))
        value = value or str(numbers.randint(10000, 99999))
        assignments = [f"VAR {names[0]} = {value}\n"]
        assignments += [f"VAR {new} = VAR {old} \n" for old, new in itertools.pairwise(names)]
        hay = [NOISE + "\n"] * size
        for shift, place in enumerate(sorted(rng.sample(range(size), hops + 1))):
            hay.insert(place + shift, assignments[shift])
        return hay, value, names

    def fill(template, hay, value):
        head, tail = template.replace("{query}", value).replace("{num_v}", str(hops + 1)).split("{context}\n")
        return [*lines(head), *hay, *lines(tail)]

    def example_draw(size, index):
        hay, value, names = chain(size, 3, "12345")
        return fill(task_template + task_prefix, hay, value), names

    recipe = Recipe(example_draw, step=5, least=hops + 1)
    size = _size(recipe, job.count, 500, 0)
    try:
        pieces, names = _sample(recipe, size, 0, job.count, 500, 0)
    except _TooSmall:  # a tokenizer to which five lines are more than 500 tokens: RULER would never end
        pieces, names = example_draw(recipe.step, 0)
    example = "".join(pieces) + " " + " ".join(names) + "\n"

    def another_example():
        text = example
        for name in example.split()[-hops - 1 :]:
            text = text.replace(name, "".join(rng.choices(string.ascii_uppercase, k=len(name))))
        return text.replace("12345", str(numbers.randint(10000, 99999)))

    model_head, rest = job.template.split(task_template)
    rest = task_template + rest

    def draw(size, index):
        hay, value, names = chain(size, 5, None)
        pieces = fill(rest, hay, value)
        shown = [] if index is None else [*lines(another_example()), "\n"]
        return [*lines(model_head), *shown, *pieces], names

    return Recipe(draw, 10 if job.length >= 4096 else 5, hops + 1, extra=job.count(lines(example)))


def cwe(job):
    """A numbered list in which ten words come more often, after a short example list with its answer."""
    rng, common = job.rng, job.task.parameters["common"]
    words = ruler_data.all_words().copy()
    job.shuffle(words)
    numbers = ["1."]
    head, tail = job.template.split("{context}")
    example_tail = tail if job.prefix else tail + PROMPTS["cwe"][1]
    few, often, rare, many = (20, 3, 1, 6) if job.length < 4096 else (40, 10, 3, 30)

    def listed(size, often):
        pool = words if size <= len(words) else job.corpora.english_words
        if size > len(pool):
            return None
        drawn = rng.sample(pool, size)
        entries = [" " + word for word in drawn[:common] * often + drawn[common:] * rare]
        job.shuffle(entries)
        numbers.extend(f" {i}." for i in range(len(numbers) + 1, len(entries) + 1))
        pieces = [*entries, *entries]
        pieces[::2], pieces[1::2] = numbers[: len(entries)], entries
        return pieces, drawn[:common]

    def draw(size, index):
        if size > len(words) and size > len(job.corpora.english_words):
            return None  # more words than there are: RULER reads english_words.json
        example, answer = listed(few, often)
        shot = " " + " ".join(f"{i}. {word}" for i, word in enumerate(answer, 1)) + "\n"
        pieces, outputs = listed(size, many)
        pieces = [*lines(head), *example, *lines(example_tail), shot, *lines(head), *pieces, *lines(tail)]
        return pieces, outputs

    return Recipe(draw, 10, unit=4096)


def fwe(job):
    """Coded words whose frequencies fall as rank^-2; the commonest is "..." and does not count."""
    rng, alpha, letters = job.rng, job.task.parameters["alpha"], job.task.parameters["letters"]
    budget = job.length - job.task.tokens_to_generate
    vocabulary_size = budget // 50
    head, tail = job.template.split(" {context}")
    shares = np.arange(1, vocabulary_size + 1) ** -alpha  # of rank k; floor(size * share / zeta(2)) times
    state = {}

    def draw(size, index):
        if index not in state or state[index][0] == size:  # a new sample, or RULER's way of none fitting
            vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=letters)) for _ in range(vocabulary_size)]
            known = set(vocabulary)
            while len(known) < vocabulary_size:
                known.add("".join(rng.choices(string.ascii_lowercase, k=letters)))
            vocabulary = sorted(known)
            job.shuffle(vocabulary)
            vocabulary[0] = "..."
            state.clear()
        else:
            vocabulary = state[index][1]
        state[index] = size, vocabulary
        counts = (size * shares / (math.pi**2 / 6)).astype(int).tolist()
        entries = [entry for word, n in zip(vocabulary, counts) if n for entry in [" " + word] * n]
        job.shuffle(entries)
        return [*lines(head), *entries, *lines(tail)], vocabulary[1:4]

    return Recipe(draw, budget // 32, FWE_LEAST_WORDS)


def qa(job):
    """A question among documents that hold its answer and documents that do not (SQuAD 2.0 or HotpotQA)."""
    rng = job.rng
    questions, documents = job.corpora.questions(job.task.needs[0])
    head, tail = job.template.split("{context}")
    texts = [text + "\n\n" for text in documents]
    tail = tail.removeprefix("\n\n")

    def draw(size, index):
        query, outputs, gold, more = questions[index or 0]
        if size >= len(documents):
            chosen = (list(range(len(documents))) * -(-size // len(documents)))[:size]
        elif size - len(gold) > len(more):
            known = {*gold, *more}
            others = [i for i in range(len(documents)) if i not in known]
            chosen = gold + more + rng.sample(others, max(0, size - len(gold) - len(more)))
        else:
            chosen = gold + rng.sample(more, max(0, size - len(gold)))
        job.shuffle(chosen)
        pieces = lines(head)
        for i, document in enumerate(chosen, 1):
            pieces += f"Document {i}:\n", texts[document]
        return pieces + lines(tail.replace("{query}", query)), outputs

    return Recipe(draw, 10)


KINDS = {"niah": niah, "vt": vt, "cwe": cwe, "fwe": fwe, "qa": qa}

# ------------------------------------------------------------------------------------------------------ fitting a window


class _TooSmall(Exception):
    """No haystack fits."""


class _Disagreement(Exception):
    """The sum of the pieces' counts is not the text's count."""


def _size(recipe, count, length, tokens_to_generate):
    """RULER's binary search for the haystack, with the draws it makes on the way -> units."""

    def tokens(size):
        drawn = recipe.draw(size, None)
        return math.inf if drawn is None else count(drawn[0]) + recipe.extra

    unit = recipe.unit or recipe.step
    per_unit = (tokens(unit) - recipe.extra) / unit
    high = int(length // per_unit) * 2 if recipe.unit else int(length / per_unit * 3)
    low, high, best = recipe.step, max(high, 2 * recipe.step), recipe.step
    while low <= high:
        middle = (low + high) // 2
        if tokens(middle) + tokens_to_generate <= length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def _fwe_size(recipe, count, budget):
    """RULER's linear search for fwe: more words by steps while they fit, then one step back -> words."""
    size = budget // 6
    while count(recipe.draw(size, None)[0]) < budget:
        size += recipe.step
        # the vocabulary of all probes is one: draw() keeps it for an index until a size comes twice
    return max(size - recipe.step, recipe.least)


def _sample(recipe, size, index, count, length, tokens_to_generate):
    """The index-th sample in the largest haystack up to `size` that fits -> (pieces, outputs). Raises _TooSmall."""
    tries = 0
    while tries < TRIES:
        drawn = recipe.draw(size, index)
        if count(drawn[0]) + tokens_to_generate <= length:
            return drawn
        smaller = max(size - recipe.step, recipe.least) if size > recipe.step else size
        tries = tries + 1 if smaller == size else 0
        size = smaller
    raise _TooSmall


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
        except _TooSmall as error:
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
        raise _TooSmall(0)
    recipe = KINDS[task.kind](job)
    if task.kind == "fwe":
        size = _fwe_size(recipe, job.count, budget)
    else:
        size = _size(recipe, job.count, job.length, task.tokens_to_generate)
    job.corpora.check_words(task, size)
    records = []
    for index in range(samples):
        try:
            pieces, outputs = _sample(recipe, size, index, job.count, job.length, task.tokens_to_generate)
        except _TooSmall as error:
            raise _TooSmall(index) from error
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
