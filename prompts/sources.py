"""Rows in: files of prompts or conversations, local or of the Hugging Face hub, and in which order training
draws them.

A file is JSONL (one object a line) or Parquet (by its name: .parquet); either may hold any of these rows:
    ours       prompt: a text, or a list of {"role", "content"} messages; answer: a text or a list of accepted ones; any
               other key is passed to the reward untouched
    verl's     prompt: messages; reward_model: {"style", "ground_truth"}; data_source, ability, extra_info. The ground truth,
               a text or a list, becomes the answer. DocQA-RL-1.6K is this
    MemAgent's verl's with context: the document, and a question alone as the prompt. We put both into the
    template of
               MemAgent's single-pass baseline
    a chat     messages: a list of {"role", "content"} that ends with the assistant's; for sft.py
`hf://ORG/NAME/PATH` is the file PATH of the data set ORG/NAME on the hub, downloaded once.
"""

import hashlib
import json
import random
from pathlib import Path

from base import durable
from base.cli import BadInput

# QwenLong-L1's prompt with MemAgent's last line (recipe of its baseline, which left the braces of a format
# string doubled).
LONG_DOCUMENT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n{question}\n\n"
    "Put the answer in \\boxed{{}}."
)

# -------------------------------------------------------------------------------------------------------------- files


def local(path):
    """A path, or hf://ORG/NAME/PATH -> the path of a file on this machine. Raises BadInput when the hub does
    not give it."""
    if not str(path).startswith("hf://"):
        return Path(path)
    from huggingface_hub import hf_hub_download  # only for those who ask for the network

    parts = str(path).removeprefix("hf://").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise BadInput(f"{path}: write hf://ORG/NAME/PATH for a file of a data set on the hub")
    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except (
        OSError,
        ValueError,
    ) as error:  # what the hub's client raises: no network, no such file, no such name
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise BadInput(
            f"{path} cannot be fetched from the hub: {reason}; or download it and give its path"
        ) from error


def parquet_rows(path):
    """[("row 3", "PATH, row 3", value), ...] of a Parquet file, counted from 1. Raises BadInput for one that
    cannot be read or has no rows."""
    import pyarrow
    import pyarrow.parquet  # 0.2 s that only those who have such a file wait for

    def in_json(kind):
        """Whether JSON, in which rows go to reward workers and are compared, has values of this type."""
        if pyarrow.types.is_nested(kind):  # of lists and structs, their fields'
            return not pyarrow.types.is_map(kind) and all(
                in_json(kind.field(i).type) for i in range(kind.num_fields)
            )
        if pyarrow.types.is_dictionary(kind):
            return in_json(kind.value_type)
        plain = "string large_string string_view boolean integer floating null".split()
        return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in plain)

    try:
        file = pyarrow.parquet.ParquetFile(path)
        for field in file.schema_arrow:
            if not in_json(field.type):
                raise BadInput(
                    f"{path}: column {field.name!r} is {field.type}, which JSON has not; drop it or make it text"
                )
        batches = file.iter_batches()
        values = [value for batch in batches for value in batch.to_pylist()]
    except BadInput:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not values:
        raise BadInput(f"{path} has no rows")
    return [(f"row {number}", f"{path}, row {number}", value) for number, value in enumerate(values, 1)]


def read(path, parse):
    """All rows of a file: `parse`(value, where) of each, with an id ("FILE line 3" unless it has one). Raises
    BadInput, for a malformed row with its line or number, and for an id that another row has: messages name
    rows by it."""
    file = local(path)
    rows, places = [], {}
    for name, where, value in parquet_rows(file) if file.suffix == ".parquet" else durable.json_lines(file):
        if not isinstance(value, dict):
            raise BadInput(f"{where} must be an object")
        row = {"id": f"{file.name} {name}", **parse(value, where)}
        if not isinstance(row["id"], (str, int)):
            raise BadInput(
                f'{where}: "id" must be a string or an integer, not {row["id"]!r:.80}; it may be left out'
            )
        if row["id"] in places:
            raise BadInput(
                f'{where}: "id" {row["id"]!r:.80} is that of {places[row["id"]]} too; it may be left out'
            )
        places[row["id"]] = name
        rows.append(row)
    return rows


def digest(paths):
    """Hash of the files' bytes: tells whether a run goes on with the data it began with."""
    return durable.digest_of_files(map(local, paths))


# --------------------------------------------------------------------------------------------------------------- rows


def prompt_row(value, where):
    """A row of any schema above but the chat -> the same with "prompt" and "answer". Raises BadInput that
    begins with `where`."""
    if isinstance(value.get("reward_model"), dict):
        value = {**value, "answer": value["reward_model"].get("ground_truth")}
    if not {"prompt", "answer"} <= value.keys():
        raise BadInput(f'{where} must have "prompt" and "answer", or verl\'s "prompt" and "reward_model"')
    prompt, answer = value["prompt"], value["answer"]
    if not (isinstance(prompt, str) and prompt):
        check_messages(prompt, "user", f'{where}: "prompt"')
    golds = answer if isinstance(answer, list) else [answer]
    if not golds or not all(isinstance(gold, str) for gold in golds):
        raise BadInput(f'{where}: "answer" must be a string or a list of strings')
    if "reward_model" in value and isinstance(value.get("context"), str):
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = LONG_DOCUMENT.format(context=value["context"], question=question)
        value = {key: value[key] for key in value if key != "context"} | {"prompt": text}
    return value


def messages_row(value, where):
    """A row of chat messages, as it is. Raises BadInput that begins with `where`."""
    if "messages" not in value:
        raise BadInput(f'{where} must have "messages"')
    check_messages(value["messages"], "assistant", f'{where}: "messages"')
    return value


def any_row(value, where):
    """A chat or a row of prompt and answer, by what it has. Raises BadInput that begins with `where`."""
    return messages_row(value, where) if "messages" in value else prompt_row(value, where)


def check_messages(messages, last, what):
    roles = ("system", "user", "assistant")
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str) for m in messages
    )
    if not good or not messages or messages[-1]["role"] != last:
        raise BadInput(f"{what} must be messages with role and content that end with the {last}'s")
    if any(not m["content"] for m in messages if m["role"] == "assistant"):
        raise BadInput(f"{what}: the assistant says nothing in one of them")


def fingerprint(row):
    """Equal for rows with equal prompts, or messages."""
    return hashlib.sha256(json.dumps(row.get("messages") or row["prompt"]).encode()).digest()


def duplicates(rows):
    """How many rows have the prompt, or the messages, of an earlier one."""
    return len(rows) - len(set(map(fingerprint, rows)))


def shared(held_out, files):
    """How many of the held-out rows are among the rows of the files too."""
    trained = {fingerprint(row) for rows in files for row in rows}
    return sum(fingerprint(row) in trained for row in held_out)


# -------------------------------------------------------------------------------------------------------------- order


class Mixture:
    """The rows of several files without end: mixture[i] is the i-th draw, and depends on (files, weights,
    seed, i) only, so a run that stops after i draws goes on at i.

    files: lists of rows. Without weights all rows are one pool. With weights, positive and one for each file,
    the next draw is from the file that is furthest behind its share, so that any stretch of draws is mixed as
    it should be. A pool's or file's rows come in a new random order each time they have all been drawn.
    """

    def __init__(self, files, weights, seed):
        if weights and len(weights) != len(files):
            raise BadInput(f"--data-weights has {len(weights)} numbers for {len(files)} files")
        self.parts = files if weights else [[row for rows in files for row in rows]]
        self.shares = [weight / sum(weights) for weight in weights] or [1.0]
        self.seed, self.orders = seed, {}
        self.drawn, self.places = (
            [0] * len(self.parts),
            [],
        )  # of each part; (part, its how-manieth draw) of each draw

    def __getitem__(self, i):
        while len(self.places) <= i:
            behind = [share * (len(self.places) + 1) - drawn for share, drawn in zip(self.shares, self.drawn)]
            part = behind.index(max(behind))
            self.places.append((part, self.drawn[part]))
            self.drawn[part] += 1
        part, draw = self.places[i]
        rows = self.parts[part]
        epoch, place = divmod(draw, len(rows))
        if self.orders.get(part, (None,))[0] != epoch:
            order = list(range(len(rows)))
            random.Random(f"{self.seed} part {part} epoch {epoch}").shuffle(order)
            self.orders[part] = epoch, order
        return rows[self.orders[part][1][place]]
