"""Prompts in: rows -> ChatML -> token ids. Where rows come from: sources.py; how answers are judged: rewards.py;
tasks made on the fly: tasks.py.

    python data.py inspect FILE --model Qwen3-8B     # counts, lengths in tokens, three prompts as the model reads them
    python data.py inspect hf://Tongyi-Zhiwen/DocQA-RL-1.6K/train.parquet --model Qwen3-8B
"""

import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

import sources
from cli import BadInput, one_line_errors, option, parse

NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 begins an answer without thinking

# ------------------------------------------------------------------------------------------------------------- ChatML


def chat_parts(messages, thinking):
    """Messages -> the text Qwen3's chat template gives, up to and including the start of the assistant's turn, in parts:
    [(text, whether it is a control token), ...].

    With thinking the model opens <think> itself; without, an empty thinking block is already there. Earlier assistant
    turns lose their thinking. Tools are not supported.
    """
    parts = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = content.split("</think>")[-1].lstrip("\n")
        parts += [("<|im_start|>", True), (f"{role}\n{content}", False), ("<|im_end|>", True), ("\n", False)]
    return [*parts, ("<|im_start|>", True), ("assistant\n" + ("" if thinking else NO_THOUGHT), False)]


def chat(messages, thinking):
    """Messages -> the text of chat_parts."""
    return "".join(text for text, _ in chat_parts(messages, thinking))


def answer_text(completion, thinking):
    """What is scored of a completion: the text after the last </think>; nothing if thinking never ended."""
    if thinking and "</think>" not in completion:
        return ""
    return completion.split("</think>")[-1].strip()


# ------------------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(directory, vocab_size):
    """`directory`/tokenizer.json; refuses one whose ids the model's embedding does not have. Raises BadInput."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path} is missing; a checkpoint needs its tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()  # what is too long is for us to refuse, not for the file to cut
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise BadInput(f"{path} has token id {largest}, but the model's vocab_size is {vocab_size}: not its tokenizer")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if tokenizer.token_to_id(token) is None:
            raise BadInput(f"{path} has no token {token}: not a Qwen tokenizer")
    return tokenizer


def stop_ids(tokenizer):
    """The two tokens after which a Qwen model has nothing more to say."""
    return [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]


def encode_parts(tokenizer, parts):
    """[(text, whether it is a control token), ...] -> token ids of each part. What looks like a control token within a text,
    such as <|im_end|> in a document about chats, becomes letters: nobody ends a turn by quoting how turns end."""
    tokenizer.encode_special_tokens = True  # tokenizers' name for: as any other text
    ids = [
        [tokenizer.token_to_id(text)] if control else tokenizer.encode(text, add_special_tokens=False).ids
        for text, control in parts
    ]
    tokenizer.encode_special_tokens = False
    return ids


def encode_prompt(tokenizer, row, thinking, limit, truncate=False):
    """Row -> prompt token ids (list of int). Raises BadInput when they are more than `limit`; with `truncate`, the middle of
    the longest message is left out instead, as LongBench does."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    parts = encode_parts(tokenizer, chat_parts(messages, thinking))
    tokens = sum(map(len, parts))
    if tokens > limit:
        longest = max(parts, key=len)
        kept = len(longest) - (tokens - limit)
        if not truncate or kept < 2:
            raise BadInput(f"prompt {row['id']} has {tokens} tokens; the context leaves {limit} for a prompt")
        del longest[(kept + 1) // 2 : len(longest) - kept // 2]
    return [token for part in parts for token in part]


def encode_conversation(tokenizer, messages):
    """Messages that end with the assistant's -> token ids, and which of them are trained on: what the assistant says, its
    thinking and <|im_end|>.

    Every assistant turn stands as it is generated: it thinks if its content has </think>, else it follows an empty thinking
    block. (Where several turns think, Qwen3's template would hide the earlier thoughts from the later turns.)
    """
    ids, trained = [], []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        speaks = role == "assistant"
        given = role + "\n" + (content if not speaks else "" if "</think>" in content else NO_THOUGHT)
        read = [("\n", False)] * (i > 0) + [("<|im_start|>", True), (given, False)]
        said = [(content, False)] * speaks + [("<|im_end|>", True)]
        for parts, train in ((read, False), (said, speaks)):
            for piece in encode_parts(tokenizer, parts):
                ids += piece
                trained += [train] * len(piece)
    return ids, trained


# -------------------------------------------------------------------------------------------------------------- files


def load(paths, parse_row, counts, seed, measure, limit, keep_long=False, progress=True):
    """Files -> (rows of each that training draws from, tokens of the longest, lines about them for the user).

    counts: how many rows of each file, chosen by the seed (0: all; none for all of all). measure(row): its tokens. Rows of
    more than `limit` tokens are dropped, counted and replaced by others, unless keep_long. Raises BadInput when a file has
    too few, or none is left of it.
    """
    if counts and len(counts) != len(paths):
        raise BadInput(f"--data-rows has {len(counts)} numbers for {len(paths)} files")
    files, longest, lines = [], 0, []
    for path, count in zip(paths, counts or [0] * len(paths)):
        rows = sources.read(path, parse_row)
        if count > len(rows):
            raise BadInput(f"--data-rows {count}: {path} has only {len(rows)} rows")
        name, fit, over = Path(path).name, [], 0
        order = random.Random(f"{seed} rows").sample(rows, len(rows)) if count else rows
        for row in tqdm(order, desc=name, unit="row", disable=not progress, leave=False):
            tokens = measure(row)
            over += tokens > limit
            if keep_long or tokens <= limit:
                fit.append(row)
                longest = max(longest, min(tokens, limit))
            if len(fit) == count:  # 0 is never reached
                break
        if not fit:
            raise BadInput(f"{path}: not one of {len(rows)} rows fits in the {limit} tokens that the context leaves")
        if len(fit) < count:
            raise BadInput(f"--data-rows {count}: only {len(fit)} rows of {path} fit in the {limit} tokens that are left")
        files.append(fit)
        note = f", {over} over {limit:,} tokens {'cut' if keep_long else 'dropped'}" if over else ""
        lines.append(f"data: {len(fit):,} of {len(rows):,} rows of {name}{note}")
    if repeated := sources.duplicates([row for rows in files for row in rows]):
        lines.append(f"data: {repeated:,} rows repeat an earlier one")
    return files, longest, lines


# ------------------------------------------------------------------------------------------------------------ inspect


@dataclass
class Config:
    command: str = option("inspect", "what to do", ["inspect"], positional=True)
    file: str = option("", "JSONL or Parquet of prompts or of chats, see sources.py; or hf://ORG/NAME/PATH", positional=True)
    model: str = option("assets/tiny", "checkpoint directory whose tokenizer counts")
    thinking: bool = option(False, "render prompts with Qwen3's thinking template")


def inspect(config):
    if not config.file:
        raise BadInput("name a file: python data.py inspect FILE")
    tokenizer = load_tokenizer(config.model, math.inf)
    rows = sources.read(config.file, sources.any_row)
    lengths, said = [], 0  # tokens of each row; of the assistant in all
    for row in tqdm(rows, unit="row", leave=False):
        ids, trained = encode_row(tokenizer, row, config.thinking)
        lengths.append(len(ids))
        said += sum(trained)
    print(f"{config.file}: {len(rows):,} rows, {sources.duplicates(rows):,} repeat an earlier one")
    for key in ("data_source", "ability"):
        for value, count in Counter(str(row[key]) for row in rows if key in row).most_common():
            print(f"  {key} {value}: {count:,}")
    print(f"tokens of a row by {config.model}: {min(lengths):,} to {max(lengths):,}, {sum(lengths):,} in all", end="")
    print(f", of them {said:,} the assistant's" if said else "")
    print(histogram(lengths), end="")
    for i in sorted({0, len(rows) // 2, len(rows) - 1}):
        title = f"--- {rows[i]['id']}, {lengths[i]:,} tokens "
        print(f"\n{title:-<100}")
        ids, _ = encode_row(tokenizer, rows[i], config.thinking)
        print(shortened(tokenizer.decode(ids, skip_special_tokens=False)))
        if "answer" in rows[i]:
            print(f"--- answer: {shortened(str(rows[i]['answer']))}")


def encode_row(tokenizer, row, thinking):
    """A chat or a prompt -> token ids, and which of them SFT trains on (none of a prompt)."""
    if "messages" in row:
        return encode_conversation(tokenizer, row["messages"])
    return encode_prompt(tokenizer, row, thinking, math.inf), []


def histogram(lengths):
    """Lengths -> lines of text bars, one for each power of two they reach from the least to the most."""
    bins = Counter(max(0, n - 1).bit_length() for n in lengths)  # bin b: 2^(b-1) < n <= 2^b
    lines = ""
    for b in range(min(bins), max(bins) + 1):
        bar = "#" * math.ceil(50 * bins[b] / max(bins.values()))
        lines += f"  {2**b // 2 + 1:>9,} to {2**b:>9,}  {bins[b]:>7,}  {bar}\n"
    return lines


def shortened(text, most=1200):
    """The text, of a long one its beginning and end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most // 2 * 2:,} characters ...]\n{text[-(most // 2) :]}"


if __name__ == "__main__":
    one_line_errors()
    inspect(parse(Config, __doc__))
