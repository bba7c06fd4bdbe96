"""The prompts of a run: those it draws from, those held out, and that every one of them can be used."""

import math
import random
from pathlib import Path

from tqdm import tqdm

from base.cli import BadInput
from prompts import sources, tasks


def prompts(config, encode, limit, score_all, main):
    """-> (source, held_out, tokens of the longest prompt): source[i] is the i-th row drawn; held_out is
    {name: rows}.

    encode: row -> token ids, of at most `limit` or else BadInput, another limit by keyword; limit: tokens
    that the context leaves for a prompt; main: whether to print what there is; score_all: see scoring.py.
    Each row is scored once with an empty answer: one that the reward cannot use shows now, not in hours.
    Raises BadInput as `files` and the reward, and when a held-out prompt is too long.
    """
    if config.data:
        measure = lambda row: len(encode(row, limit=math.inf))  # noqa: E731
        how = config.data_rows, config.seed, measure, limit, config.truncate_prompts, main
        rows_of, longest, lines = files(config.data, sources.prompt_row, *how)
        source = sources.Mixture(rows_of, config.data_weights, config.seed)
        held_out = {path: sources.read(path, sources.prompt_row) for path in config.eval_data}
        both = ((path, sources.shared(rows, rows_of)) for path, rows in held_out.items())
        lines += [
            f"data: {count:,} held-out prompts of {path} are trained on as well"
            for path, count in both
            if count
        ]
        if main:
            print("\n".join(lines))
    else:
        source = tasks.Source(config.task, f"train {config.seed}", config.facts, config.filler)
        held_out = {}
        for filler in (config.eval_filler or [config.filler]) if config.eval_prompts else []:
            held_out_source = tasks.Source(config.task, "held out", config.facts, filler)
            held_out[f"filler {filler}"] = [held_out_source[i] for i in range(config.eval_prompts)]
        rows_of, longest = [[source[0]]], len(encode(source[0]))
    score_all([("", row) for rows in (*rows_of, *held_out.values()) for row in rows])
    for row in (row for rows in held_out.values() for row in rows):
        encode(row)
    return source, held_out, longest


def files(paths, parse_row, counts, seed, measure, limit, keep_long=False, progress=True):
    """Files -> (rows of each that training draws from, tokens of the longest, lines about them for the user).

    counts: how many rows of each file, chosen by the seed (0: all; none for all of all). measure(row): its
    tokens. Rows of more than `limit` tokens are dropped, counted and replaced by others, unless keep_long.
    Raises BadInput when a file has too few, or none is left of it.
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
            raise BadInput(
                f"{path}: not one of {len(rows)} rows fits in the {limit} tokens that the context leaves"
            )
        if len(fit) < count:
            raise BadInput(
                f"--data-rows {count}: only {len(fit)} rows of {path} fit in the {limit} tokens that are left"
            )
        files.append(fit)
        note = f", {over} over {limit:,} tokens {'cut' if keep_long else 'dropped'}" if over else ""
        lines.append(f"data: {len(fit):,} of {len(rows):,} rows of {name}{note}")
    if repeated := sources.duplicates([row for rows in files for row in rows]):
        lines.append(f"data: {repeated:,} rows repeat an earlier one")
    return files, longest, lines
