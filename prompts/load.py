"""The rows of a run: those it trains on and those held out, each checked before anything takes time."""

import math
import random
from pathlib import Path

from base import bars
from base.cli import BadInput
from prompts import sources, tasks


def for_training(config, encode, limit, score_all, main):
    """train.py's Config -> source, held_out, longest: source[i] is the i-th row drawn; held_out is {name:
    list of rows}; longest is the tokens of the longest prompt.

    encode: row -> token ids; raises BadInput for more than `limit`, or than its keyword `limit`. limit:
    tokens that the context leaves for a prompt. score_all: as scoring.start returns it. main: whether to
    print what there is. Every row is scored once with an empty answer, so that a row which the reward cannot
    use is found now and not hours later. Raises BadInput as `rows_of_files` and the reward, and for a
    held-out prompt that is too long.
    """
    if config.data:
        measure = lambda row: len(encode(row, limit=math.inf))  # noqa: E731
        how = config.data_rows, config.seed, measure, limit, config.truncate_prompts, main
        files, longest, lines = rows_of_files(config.data, sources.prompt_row, *how)
        source = sources.Mixture(files, config.data_weights, config.seed)
        held_out = {path: sources.read(path, sources.prompt_row) for path in config.eval_data}
        for path, rows in held_out.items():
            if count := sources.shared(rows, files):
                lines.append(f"data: {count:,} held-out prompts of {path} are trained on as well")
        if main:
            print("\n".join(lines))
    else:
        source = tasks.Source(config.task, f"train {config.seed}", config.facts, config.filler)
        files, longest, held_out = [[source[0]]], len(encode(source[0])), {}
        for filler in (config.eval_filler or [config.filler]) if config.eval_prompts else []:
            held_out_source = tasks.Source(config.task, "held out", config.facts, filler)
            held_out[f"filler {filler}"] = [held_out_source[i] for i in range(config.eval_prompts)]
    score_all([("", row) for rows in (*files, *held_out.values()) for row in rows])
    for row in (row for rows in held_out.values() for row in rows):
        encode(row)
    return source, held_out, longest


def rows_of_files(paths, parse_row, counts, seed, measure, limit, keep_long=False, progress=True):
    """Files -> files, longest, lines: for each file the list of its rows that training draws from; the tokens
    of the longest row; lines of text about them for the user.

    parse_row: one of prompts/sources.py. counts: how many rows of each file, chosen by the seed; 0 for all of
    a file, [] for all of all. measure(row): its tokens. Rows of more than `limit` tokens are dropped,
    counted, and replaced by others if there is a count; with keep_long they are kept. Raises BadInput for a
    file with too few rows that fit, or none.
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
        for row in bars.bar(order, desc=name, unit="row", disable=not progress, leave=False):
            tokens = measure(row)
            over += tokens > limit
            if keep_long or tokens <= limit:
                fit.append(row)
                longest = max(longest, min(tokens, limit))
            if len(fit) == count:  # 0 is never reached
                break
        room = f"the {limit} tokens that the context leaves"
        if not fit:
            raise BadInput(f"{path}: not one of {len(rows)} rows fits in {room}")
        if len(fit) < count:
            raise BadInput(f"--data-rows {count}: only {len(fit)} rows of {path} fit in {room}")
        files.append(fit)
        note = f", {over} over {limit:,} tokens {'cut' if keep_long else 'dropped'}" if over else ""
        lines.append(f"data: {len(fit):,} of {len(rows):,} rows of {name}{note}")
    if repeated := sources.duplicates([row for rows in files for row in rows]):
        lines.append(f"data: {repeated:,} rows repeat an earlier one")
    return files, longest, lines
