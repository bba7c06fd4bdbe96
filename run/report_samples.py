"""The samples that a run's report shows: some of samples.jsonl, however long that is."""

import io
import json
import statistics

from base import limits, page, run_files
from base.chart import number
from base.cli import BadInput

SHOWN, NEWEST = 60, 30  # groups, and how many of them are the last ones
ROOM = 2_000_000  # bytes of samples in the page


def read_samples(path):
    """samples.jsonl -> groups for page.samples, in the order of the file. Raises BadInput."""
    groups, room = [], ROOM
    for begin, line in reversed(some_lines(path).items()) if path.exists() else ():
        try:
            group = group_of(limits.parse_json(line))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = "is not a sample as train.py and sft.py write it; remove that line"
            raise BadInput(f"{path}, the line at byte {begin} {what}") from error
        room -= len(json.dumps(group))
        if room < 0:
            break
        groups.append(group)
    return groups[::-1]


def some_lines(path, tail=8 * ROOM):
    """-> {where it begins: line}, in order: the last lines of a file, and others from everywhere in it. Only
    these are read, and its last `tail` bytes. A last line that is not finished is left out."""
    with limits.opened(path) as file:
        size = file.seek(0, io.SEEK_END)

        def begin_after(place):
            file.seek(max(0, place - 1))
            if place:
                file.readline()  # the rest of the line before
            return file.tell()

        lines = {}
        for i in range(SHOWN - NEWEST):
            begin = begin_after(i * size // (SHOWN - NEWEST))
            lines[begin] = file.readline()
        begin, newest = begin_after(max(0, size - tail)), {}
        for line in file:
            newest[begin] = line
            begin += len(line)
        lines |= dict(list(newest.items())[-NEWEST - 1 :])  # the very last may be unfinished
    return {begin: line for begin, line in sorted(lines.items()) if line.endswith(b"\n")}


def group_of(row):
    """A line of samples.jsonl (run/journal.py) -> a group for page.samples. Raises what a wrong line does."""
    if "completions" not in row:  # sft.py's
        words = page.cut_end(row["text"])
        marks = [[min(int(start), len(words)), min(int(end), len(words))] for start, end in row["trained"]]
        title = f"step {row['step']}, document {row['id']}; what is trained on is marked"
        return {"title": title, "kind": "trained", "prompt": words, "marks": marks, "answers": []}
    longest = max(600, ROOM // (2 * SHOWN) // max(1, len(row["completions"])))
    answers = []
    for each in row["completions"]:
        facts = [f"{name} {said(each.get(key))}" for key, name in FACTS.items() if each.get(key) is not None]
        if has_score(each):
            facts.insert(1, f"score {said(each['score'])}")
        facts.append("finished" if each["finished"] else "cut off")
        answer = {"score": each["reward"], "facts": ", ".join(facts), "text": page.cut(each["text"], longest)}
        answers.append(answer)
    what = "score" if any(map(has_score, row["completions"])) else "reward"
    numbers = [each[what] for each in row["completions"] if run_files.is_number(each.get(what))]
    mean = f", mean {what} {statistics.fmean(numbers):.3g}" if numbers else ""
    title = (
        f"step {row['step']}, prompt {row['prompt_id']}, {row['prompt_tokens']:,} tokens, {row['used']}{mean}"
    )
    return {"title": title, "kind": row["used"], "prompt": page.cut(row["prompt"]), "answers": answers}


FACTS = {
    "reward": "reward",
    "rewards": "each reward",
    "advantage": "advantage",
    "tokens": "tokens",
    "logprob": "mean log-probability",
    "entropy": "entropy",
}


def has_score(completion):
    """Whether advantages are made of something else than `reward`: several rewards, or a weight."""
    return completion.get("score") is not None and (
        "rewards" in completion or completion["score"] != completion["reward"]
    )


def said(value):
    if isinstance(value, list):
        return " and ".join(map(said, value))
    return number(value) if run_files.is_number(value) else str(value)


def samples_note(groups):
    return page.text(f"{len(groups)} of the run, most of them its newest; samples.jsonl has all.", "small")
