"""Prompts in: rows -> ChatML -> token ids. How answers are judged: rewards.py; tasks made on the fly: tasks.py.

A row is a dictionary. Training reads rows from a JSONL file (--data), one object a line:
    prompt   a string, or a list of {"role", "content"} messages as in the OpenAI format   (required)
    answer   what the reward compares with: a string or a list of accepted strings         (required)
    any other key is passed to the reward function untouched.
"""

import json
import random
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
