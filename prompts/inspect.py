"""What is in a file of prompts or chats: counts, lengths in tokens, three rows as the model reads them.

python -m prompts.inspect FILE --model Qwen3-8B
python -m prompts.inspect hf://Tongyi-Zhiwen/DocQA-RL-1.6K/train.parquet --model Qwen3-8B
"""

import math
from collections import Counter
from dataclasses import dataclass

from base import bars
from base.cli import BadInput, one_line_errors, option, parse
from prompts import chat, sources


@dataclass
class Config:
    file: str = option("", "file of prompts or of chats, see prompts/sources.py", positional=True)
    model: str = option("assets/tiny", "checkpoint directory whose tokenizer counts the tokens")
    thinking: bool = option(False, "render prompts as for a model that thinks")


def inspect(config):
    """Print what is in config.file. Raises BadInput for a file or a checkpoint that cannot be used."""
    if not config.file:
        raise BadInput("name a file: python -m prompts.inspect FILE")
    tokenizer = chat.load_tokenizer(config.model, math.inf)
    print(chat.described(tokenizer))
    rows = sources.read(config.file, sources.any_row)
    lengths, said = [], 0  # tokens of each row; the assistant's in total
    for row in bars.bar(rows, unit="row", leave=False):
        ids, trained = encode_row(tokenizer, row, config.thinking)
        lengths.append(len(ids))
        said += sum(trained)
    print(f"{config.file}: {len(rows):,} rows, {sources.duplicates(rows):,} repeat an earlier one")
    for key in ("data_source", "ability"):
        for value, count in Counter(str(row[key]) for row in rows if key in row).most_common():
            print(f"  {key} {value}: {count:,}")
    assistant = f", of which {said:,} are the assistant's" if said else ""
    total = f"{sum(lengths):,} in total{assistant}"
    print(f"tokens of a row by {config.model}: {min(lengths):,} to {max(lengths):,}, {total}")
    print(histogram(lengths), end="")
    for i in sorted({0, len(rows) // 2, len(rows) - 1}):
        title = f"--- {rows[i]['id']}, {lengths[i]:,} tokens "
        print(f"\n{title:-<100}")
        ids, _ = encode_row(tokenizer, rows[i], config.thinking)
        print(shortened(tokenizer.decode(ids, skip_special_tokens=False)))
        if "answer" in rows[i]:
            print(f"--- answer: {shortened(str(rows[i]['answer']))}")


def encode_row(tokenizer, row, thinking):
    """A chat or a prompt -> token ids (list of int), and for each whether SFT trains on it ([] for a
    prompt)."""
    if "messages" in row:
        return chat.encode_conversation(tokenizer, row["messages"])
    return chat.encode_prompt(tokenizer, row, thinking, math.inf), []


def histogram(lengths):
    """Lengths -> lines of text with a bar for each power of two from the shortest to the longest."""
    bins = Counter(max(0, n - 1).bit_length() for n in lengths)  # bin b: 2^(b-1) < n <= 2^b
    lines = ""
    for b in range(min(bins), max(bins) + 1):
        bar = "#" * math.ceil(50 * bins[b] / max(bins.values()))
        lines += f"  {2**b // 2 + 1:>9,} to {2**b:>9,}  {bins[b]:>7,}  {bar}\n"
    return lines


def shortened(text, most=1200):
    """A text of up to `most` characters unchanged; of a longer one its beginning and end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most // 2 * 2:,} characters ...]\n{text[-(most // 2) :]}"


if __name__ == "__main__":
    one_line_errors()
    inspect(parse(Config, __doc__))
