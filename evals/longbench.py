"""LongBench v2 (arXiv 2412.15204): its file and its prompts. How an answer is read:
rewards.stated_choice. The evaluation: eval_longbench.py.

    entries, digest = longbench.index("data.json")          # 503 entries: where each item lies in the file
    item = longbench.read_item("data.json", entries[0])     # one item, with its document of up to 8 MB
    longbench.fill(longbench.ZERO_SHOT, item)               # the user's message

It behaves as github.com/THUDM/LongBench (pred.py, result.py, prompts/) at 2e00731; the code is our own. The
file (465 MB, a JSON list) is never in memory as a whole: `index` reads it once, checks every item and
remembers its place.
"""

import codecs
import hashlib
import json
import re
import reprlib
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from base import limits
from base.cli import BadInput
from prompts import chat

QUESTION = """What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

"""
FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
TEXT = "Please read the following text and answer the question{} below.\n\n<text>\n$DOC$\n</text>\n\n"
ZERO_SHOT = TEXT.format("") + QUESTION + FORMAT
COT = TEXT.format("s") + QUESTION + "Let’s think step by step:"
COT_ANSWER = (
    "Please read the following text and answer the questions below.\n\n"
    "The text is too long and omitted here.\n\n"
    + QUESTION
    + "Let’s think step by step: $COT$\n\nBased on the above, what is the single, most likely answer choice? "
    + FORMAT
)
# Without the document: what a model knows or guesses.
NO_CONTEXT = QUESTION + "What is the single, most likely answer choice? " + FORMAT

CLASSES = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
OFFICIAL_ITEMS, OFFICIAL_LENGTHS = 503, {"short": 180, "medium": 215, "long": 108}
CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
CHUNK = 1 << 20  # bytes read at a time

# ---------------------------------------------------------------------------------------------------- prompts


def fill(template, item, reasoning=None):
    """A template filled with an item's texts, stripped. As in the official code, and in its order, each text
    replaces all its placeholders, also those inside texts that were filled in before. reasoning: of the first
    stage, for COT_ANSWER; without it "$COT$" stays."""
    texts = {"$DOC$": item["context"], "$Q$": item["question"]}
    texts |= {f"$C_{choice[-1]}$": item[choice] for choice in CHOICES}
    texts |= {} if reasoning is None else {"$COT$": reasoning}
    for placeholder, text in texts.items():
        template = template.replace(placeholder, text.strip())
    return template


def encoder(tokenizer, thinking):
    """-> a function (the user's message, max_input) -> list of token ids, with the chat template around it.

    Of a message of more than `max_input` tokens the middle is left out before the template is added: the
    first max_input // 2 and the last (max_input + 1) // 2 tokens stay and become text again. That text may
    have a few tokens more than it was made of, where the halves meet. The message is encoded without its
    template, once: it begins with a letter after a line end and ends before a special token, and none of
    Qwen's tokens crosses either (see the tests). An added token that a document spells, such as <|im_end|>,
    stays text; in the official code it ends the user's turn, or is lost if the prompt is cut.
    """
    template = chat.render(tokenizer, [{"role": "user", "content": "\0"}], thinking)
    before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in template.split("\0"))

    def encode(message, max_input):
        ids = chat.text_ids(tokenizer, message)
        if len(ids) > max_input:
            kept = ids[: max_input // 2] + ids[-((max_input + 1) // 2) :]
            ids = chat.text_ids(tokenizer, tokenizer.decode(kept))
        return before + ids + after

    return encode


def ahead(function, keys, workers, depth):
    """Yields function(key), a list of int, for each key in order; `workers` threads keep up to `depth` keys
    ahead."""

    def compact(key):
        return array("I", function(key))  # a list takes nine times the memory

    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for key in keys:
            waiting.append(pool.submit(compact, key))
            if len(waiting) > depth:
                yield waiting.popleft().result().tolist()
        while waiting:
            yield waiting.popleft().result().tolist()


# ------------------------------------------------------------------------------------------------------- file


class Entry(NamedTuple):
    """An item without its texts. domain: "-" if the file has none; document: hash of its context; start,
    size: its place in the file, in bytes."""

    id: str
    domain: str
    difficulty: str
    length: str
    answer: str
    document: str
    start: int
    size: int


def index(path):
    """All items of a LongBench v2 file -> (list of Entry, hash of the file).

    Raises BadInput for a file that is not a JSON list, for a malformed item (it names its _id), and for 503
    items whose length classes are not those of the official ones.
    """
    entries, ids, digest = [], set(), hashlib.sha256()
    for number, (item, start, size) in enumerate(stream(path, digest), 1):
        label = f" (_id {reprlib.repr(item['_id'])})" if "_id" in item else ""
        where = f"{path}, item {number}{label}"
        _check(item, where)
        if item["_id"] in ids:
            raise BadInput(f"{where}: an earlier item has the same _id; remove one")
        ids.add(item["_id"])
        document = hashlib.sha256(item["context"].encode()).hexdigest()
        kept = [item[key] for key in ("difficulty", "length", "answer")]
        entries.append(Entry(item["_id"], item.get("domain", "-"), *kept, document, start, size))
    if not entries:
        raise BadInput(f"{path} has no items")
    lengths = counts(entries)["length"]
    if len(entries) == OFFICIAL_ITEMS and lengths != OFFICIAL_LENGTHS:
        raise BadInput(
            f"{path} has {OFFICIAL_ITEMS} items, {_listed(lengths)}; "
            f"LongBench v2 has {_listed(OFFICIAL_LENGTHS)}: download its data.json again"
        )
    return entries, digest.hexdigest()[:16]


def by_document(entries, engines):
    """The entries in an order in which those of one document follow each other on each engine, for vLLM's
    prefix cache, when `engines` engines take them in turn. Documents are sorted by their hash, so that each
    engine gets long ones and short ones."""
    entries = sorted(entries, key=lambda entry: (entry.document, entry.id))
    order, first = [None] * len(entries), 0
    for engine in range(engines):
        after = first + len(range(engine, len(entries), engines))
        order[engine::engines] = entries[first:after]
        first = after
    return order


def counts(entries):
    """-> {"difficulty": {"easy": n, ...}, "length": {"short": n, ...}}"""
    found = {kind: Counter(getattr(entry, kind) for entry in entries) for kind in CLASSES}
    return {kind: {name: found[kind][name] for name in names} for kind, names in CLASSES.items()}


def _listed(numbers):
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _check(item, where):
    optional = {"domain"} & item.keys()
    for key in ("_id", "question", *CHOICES, "answer", "context", *CLASSES, *optional):
        if not isinstance(item.get(key), str):
            raise BadInput(f"{where}: {key!r} is {'not a text' if key in item else 'missing'}")
        if key in ("_id", "question", "context") and not item[key].strip():
            raise BadInput(f"{where}: {key!r} is empty")
        try:
            item[key].encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{where}: {key!r} is not valid text: {error}") from error
    for key, names in {"answer": tuple("ABCD"), **CLASSES}.items():
        if item[key] not in names:
            raise BadInput(f"{where}: {key!r} is {reprlib.repr(item[key])}, not one of {', '.join(names)}")


def read_item(path, entry):
    """The item of an Entry, read from its place in the file."""
    with open(path, "rb") as file:
        file.seek(entry.start)
        return json.loads(file.read(entry.size))


SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


def stream(path, digest=None, chunk=CHUNK):
    """Yields (object, start, size) for each object of the JSON list in the file; start and size are its
    place, in bytes. No more of the file is in memory than a chunk and twice an object. digest: a hash object
    that is updated with the file's bytes. Raises BadInput for a file that is not a list of objects."""
    decoder, decode, number = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")().decode, 0
    # text[at:] is read and not yet parsed; it begins at byte `place`.
    text, at, place, ended = "", 0, 0, False

    def more():
        nonlocal text, at, ended
        if len(text) - at > limits.LONGEST_LINE:
            raise BadInput(f"{path}, item {number + 1} has more than {limits.LONGEST_LINE:,} characters")
        # At least as much as is there already, since every attempt parses an object from its start.
        block = file.read(max(chunk, len(text) - at))
        if digest:
            digest.update(block)
        text, at, ended = text[at:] + decode(block, not block), 0, not block

    def following(*wanted):
        """Skip white space -> the next character, or "the end" of the file; it must be one of `wanted`."""
        nonlocal at, place
        while (stop := SPACE.match(text, at).end()) == len(text) and not ended:
            more()
        at, place = stop, place + stop - at
        found = text[at : at + 1] or "the end"
        if found not in wanted:
            after = f"after item {number}, " if number else ""
            shown = found if found.isprintable() else repr(found)
            raise BadInput(
                f"{path} is not a JSON list of objects: {after}byte {place} is {shown}, "
                f"not {' or '.join(wanted)}"
            )
        return found

    try:
        with limits.opened(path) as file:
            following("[")
            at, place = at + 1, place + 1
            found = following("{", "]")
            while found != "]":
                try:
                    value, stop = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    # The end of the chunk cut the object off if the error is near it, or if a string did not
                    # end; that error is placed where the string starts.
                    if ended or not (error.msg.startswith("Unterminated") or error.pos > len(text) - 16):
                        raise
                    more()
                    continue
                size = len(text[at:stop].encode())
                yield value, place, size
                number, at, place = number + 1, stop, place + size
                found = following(",", "]")
                if found == ",":
                    at, place = at + 1, place + 1
                    found = following("{")
            at, place = at + 1, place + 1
            following("the end")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers too long, lists too deep
        raise BadInput(f"{path}, item {number + 1} (from byte {place} on) is not JSON: {error}") from error
