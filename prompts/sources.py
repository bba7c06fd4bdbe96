"""Files of prompts or chats, local or on the Hugging Face hub, and the order in which training draws rows.

A file is JSONL (one object a line) or Parquet (named *.parquet). A row is a dictionary of one of these kinds:

    ours        prompt: a string, or a list of {"role", "content"} messages. answer: a string, or a list of
                accepted ones. Any other key is passed to the reward unchanged.
    verl's      prompt: messages; reward_model: {"style", "ground_truth"}; data_source, ability, extra_info.
                The ground truth, a string or a list, becomes the answer. DocQA-RL-1.6K is of this kind.
    MemAgent's  verl's, with a document as context, and only a question as the prompt. Both are put into the
                template of MemAgent's single-pass baseline.
    a chat      messages: a list of {"role", "content"} that ends with the assistant's. For sft.py.

Each may have an id, a string or an integer. `hf://ORG/NAME/PATH` is the file PATH of the data set ORG/NAME on
the hub, downloaded once.
"""

import hashlib
import json
import random
from pathlib import Path

from base import durable, limits
from base.cli import BadInput

MOST_MESSAGES = 400  # of a chat: its template is rendered anew for each turn
# QwenLong-L1's prompt with the last line of MemAgent's baseline, whose code leaves doubled braces in it:
# \boxed{{}}.
LONG_DOCUMENT = (
    "Please read the following text and answer the question below.\n\n"
    "<text>\n{context}\n</text>\n\n{question}\n\nPut the answer in \\boxed{{}}."
)

# ------------------------------------------------------------------------------------------------------ files


def local(path):
    """A path, or hf://ORG/NAME/PATH -> Path of a file on this machine. Raises BadInput if it cannot be
    fetched from the hub."""
    if not str(path).startswith("hf://"):
        return Path(path)
    from huggingface_hub import hf_hub_download  # imported only if the network is asked for

    parts = str(path).removeprefix("hf://").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise BadInput(f"{path}: write hf://ORG/NAME/PATH for a file of a data set on the hub")
    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except (OSError, ValueError) as error:  # the hub's client: no network, no such file, no such name
        reason = str(error).strip().split("\n")[0].rstrip(".")
        problem = f"{path} cannot be fetched from the hub: {reason}"
        raise BadInput(f"{problem}; or download it and give its path") from error


def parquet_rows(path):
    """A Parquet file -> [("row 1", "PATH, row 1", value), ...].

    Raises BadInput for a file that cannot be read or has no rows, and for a column whose values JSON cannot
    represent: rows are compared, and sent to reward workers, as JSON.
    """
    import pyarrow
    import pyarrow.parquet  # takes 0.2 s, so only for such a file

    def in_json(kind):
        """Whether JSON can represent values of this type."""
        if pyarrow.types.is_map(kind):
            return False
        if pyarrow.types.is_nested(kind):  # lists and structs
            return all(in_json(kind.field(i).type) for i in range(kind.num_fields))
        if pyarrow.types.is_dictionary(kind):
            return in_json(kind.value_type)
        plain = "string large_string string_view boolean integer floating null".split()
        return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in plain)

    try:
        limits.check(path)
        file = pyarrow.parquet.ParquetFile(path)
        for field in file.schema_arrow:
            if not in_json(field.type):
                problem = f"column {field.name!r} is {field.type}, which JSON cannot represent"
                raise BadInput(f"{path}: {problem}; drop it or make it text")
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
    """All rows of a file -> list of dict: what parse(value, where) returns for each, with an id, "FILE line
    3" unless it has its own.

    parse: prompt_row, messages_row or any_row. Raises BadInput as `local`, for a file that cannot be read,
    for a malformed row, which it names, and for an id that two rows have, since messages name rows by it.
    """
    file = local(path)
    rows, places = [], {}  # places: {id: "line 3"}
    for name, where, value in parquet_rows(file) if file.suffix == ".parquet" else durable.json_lines(file):
        if not isinstance(value, dict):
            raise BadInput(f"{where} must be an object")
        row = {"id": f"{file.name} {name}", **parse(value, where)}
        key, optional = row["id"], "it may be left out"
        if not isinstance(key, (str, int)):
            raise BadInput(f'{where}: "id" must be a string or an integer, not {key!r:.80}; {optional}')
        if key in places:
            raise BadInput(f'{where}: "id" {key!r:.80} is that of {places[key]} too; {optional}')
        places[key] = name
        rows.append(row)
    return rows


def digest(paths):
    """One hash, in hexadecimal, of the bytes of local files or files of the hub: tells whether a run goes on
    with the data it began with. Raises BadInput as `local`."""
    return durable.digest_of_files(map(local, paths))


# ------------------------------------------------------------------------------------------------------- rows


def prompt_row(value, where):
    """A row of any kind above but a chat -> the same with "prompt" and "answer". Raises BadInput; its message
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
    """A row that is a chat, checked -> the same. Raises BadInput; its message begins with `where`."""
    if "messages" not in value:
        raise BadInput(f'{where} must have "messages"')
    check_messages(value["messages"], "assistant", f'{where}: "messages"')
    return value


def any_row(value, where):
    """messages_row for a row with "messages", else prompt_row. Raises BadInput as they do."""
    return messages_row(value, where) if "messages" in value else prompt_row(value, where)


def check_messages(messages, last, what):
    """Raises BadInput, its message beginning with `what`, unless `messages` are chat messages, the last of
    role `last`, in which the assistant always says something."""
    roles = ("system", "user", "assistant")

    def is_message(m):
        return isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str)

    good = isinstance(messages, list) and messages and all(map(is_message, messages))
    if not good or messages[-1]["role"] != last:
        raise BadInput(f"{what} must be messages with role and content that end with the {last}'s")
    if len(messages) > MOST_MESSAGES:
        raise BadInput(f"{what}: {len(messages):,} messages; {MOST_MESSAGES:,} are the most")
    if any(not m["content"] for m in messages if m["role"] == "assistant"):
        raise BadInput(f"{what}: the assistant says nothing in one of them")


def fingerprint(row):
    """-> a hash (bytes) that is equal for rows with equal prompts or messages."""
    return hashlib.sha256(json.dumps(row.get("messages") or row["prompt"]).encode()).digest()


def duplicates(rows):
    """The number of rows that have the prompt or messages of an earlier one."""
    return len(rows) - len(set(map(fingerprint, rows)))


def shared(held_out, files):
    """The number of held-out rows that are also in `files`, lists of rows that training draws from."""
    trained = {fingerprint(row) for rows in files for row in rows}
    return sum(fingerprint(row) in trained for row in held_out)


# ------------------------------------------------------------------------------------------------------ order


class Mixture:
    """Endless draws from the rows of several files: mixture[i] is the i-th draw. It depends only on files,
    weights, seed and i, so a run that stops after i draws goes on at i.

    files: lists of rows. Without weights all rows are one pool. With weights, positive and one for each file,
    each draw is from the file that is furthest behind its share, so any stretch of draws is mixed in
    proportion. The rows of a pool or file come in a new random order each time they have all been drawn.
    Raises BadInput for a wrong number of weights.
    """

    def __init__(self, files, weights, seed):
        if weights and len(weights) != len(files):
            raise BadInput(f"--data-weights has {len(weights)} numbers for {len(files)} files")
        self.parts = files if weights else [[row for rows in files for row in rows]]
        self.shares = [weight / sum(weights) for weight in weights] or [1.0]
        self.seed, self.orders = seed, {}
        self.drawn = [0] * len(self.parts)  # the number of draws from each part so far
        self.places = []  # of each draw: (part, draw number within the part)

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
