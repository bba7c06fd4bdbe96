"""RULER's 13 tasks: what is drawn for one sample, and how large a haystack fits (sets.py makes sets of
samples).

A kind of task is a function (Job) -> Recipe. recipe.draw(size, index) draws sample number `index` with a
haystack of `size` units (index None: a probe of the size) and returns (pieces of the full text, outputs), or
None where there are too few different words. Random numbers are drawn in RULER's order (sets.py says which
version of RULER, docs/ruler.md what is equal).
"""

import itertools
import math
import random
import string
import uuid
from dataclasses import dataclass, field

import numpy as np

from evals.ruler import texts
from evals.ruler.texts import NOISE, PROMPTS, Corpora, Counter, lines

TRIES = 100  # redraws of the smallest haystack before a window is called too small


@dataclass(frozen=True)
class Task:
    """One of the 13: its generator (`kind`) with parameters, the answer's budget in tokens, "all" or "part"
    of the outputs to be found, and the files it needs by RULER's names (files.FILES)."""

    name: str
    kind: str
    parameters: dict = field(default_factory=dict)
    tokens_to_generate: int = 128
    metric: str = "all"
    needs: tuple = ()


def _niah(name, haystack, key="words", value="numbers", keys=1, values=1, queries=1):
    parameters = dict(haystack=haystack, key=key, value=value, values=values, queries=queries)
    parameters["keys"] = max(keys, queries)
    needs = ("PaulGrahamEssays.json",) if haystack == "essay" else ()
    return Task(name, "niah", parameters, 128, needs=needs)


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
# From here on floor(n k^-2 / zeta(2)) differs between k = 4 and k = 5: no coded word ties with the top three.
FWE_LEAST_WORDS = 74
FWE_LEAST_BUDGET = 250  # tokens: five coded words, of which three are the answer

# -------------------------------------------------------------------------------------------------- the tasks


@dataclass
class Job:
    """What the generators share. `template`: the full text with {context}; rng takes the place of Python's
    global generator."""

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
        """RULER's fixed permutation, the same for all lists of one length; rng is not used."""
        random.Random(self.seed).shuffle(items)


@dataclass
class Recipe:
    draw: object
    step: int  # units taken away from a sample that is too long
    least: int = 1  # units without which there is no sample
    unit: int = 0  # units of the probe that measures tokens per unit (0: step)
    extra: int = 0  # tokens that probes leave out


def niah(job):
    """Needles "One of the special magic numbers for KEY is: VALUE." in an essay, in noise or among other
    needles."""
    p, rng = job.task.parameters, job.rng
    kind, template = p["value"], job.template
    if p["queries"] * p["values"] == 1:  # RULER's singular, on the model's template as well
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            template = template.replace(old, new)
        kind = kind[:-1]
    head, tail = template.replace("{type_needle_v}", kind).split("{context}")
    tail = tail[1:]  # its line end belongs to the haystack's last line
    words = texts.keys()

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
            more = range(max(1, hops + 1 - len(names)))
            names += ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in more]
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
    size = fit(recipe, job.count, 500, 0)
    try:
        pieces, names = sample(recipe, size, 0, job.count, 500, 0)
    except TooSmall:  # a tokenizer for which five lines are more than 500 tokens: RULER would never end
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
    words = texts.all_words().copy()
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
            return None  # RULER reads english_words.json here; there is none, or it has too few words
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
    state = {}  # index -> (size, vocabulary) of the last draw

    def coded_word():
        return "".join(rng.choices(string.ascii_lowercase, k=letters))

    def draw(size, index):
        # A new sample, or one that does not fit and cannot be made smaller: RULER draws other words then.
        if index not in state or state[index][0] == size:
            known = {coded_word() for _ in range(vocabulary_size)}
            while len(known) < vocabulary_size:
                known.add(coded_word())
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

# ------------------------------------------------------------------------------------------- fitting a window


class TooSmall(Exception):
    """No haystack fits."""


def fit(recipe, count, length, tokens_to_generate):
    """RULER's binary search for the largest haystack that fits, with all its draws -> units."""

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


def fit_fwe(recipe, count, budget):
    """RULER's linear search for fwe: more words, step by step, while they fit, then one step back -> words.

    All probes have one vocabulary: draw() keeps it for an index until a size comes twice.
    """
    size = budget // 6
    while count(recipe.draw(size, None)[0]) < budget:
        size += recipe.step
    return max(size - recipe.step, recipe.least)


def sample(recipe, size, index, count, length, tokens_to_generate):
    """Sample number `index` in the largest haystack of up to `size` units that fits -> (pieces, outputs).
    Raises TooSmall."""
    tries = 0
    while tries < TRIES:
        drawn = recipe.draw(size, index)
        if count(drawn[0]) + tokens_to_generate <= length:
            return drawn
        smaller = max(size - recipe.step, recipe.least) if size > recipe.step else size
        tries = tries + 1 if smaller == size else 0
        size = smaller
    raise TooSmall
