"""Prompts in, rewards out: rows -> ChatML -> token ids, and answer text -> float.

A row is a dictionary. Training reads rows from a JSONL file (--data), one object a line:
    prompt   a string, or a list of {"role", "content"} messages as in the OpenAI format   (required)
    answer   what the reward compares with: a string or a list of accepted strings         (required)
    any other key is passed to the reward function untouched.
Without --data the rows are made on the fly: the recall task below, long-context in kind and small enough for a laptop.

A reward function takes (answer text, row) and returns a float; 1.0 means correct. Use yours by --reward module:function.
"""

import importlib
import json
import math
import random
import re
import string
import traceback
from pathlib import Path

from tokenizers import Tokenizer

from cli import BadInput

# ------------------------------------------------------------------------------------------------------------- ChatML


def chat(messages, thinking):
    """Messages -> the text Qwen3's chat template gives, up to and including the start of the assistant's turn.

    With thinking the model opens <think> itself; without, an empty thinking block is already there. Earlier assistant
    turns lose their thinking. Tools are not supported.
    """
    text = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = content.split("</think>")[-1].lstrip("\n")
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")


def answer_text(completion, thinking):
    """What is scored of a completion: the text after the last </think>; nothing if thinking never ended."""
    if thinking and "</think>" not in completion:
        return ""
    return completion.split("</think>")[-1].strip()


def load_tokenizer(directory, vocab_size):
    """`directory`/tokenizer.json; refuses one whose ids the model's embedding does not have. Raises BadInput."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path} is missing; a checkpoint needs its tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read: {error}") from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise BadInput(f"{path} has token id {largest}, but the model's vocab_size is {vocab_size}: not its tokenizer")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if tokenizer.token_to_id(token) is None:
            raise BadInput(f"{path} has no token {token}: not a Qwen tokenizer")
    return tokenizer


def stop_ids(tokenizer):
    """The two tokens after which a Qwen model has nothing more to say."""
    return [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]


def encode_prompt(tokenizer, row, thinking, limit):
    """Row -> prompt token ids (list of int). Raises BadInput when they are more than `limit`."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = tokenizer.encode(chat(messages, thinking), add_special_tokens=False).ids
    if len(ids) > limit:
        raise BadInput(f"prompt {row['id']} has {len(ids)} tokens; the context leaves {limit} for a prompt")
    return ids


# ------------------------------------------------------------------------------------------------------------- rewards


def exact(answer, row):
    """1.0 if the answer is one of row["answer"] up to case, punctuation, articles and white space (SQuAD's EM)."""
    golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return float(normalize(answer) in {normalize(gold) for gold in golds})


def normalize(text):
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def load_reward(spec):
    """The function that "module:function" names. Raises BadInput when there is no such module or function."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise BadInput(f"--reward {spec}: {error}; write module:function, the module on PYTHONPATH") from error
    if not callable(function):
        raise BadInput(f"--reward {spec}: {name} is not a function")
    return function


def score(reward, answer, row):
    """The reward as a finite float; anything else the user's function returns is an error that names the row."""
    try:
        value = reward(answer, row)
    except Exception as error:  # the user's code: show where it failed, then say for which row
        traceback.print_exc()
        raise BadInput(f"the reward function failed on row {row['id']}: {error!r}") from error
    try:
        value = float(value)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(f"the reward function returned no finite number for row {row['id']}")
    return value


# --------------------------------------------------------------------------------------------------------- sources


class JsonlSource:
    """Rows of a JSONL file in a new random order each epoch, the same for the same seed. source[i] is the i-th draw."""

    def __init__(self, path, seed):
        self.rows, self.seed, self.order = read_jsonl(path), seed, (None, None)

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self.rows))
        if self.order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
            self.order = epoch, order
        return self.rows[self.order[1][place]]


class RecallSource:
    """The recall task without end: source[i] depends on (seed, i) only, so equal seeds give equal prompts."""

    def __init__(self, seed, facts, filler):
        if not 1 <= facts <= len(NAMES):
            raise BadInput(f"--facts {facts}: there are names for 1 to {len(NAMES)}")
        self.seed, self.facts, self.filler = seed, facts, filler

    def __getitem__(self, i):
        passage, questions = recall(random.Random(f"{self.seed} recall {i}"), self.facts, self.filler)
        question, answer = questions[0]
        return {"id": f"recall-{self.seed}-{i}", "prompt": f"{passage}\n\n{question}", "answer": answer}


def json_lines(path):
    """[("line 3", "PATH, line 3", value), ...] of a JSONL file's lines that are not empty. Raises BadInput for a file that
    cannot be read or has no rows, a line that is not JSON and text that is not valid."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON strings may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not JSON: {error}") from error
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{where} is not valid text: {error}") from error
        rows.append((f"line {number}", where, value))
    if not rows:
        raise BadInput(f"{path} has no rows")
    return rows


def read_jsonl(path):
    """All rows of `path`, each with an id ("line 3" unless it has one). Raises BadInput with the line's number."""
    rows = []
    for name, where, row in json_lines(path):
        if not isinstance(row, dict) or not {"prompt", "answer"} <= row.keys():
            raise BadInput(f'{where} must be an object with "prompt" and "answer"')
        check_prompt(row["prompt"], where)
        answer = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not answer or not all(isinstance(gold, str) for gold in answer):
            raise BadInput(f'{where}: "answer" must be a string or a list of strings')
        rows.append({"id": name, **row})
    return rows


def check_prompt(prompt, where):
    if isinstance(prompt, str) and prompt:
        return
    roles = ("system", "user", "assistant")
    good = isinstance(prompt, list) and all(
        isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str) for m in prompt
    )
    if not good or not prompt or prompt[-1]["role"] != "user":
        raise BadInput(f'{where}: "prompt" must be a text or messages with role and content that end with the user\'s')


# ------------------------------------------------------------------------------------------------------- recall task

NAMES = (
    "Maria Peter Anna Victor Clara Simon Laura Oscar Helen Bruno Nadia Felix Irene Louis Paula Roman Sofia Frank "
    "Julia Marco Diana Edgar Greta Henry Elena Jonas Marta Klaus Ellen Tomas Alice David Carla Leo Emma Paul Rosa Max "
    "Eva Karl Lena Otto Nora Hugo Vera Ivan Lucy Sven"
).split()
WORDS = (
    "lamp river stone cloud wheel apple sword tiger candle mirror bridge ladder basket feather hammer island jacket "
    "kettle lemon magnet needle orange pencil rabbit saddle tunnel violin wallet anchor button carpet dragon engine "
    "falcon garden helmet insect jungle kitten lizard marble napkin oyster parrot quartz ribbon shadow temple "
    "umbrella valley window yellow zebra arrow bottle copper desert eagle forest guitar harbor iron jewel knight "
    "leather monkey nectar onion pepper rocket silver thunder uncle velvet winter bamboo cactus donkey elbow fabric "
    "ginger honey ivory jelly kiwi lantern meadow nickel ocean planet rubber salmon tomato urchin vapor walnut acorn "
    "badger cherry dolphin ember flute granite hazel igloo juniper koala lotus mango nutmeg olive pebble quill raven "
    "spider turtle vessel willow"
).split()
PEOPLE = "baker sailor teacher farmer doctor painter soldier singer driver writer".split()
VERBS = "walked slept waited worked rested talked".split()
PLACES = "market station church library theatre museum castle office school kitchen".split()


def recall(rng, facts, filler, asked=1):
    """A passage of `facts` facts hidden among `filler` sentences, and `asked` questions with three-word answers.

    -> (passage, [(question, answer), ...]). A fact and a filler sentence take 9 tokens each of assets/tiny's tokenizer.
    """
    names = rng.sample(NAMES, facts)
    facts_told = [f"The code for {name} is {' '.join(rng.sample(WORDS, 3))}." for name in names]
    sentences = facts_told.copy()
    for _ in range(filler):
        time = rng.choice(("morning", "evening"))
        sentences.append(f"The {rng.choice(PEOPLE)} {rng.choice(VERBS)} in the {rng.choice(PLACES)} every {time}.")
    rng.shuffle(sentences)
    picked = rng.sample(range(facts), asked)
    return " ".join(sentences), [(f"What is the code for {names[i]}?", facts_told[i]) for i in picked]
