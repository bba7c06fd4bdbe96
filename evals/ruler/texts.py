"""What RULER's tasks are made of: word lists, essays, question answering sets (tasks.py draws samples from
them).

Everything that cannot be shipped is read from --data-dir (files.py). The word lists come from the package
wonderwords. Sentences are split by NLTK's punkt if it is installed with its data (punkt_tab), as RULER does,
and otherwise by the rule of `_sentence_ends`.
"""

import bisect
import functools
import heapq
import importlib.resources
import json
import random
import re
from pathlib import Path

from base import durable, limits
from base.cli import BadInput
from evals.ruler.files import FILES, MissingFile, english_words, hotpotqa, squad, text_of
from prompts import chat

# Up to this length cwe's window is full before wonderwords' list ends, except in a few probes.
ENGLISH_WORDS_FROM = 131072

# ---------------------------------------------------------------------------------------------------- prompts

TEMPLATES = {
    "base": "{task_template}",
    "qwen3": "<|im_start|>user\n{task_template}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen3-thinking": "<|im_start|>user\n{task_template}<|im_end|>\n<|im_start|>assistant\n",
}
# kind -> (task template, answer prefix), RULER's scripts/data/synthetic/constants.py
PROMPTS = {
    "niah": (
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it."
        " I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
        "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
        " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are"
        " assigned the value {query}, they are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
        "the ones that appear most often.\n{context}\n"
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. {context}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa": (
        "Answer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nThe following are given documents.\n\n{context}\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nQuestion: {query}",
        " Answer:",
    ),
}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# -------------------------------------------------------------------------------------------- counting tokens

# Qwen's pre-tokenizer. No token crosses these cuts, so the counts of the parts add up
# (tests/evals/test_ruler.py): between anything but white space and a space, after a line end that no white
# space follows, between a letter and "-".
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CACHED_COUNTS = 200_000  # pieces whose counts are kept: about 30 MB


def additive(tokenizer):
    """Whether `tokenizer` (tokenizers.Tokenizer) is a byte-level BPE with Qwen's pre-tokenizer: then the
    counts of pieces add up."""
    if tokenizer.pre_tokenizer is None:
        return False
    normalizer = json.loads(tokenizer.normalizer.__getstate__())["type"] if tokenizer.normalizer else None
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__()).get("pretokenizers", [])
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    rest = [(step["type"], step.get("add_prefix_space"), step.get("use_regex")) for step in steps[1:]]
    added = tokenizer.get_added_tokens_decoder().values()
    spaced = any(token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in added)
    qwen = steps[:1] == [split] and rest == [("ByteLevel", False, False)]
    return qwen and normalizer in (None, "NFC") and not spaced


class Counter:
    """The number of tokens of a text given in pieces; no special tokens are added.

    fast: add up the remembered counts of the pieces. In these all control tokens count as such, so the result
    must be checked with `full`. template: see `encode`.
    """

    def __init__(self, tokenizer, fast, template=None):
        if tokenizer.truncation or tokenizer.padding:
            raise BadInput(
                "the tokenizer truncates or pads, so it cannot count: no_truncation(), no_padding()"
            )
        self.tokenizer, self.fast, self.template, self.counts = tokenizer, fast, template, {}

    def encode(self, text):
        """A full text -> token ids. Of the added tokens that it spells only the template's act; in a document
        <|im_end|> is plain text, see chat.encode_parts. Without a template all act; vt's example is not in
        it."""
        if self.template is None:
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        head, tail = self.template.split("{task_template}")
        if not text.startswith(head):
            return chat.text_ids(self.tokenizer, text)
        end = text.rindex(tail)
        parts = [(head, True), (text[len(head) : end], False), (tail, True), (text[end + len(tail) :], False)]
        return [token for part in chat.encode_parts(self.tokenizer, parts) for token in part]

    def full(self, text):
        return len(self.encode(text))

    def __call__(self, pieces):
        if not self.fast:
            return self.full("".join(pieces))
        pieces = _join_unsafe(pieces)
        counts = self.counts
        missing = [piece for piece in dict.fromkeys(pieces) if piece not in counts]
        if missing:
            if len(counts) + len(missing) > CACHED_COUNTS:
                counts.clear()
                missing = list(dict.fromkeys(pieces))
            encodings = self.tokenizer.encode_batch_fast(missing, add_special_tokens=False)
            counts.update(zip(missing, map(len, encodings)))
        return sum(map(counts.__getitem__, pieces))


def _join_unsafe(pieces):
    """The same text in pieces whose borders no token can cross; pieces are joined where one could."""
    joined = []
    before = ""
    for piece in pieces:
        if not piece:
            continue
        first, last = piece[0], before[-1:]
        space = first == " " and not last.isspace()
        line_end = last == "\n" and not first.isspace()
        dash = first == "-" and last.isalpha()
        if not before or space or line_end or dash:
            joined.append(piece)
            before = piece
        else:
            before = joined[-1] = before + piece
    return joined


def lines(text):
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# ------------------------------------------------------------------------------------------------------ words


@functools.cache
def word_lists():
    """wonderwords' (nouns, adjectives, verbs), each a list in file order. Raises BadInput for another
    version's lists."""
    folder = importlib.resources.files("wonderwords") / "assets"
    paths = [folder / f"{kind}list.txt" for kind in ("noun", "adjective", "verb")]
    lists = [[line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]
    if [len(words) for words in lists] != [6782, 912, 1042]:
        raise BadInput(
            "wonderwords has other word lists than RULER's samples: pip install wonderwords==3.0.1"
        )
    return lists


@functools.cache
def all_words():
    """The 8,166 different words of the three lists, sorted: what cwe lists."""
    return sorted({word for words in word_lists() for word in words})


class Keys:
    """The 6,171,620 strings "adjective-noun" in sorted order, as a sequence. It holds 80 thousand of them;
    all would be 800 MB."""

    def __init__(self):
        nouns, adjectives, _ = word_lists()
        self.nouns = sorted(set(nouns))
        self.starts, self.blocks, total = [], [], 0
        for adjective in sorted(set(adjectives), key=lambda word: word + "-"):
            if self.blocks and adjective.startswith(self.blocks[-1][0] + "-"):
                root, members = self.blocks[-1]  # blue-eyed sorts among blue's nouns
                members = members or [f"{root}-{noun}" for noun in self.nouns]
                members = list(heapq.merge(members, [f"{adjective}-{noun}" for noun in self.nouns]))
                self.blocks[-1] = root, members
            else:
                self.starts.append(total)
                self.blocks.append((adjective, None))
            total += len(self.nouns)
        self.total = total

    def __len__(self):
        return self.total

    def __getitem__(self, i):
        block = bisect.bisect_right(self.starts, i) - 1
        adjective, members = self.blocks[block]
        place = i - self.starts[block]
        return members[place] if members else f"{adjective}-{self.nouns[place]}"


keys = functools.cache(Keys)

# ----------------------------------------------------------------------------------------------------- essays

_SENTENCES = (
    "The {a} {n} of the {n} did not {v} until every {n} was {a}.",
    "Most people who {v} for a living would call this {n} {a}, but they rarely look at the {n} behind it.",
    "When {name} was young, the {n} in the {n} seemed {a} and the {n} seemed {a}.",
    "Why does one {n} {v} while another {n} can only {v}?",
    "It takes a while to see that {n} and {n} are two names for the same {a} thing.",
    "I used to believe that {n} had to be {a}; now I think it only has to {v}.",
    "If you want to {v}, start with the smallest {n} you can find and {v} it every day.",
    '"You will {v} when the {n} is {a}," {name} said, and closed the {n}.',
    "There is something {a} about the way they {v}, as if each {n} were made of {n}.",
    "The hard part is not the {n}, it is learning to {v} without a {a} {n}.",
    "Years later the {n} still stood beside the {n}, {a} as ever.",
    "Nobody at the {n} wanted to {v}, so {name} did it alone.",
    "A good {n} is like a {a} {n}: you notice it only when it begins to {v}.",
    "What surprised me most was how {a} the {n} became once we let it {v}.",
    "Some of the best {n} in the city comes from people who never learned to {v}.",
    "Look closely at any {a} {n} and you will find a {n} trying to {v}.",
    "{name} wrote that a {n} without a {n} cannot {v} for long.",
    "That is the {n} of it: {a}, {a}, and almost impossible to {v}.",
    "We tried to {v} the {n} twice, first with {n} and then with {n}, and both times it was {a}!",
    "In every {n} there are a few who {v} and many who only watch.",
    "Of course the {n} may be {a} for reasons that have nothing to do with {n}.",
    "Give the {n} a {a} reason to {v}, and the rest will follow.",
    "By then the {a} season had begun, and even the {n} smelled of {n}.",
    "One way to {v} is to pretend that the {n} is already {a}.",
    "This is where the {n} and the {n} part company.",
    "They called it {n}, though it was closer to {n} than anyone cared to {v}.",
    "Is a {a} {n} worth more than two {a} ones?",
    "Perhaps the {n} was right, and the only thing left was to {v}.",
    "The {n} opened at noon, the {n} an hour later, and by evening the whole street had begun to {v}.",
    "I asked {name} about the {n}, and the answer was as {a} as the {n} itself.",
)
_OPENINGS = (*[""] * 5, "Still, ", "In the end, ", "At first, ", "For example, ", "Even so, ", "Then again, ")
_NAMES = (
    "Anna Bruno Clara David Elena Felix Greta Henry Irene Jonas Laura Marco Nadia Oscar Paula Rosa Simon Vera"
).split()


def substitute_essay(words=250_000):
    """English-like prose of at least `words` words, always the same: templates filled from wonderwords'
    lists."""
    rng = random.Random("RULER's essay haystack, a substitute")
    plain = [[w for w in kind if w.isascii() and w.islower() and w.isalpha()] for kind in word_lists()]
    slots = {**dict(zip("nav", plain)), "name": _NAMES}
    sentences, total = [], 0
    while total < words:
        sentence = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(slots[slot[1]]), rng.choice(_SENTENCES))
        opening = rng.choice(_OPENINGS)
        if opening and sentence.split(" ", 1)[0] not in (*_NAMES, "I"):
            sentence = sentence[0].lower() + sentence[1:]
        sentences.append(opening + sentence)
        total += sentences[-1].count(" ") + 1
    return " ".join(sentences)


_ABBREVIATIONS = frozenset("mr mrs ms dr st prof vs etc e.g i.e cf no jr sr inc ltd co fig al".split())


def _sentence_ends(words):
    """Indices one past each word that ends a sentence: it ends in . ? or ! (then quotes or brackets) and the
    next word starts with a capital or a digit (after quotes or brackets); not after initials and usual
    abbreviations."""
    ends = []
    for i, (word, following) in enumerate(zip(words, words[1:] + words[:1]), 1):
        bare = word.rstrip("\"')]}’”")
        if not bare.endswith((".", "?", "!")):
            continue
        first = following.lstrip("\"'([{‘“")[:1]
        stem = bare[:-1].lstrip("\"'([{‘“").lower()
        initial = len(stem) == 1 and stem != "i"
        if (first.isupper() or first.isdigit()) and stem not in _ABBREVIATIONS and not initial:
            ends.append(i)
    return ends


def _punkt():
    """NLTK's sent_tokenize if NLTK and its punkt_tab are installed, else None."""
    try:
        from nltk.tokenize import sent_tokenize

        sent_tokenize("One. Two.")
    except (ImportError, LookupError):  # LookupError: NLTK without its data
        return None
    return sent_tokenize


# ---------------------------------------------------------------------------------------------------- corpora


class Corpora:
    """The supplied files of `data_dir` (None: none), each read and checked when it is first needed.

    essay_source       "PaulGrahamEssays.json" or "generated substitute"
    sentence_splitter  "nltk punkt" or "own rule"
    """

    def __init__(self, data_dir=None):
        self.data_dir = Path(data_dir) if data_dir is not None else None
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise BadInput(f"{self.data_dir} is not a directory; it should hold RULER's data files")
        essays = self._find("PaulGrahamEssays.json")
        self.essay_source = "PaulGrahamEssays.json" if essays else "generated substitute"
        self.punkt = _punkt()
        self.sentence_splitter = "nltk punkt" if self.punkt else "own rule"
        self.sentences = functools.lru_cache(maxsize=16)(self._sentences)

    def blocked(self, tasks, lengths):
        """-> {task name: which file is missing}, for those of `tasks` (tasks.Task) that cannot run at one of
        `lengths`. Raises BadInput for a malformed file."""
        reasons = {}
        for task in tasks:
            try:
                self.check(task, max(lengths))
            except MissingFile as error:
                reasons[task.name] = str(error)
        return reasons

    def check(self, task, length):
        """Raises MissingFile or BadInput if a file that `task` needs at `length` tokens is missing or
        malformed."""
        if "PaulGrahamEssays.json" in task.needs:
            self.essay_words  # noqa: B018 - reading it is the check
        if task.kind == "qa":
            self.questions(task.needs[0])
        if task.kind == "cwe" and (length > ENGLISH_WORDS_FROM or self._find("english_words.json")):
            self._need("english_words.json", f"cwe at more than {ENGLISH_WORDS_FROM} tokens")
            self.english_words  # noqa: B018

    def check_words(self, task, size):
        """Raises BadInput if cwe's window could hold more different words than there are."""
        if task.kind == "cwe" and not self.english_words and size >= len(all_words()):
            self._need("english_words.json", "cwe in this window")

    def fingerprint(self, task):
        """A text that changes with what `task`'s samples are made from: hashes of files, the sentence
        splitter."""
        parts = []
        for name in task.needs:
            path = self._find(name)
            parts.append(f"{name} {durable.sha256(path) if path else 'absent'}")
            if name == "PaulGrahamEssays.json":
                parts.append(self.sentence_splitter)
        return "; ".join(parts)

    @functools.cached_property
    def essay_words(self):
        """The essays' words: white space collapsed, split at single spaces."""
        if self.essay_source == "generated substitute":
            text = substitute_essay()
        else:
            text = self._read("PaulGrahamEssays.json", lambda content: text_of(content, "text", "the file"))
        return re.sub(r"\s+", " ", text).split(" ")

    @functools.cached_property
    def _essay_ends(self):
        return _sentence_ends(self.essay_words)

    def _sentences(self, size):
        """The sentences of the first `size` words of the essays, which repeat when they end."""
        words = self.essay_words
        if self.punkt:
            return self.punkt(" ".join((words * -(-size // len(words)))[:size]).strip())
        sentences, start, wrap = [], 0, 0
        while wrap < size:
            for end in self._essay_ends:
                if wrap + end >= size:
                    break
                sentences.append((start, wrap + end))
                start = wrap + end
            wrap += len(words)
        sentences.append((start, size))
        words = words * -(-size // len(words))
        return [text for a, b in sentences if (text := " ".join(words[a:b]).strip())]

    @functools.cached_property
    def english_words(self):
        """The words of english_words.json; an empty list where there is no such file."""
        if not self._find("english_words.json"):
            return []
        return self._read("english_words.json", english_words)

    @functools.cache  # noqa: B019 - a handful of objects a process
    def questions(self, name):
        """`name`: squad.json or hotpotqa.json -> (questions, documents), see files.squad."""
        return self._read(name, squad if name == "squad.json" else hotpotqa)

    def _find(self, name):
        paths = [self.data_dir / accepted for accepted in FILES[name][0]] if self.data_dir is not None else []
        return next((path for path in paths if path.is_file()), None)

    def _need(self, name, tasks):
        accepted, source = FILES[name]
        path = self._find(name)
        if path is None:
            where = "needed, and no data directory is given"
            if self.data_dir is not None:
                where = f"not in {self.data_dir}"
            raise MissingFile(f"{' or '.join(accepted)} is {where}; {source}; without it: no {tasks}")
        return path

    def _read(self, name, understand):
        """understand(the JSON of a file); it raises ValueError, which says what is wrong and where."""
        path = self._need(name, {"squad.json": "qa_1", "hotpotqa.json": "qa_2"}.get(name, name))
        try:
            content = limits.read_text(path, 2**30)
            if content.startswith("version https://git-lfs"):
                raise ValueError("a git-LFS pointer, not the file")
            return understand(limits.parse_json(content))
        except (
            OSError,
            ValueError,
            RecursionError,
        ) as error:  # ValueError: not UTF-8, not JSON, or another format
            what = error.strerror if isinstance(error, OSError) else error
            raise BadInput(f"{path} cannot be used: {what}; {FILES[name][1]}") from error
