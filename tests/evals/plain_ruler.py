"""RULER's 13 tasks as the specification reads: plain strings, the global generators, everything tokenized at
every step.

And what its tests share: small data files, a tokenizer that is awkward to count with."""

import itertools
import json
import math
import random
import string
import uuid

import numpy as np
from conftest import ROOT
from tokenizers import AddedToken, Tokenizer
from wonderwords.random_word import _get_words_from_text_file

from evals.ruler import sets as ruler
from evals.ruler import texts

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def plain(name, length, samples, tokenizer, template, corpora):
    """Part A of the specification on strings and the global generators, everything tokenized at every
    step."""
    task = ruler.TASKS[name]
    body, prefix = texts.PROMPTS[task.kind]
    full, budget = template.replace("{task_template}", body) + prefix, task.tokens_to_generate
    random.seed(42)
    np.random.seed(42)

    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    def fixed(items):
        random.Random(42).shuffle(items)
        return items

    def search(probe, low, unit, high, limit, spare):
        per_unit = count(probe(unit)) / unit
        high, best = max(high(per_unit), 2 * low), low
        floor = low
        while low <= high:
            middle = (low + high) // 2
            if count(probe(middle)) + spare <= limit:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best, floor

    def fill(make, size, step, limit, spare):
        while True:
            text, outputs = make(size)
            if count(text) + spare <= limit:
                return text, outputs
            if size > step:
                size -= step

    short = length < 4096
    if task.kind == "niah":
        p = task.parameters
        pool = texts.keys()  # see test_keys
        draw = {
            "words": lambda: random.choice(pool),
            "numbers": lambda: str(random.randint(10**6, 10**7 - 1)),
            "uuids": lambda: str(uuid.UUID(int=random.getrandbits(128), version=4)),
        }
        say = "One of the special magic {} for {} is: {}.".format
        if p["queries"] * p["values"] == 1:
            full = (
                full.replace("Some", "A")
                .replace("are all", "is")
                .replace("are", "is")
                .replace("answers", "answer")
            )

        def make(size):
            keys, values, needles = [], [], []
            for _ in range(p["keys"]):
                keys.append(draw[p["key"]]())
                values.append([])
                for _ in range(p["values"]):
                    values[-1].append(draw[p["value"]]())
                    needles.append(say(p["value"], keys[-1], values[-1][-1]))
            fixed(needles)
            if p["haystack"] == "essay":
                sentences = corpora.sentences(size)
                depths = random.sample(sorted(round(100 * i / 39) for i in range(40)), len(needles))
                at = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
                parts = []
                for i in range(len(at) - 1):
                    parts.append(" ".join(sentences[at[i] : at[i + 1]]))
                    parts += needles[i : i + 1]
                context = " ".join(parts)
            else:
                hay = [NOISE] * size
                if p["haystack"] == "needle":
                    hay = [say(p["value"], draw[p["key"]](), draw[p["value"]]()) for _ in range(size)]
                for place, needle in zip(sorted(random.sample(range(size), len(needles)))[::-1], needles):
                    hay.insert(place, needle)
                context = "\n".join(hay)
            chosen = random.sample(range(p["keys"]), p["queries"])
            asked = [keys[i] for i in chosen]
            query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
            kind = p["value"][:-1] if p["queries"] * p["values"] == 1 else p["value"]
            text = full.format(type_needle_v=kind, context=context, query=query)
            return text, [value for i in chosen for value in values[i]]

        step = 500 if p["haystack"] == "essay" else 5 if short else 25
        size, _ = search(lambda n: make(n)[0], step, step, lambda per: int(length / per * 3), length, budget)
        return [fill(make, size, step, length, budget) for _ in range(samples)]

    if task.kind == "vt":

        def chain(size, letters, form):
            names = ["".join(random.choices(string.ascii_uppercase, k=letters)) for _ in range(5)]
            value = "12345" if letters == 3 else str(np.random.randint(10000, 99999))
            hay = [NOISE] * size
            hidden = [f"VAR {names[0]} = {value}"] + [
                f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(4)
            ]
            for i, place in enumerate(sorted(random.sample(range(size), 5))):
                hay.insert(place + i, hidden[i])
            return form.format(context="\n".join(hay), query=value, num_v=5), names

        bare = body + prefix
        size, _ = search(lambda n: chain(n, 3, bare)[0], 5, 5, lambda per: int(500 / per * 3), 500, 0)
        text, names = fill(lambda n: chain(n, 3, bare), size, 5, 500, 0)
        example = text + " " + " ".join(names) + "\n"

        def make(size):
            text, outputs = chain(size, 5, full)
            shown = example
            for name in example.split()[-5:]:
                shown = shown.replace(name, "".join(random.choices(string.ascii_uppercase, k=3)))
            shown = shown.replace("12345", str(np.random.randint(10000, 99999)))
            cut = text.index("Memorize and track t")
            return text[:cut] + shown + "\n" + text[cut:], outputs

        step = 5 if short else 10
        spare = budget + count(example)
        size, _ = search(
            lambda n: chain(n, 5, full)[0], step, step, lambda per: int(length / per * 3), length, spare
        )
        return [fill(make, size, step, length, budget) for _ in range(samples)]

    if task.kind == "cwe":
        lists = [_get_words_from_text_file(f"{kind}list.txt") for kind in ("noun", "adjective", "verb")]
        words = fixed(sorted(set(itertools.chain(*lists))))

        def listed(size, often, rare):
            drawn = random.sample(words if size <= len(words) else corpora.english_words, size)
            entries = fixed(drawn[:10] * often + drawn[10:] * rare)
            return " ".join(f"{i + 1}. {word}" for i, word in enumerate(entries)), drawn[:10]

        def make(size):
            context, answer = listed(20, 3, 1) if short else listed(40, 10, 3)
            shot = (
                full.format(context=context)
                + " "
                + " ".join(f"{i + 1}. {word}" for i, word in enumerate(answer))
            )
            context, answer = listed(size, *((6, 1) if short else (30, 3)))
            return shot + "\n" + full.format(context=context), answer

        size, _ = search(lambda n: make(n)[0], 10, 4096, lambda per: int(length // per) * 2, length, budget)
        return [fill(make, size, 10, length, budget) for _ in range(samples)]

    if task.kind == "fwe":
        room = length - budget

        def vocabulary():
            names = {"".join(random.choices(string.ascii_lowercase, k=6)) for _ in range(room // 50)}
            names = fixed(sorted(names))
            return ["...", *names[1:]]

        def text(names, size):
            counts = [math.floor(size * (k**-2.0) / 1.6449340668482264) for k in range(1, len(names) + 1)]
            return full.format(context=" ".join(fixed([w for w, n in zip(names, counts) for _ in range(n)])))

        names, size = vocabulary(), room // 6
        while count(text(names, size)) < room:
            size += room // 32
        first, rows = size - room // 32, []
        for _ in range(samples):
            names, size = vocabulary(), first
            while count(text(names, size)) > room:
                size -= room // 32
            rows.append((text(names, size), names[1:4]))
        return rows

    content = json.loads(next(corpora.data_dir.glob("dev*" if name == "qa_1" else "hot*")).read_text())
    if name == "qa_1":
        groups = [[p["context"] for p in article["paragraphs"]] for article in content["data"]]
        asked = [
            (
                q["question"],
                [a["text"] for a in q["answers"]],
                [p["context"]],
                [c for c in group if c != p["context"]],
            )
            for article, group in zip(content["data"], groups)
            for p in article["paragraphs"]
            for q in p["qas"]
            if not q["is_impossible"]
        ]
    else:
        groups = [[f"{title}\n{''.join(s)}" for title, s in row["context"]] for row in content]
        asked = [(row["question"], [row["answer"]], group, []) for row, group in zip(content, groups)]
    documents = sorted(set(itertools.chain(*groups)))

    def make(size, i=0):
        query, outputs, gold, more = asked[i]
        if size >= len(documents):
            chosen = (documents * 99)[:size]
        elif size - len(gold) > len(more):
            others = [d for d in documents if d not in gold and d not in more]
            chosen = gold + more + random.sample(others, size - len(gold) - len(more))
        else:
            chosen = gold + random.sample(more, size - len(gold))
        chosen = fixed(list(chosen))
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))
        return full.format(context=context, query=query), outputs

    size, _ = search(lambda n: make(n)[0], 10, 10, lambda per: int(length / per * 3), length, budget)
    return [fill(lambda n, i=i: make(n, i), size, 10, length, budget) for i in range(samples)]


def small_data(folder):
    """Small files in the official formats: 6 articles of 8 paragraphs, 60 HotpotQA questions, and words; ->
    folder."""
    rng = random.Random(5)
    words = _get_words_from_text_file("nounlist.txt")

    def prose(sentences):
        return " ".join(
            " ".join(rng.sample(words, 9)).capitalize() + rng.choice(".?!") for _ in range(sentences)
        )

    def paragraph(a, p):
        answers = [
            {"text": f"answer {a}-{p}", "answer_start": 0},
            {"text": f"reply {a}-{p}", "answer_start": 9},
        ]
        questions = [
            {
                "question": f"Which is it, {a} or {p}?",
                "id": f"{a}{p}",
                "answers": answers,
                "is_impossible": False,
            },
            {"question": "None?", "id": f"{a}{p}n", "answers": [], "is_impossible": True},
        ]
        return {"context": f"{prose(4)} It is answer {a}-{p}, reply {a}-{p}.", "qas": questions}

    articles = [{"title": f"T{a}", "paragraphs": [paragraph(a, p) for p in range(8)]} for a in range(6)]
    (folder / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    rows = []
    for i in range(60):
        context = [[f"Title {i} {j}", [prose(1), " " + prose(1)]] for j in range(10)]
        context[3][1].append(f" The answer is gold {i}.")
        rows.append({"_id": str(i), "question": f"What of {i}?", "answer": f"gold {i}", "context": context})
    (folder / "hotpotqa.json").write_text(json.dumps(rows))
    (folder / "english_words.json").write_text(
        json.dumps({str(i): f"{w}ly" for i, w in enumerate(words * 2)})
    )
    return folder


def breaks_the_sums(*tokens):
    """A tokenizer with added tokens that texts have, such as "-ba", which ruler.additive cannot see."""
    tokenizer = Tokenizer.from_file(str(ROOT / "assets" / "tiny" / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer
