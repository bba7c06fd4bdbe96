"""The prompts of a run: those it draws from, those held out, and that every one of them can be used."""

import math

import data
import sources
import tasks


def load(config, encode, limit, score_all, main):
    """-> (source, held_out, tokens of the longest prompt): source[i] is the i-th row drawn; held_out is {name: rows}.

    encode: (row, most tokens) -> token ids; limit: tokens that the context leaves for a prompt; main: whether to print what
    there is; score_all: see scoring.py. Each row is scored once with an empty answer: one that the reward cannot use shows
    now, not in hours.
    Raises BadInput as data.load and the reward, and when a held-out prompt is too long.
    """
    if config.data:
        measure = lambda row: len(encode(row, math.inf))  # noqa: E731
        how = config.data_rows, config.seed, measure, limit, config.truncate_prompts, main
        files, longest, lines = data.load(config.data, sources.prompt_row, *how)
        source = sources.Mixture(files, config.data_weights, config.seed)
        held_out = {path: sources.read(path, sources.prompt_row) for path in config.eval_data}
        both = ((path, sources.shared(rows, files)) for path, rows in held_out.items())
        lines += [f"data: {count:,} held-out prompts of {path} are trained on as well" for path, count in both if count]
        if main:
            print("\n".join(lines))
    else:
        source = tasks.Source(config.task, f"train {config.seed}", config.facts, config.filler)
        held_out = {}
        for filler in (config.eval_filler or [config.filler]) if config.eval_prompts else []:
            held_out_source = tasks.Source(config.task, "held out", config.facts, filler)
            held_out[f"filler {filler}"] = [held_out_source[i] for i in range(config.eval_prompts)]
        files, longest = [[source[0]]], len(encode(source[0], limit))
    score_all([("", row) for rows in (*files, *held_out.values()) for row in rows])
    for row in (row for rows in held_out.values() for row in rows):
        encode(row, limit)
    return source, held_out, longest
