"""Why should it work? The gradient of W_Q and W_K by rows: how much of it the selected rows hold, its signal
to noise, and what SGD and AdamW make of it.

    python -m studies.gradients runs/real/sft/checkpoint --tasks tracking chain
    python -m studies.gradients runs/real/rl/checkpoint --tasks tracking             # after RL

Of each task vLLM samples groups of completions until the rewards of --groups groups differ. Of each of them
the gradient of DAPO's loss is taken on its own (weights never change), and of each row of W_Q and W_K is kept
what follows below. Magnitudes are saliency.py's over the same groups. Rows: top are those that LongAct
selects, bottom as many with the smallest magnitudes, middle the others.

Left in --out:

    TASK.jsonl          the groups: prompt, completions (token ids), rewards. They are sampled once
    TASK.safetensors    for each projection, as (heads, D): .magnitude; .squares, the squared gradient summed
                        over groups; .total, the squared norm of the summed gradient; .cross, the scalar
                        product of the mean gradients of two halves of the groups; .moved, the squared change
                        by AdamW (learning rate 1, from zeros, steps of --step groups of one half), mean over
                        both halves; .gained, its change times the other half's mean gradient, likewise;
                        as (blocks, heads, D): .squares_without and .total_without, of all groups but those of
                        one block. Group i is of block i % blocks, of which there are 8, or with fewer groups
                        the largest even number of them
    gradients.json      settings, and for each task:
        groups, sampled     groups whose rewards differ; groups that were sampled
        of_all              share of the squared mean gradient of all weights in q, k, v, o, mlp, norms,
                            embedding
        q, k                with these keys, all but snr and rank shares of all rows of all layers:
            {top, middle, bottom}: {rows, magnitude (squared), gradient (of the mean over all groups,
                    squared), signal (the same without what noise adds), snr (of a step of 8 groups: 8 times
                    signal over the variance of a group's gradient), snr_layers, snr_mean (over layers), sgd
                    (first-order gain on the other half), adam_moved (squared change), adam_gain}
            top_minus_bottom: {snr, snr_mean}
            chosen_by: {own, partner, gradient}: share of the signal in the top rows if rows were chosen by
                    their own magnitude (LongAct), by the magnitude of what they are multiplied with, or by
                    the gradient itself (of the same groups: an upper bound)
            errors: of gradient, signal, snr, snr_layers, snr_mean and chosen_by in the same places: standard
                    errors over groups, by jackknife over the blocks, with the rows chosen by all groups
            rank: {own, partner}: rank correlation within a head of a row's gradient with either, mean
            unseen: {signal, adam_moved}: of the rows with the smallest partners, as many as bottom

A row's partner: q . k sums over rotated pairs of dimensions, so the gradient of row d of W_Q is scaled by K's
magnitudes in d and in the dimension that RoPE turns it with, and W_K's by Q's in its heads.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dapo
import grpo
import saliency
from base import bars, durable
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from evals import stats, subject
from model import Qwen3
from prompts import chat, rewards, tasks

STEP = 8  # groups of the step that `snr` is of
BLOCKS = 8  # of the jackknife
CLASSES = ("top", "middle", "bottom")


@dataclass
class Config:
    checkpoint: str = option("", "directory: config.json, safetensors, tokenizer.json", positional=True)
    tasks: list[str] = option(["tracking"], "tasks of prompts/tasks.py", list(tasks.TASKS))
    facts: int = option(12, "facts in a passage", least=2)
    filler: int = option(6, "other sentences in a passage", least=0, most=10**5)
    groups: int = option(24, "groups whose rewards differ, of each task", least=4, most=10**5)
    rounds: int = option(20, "most rounds of --round prompts to find them in", least=1)
    round: int = option(16, "prompts of a round of sampling", least=1, most=10**4)
    completions: int = option(8, "completions of a group, at temperature 1", least=2, most=1024)
    max_completion: int = option(24, "tokens of a completion", least=1)
    step: int = option(4, "groups of each of AdamW's steps", least=1)
    seed: int = option(0, "seed of prompts and completions", least=0)
    fraction: float = option(0.3, "share of each head's dimensions that is selected", above=0, most=0.49)
    out: str = option("", "directory of the results (default: runs/gradients/<checkpoint's name>)")


def settings_of(config, model_config):
    """All that the groups and what is made of them depend on, but the task."""
    asked = "facts filler groups round completions max_completion step seed fraction".split()
    settings = subject.settings(config.checkpoint, model_config) | {"blocks": BLOCKS}
    return settings | {key: getattr(config, key) for key in asked}


# --------------------------------------------------------------------------------------------------- sampling


def sample(config, task, engine, tokenizer, path):
    """Write the groups of a task, one a line, to `path`: those whose rewards differ, and how many were drawn
    until then. Raises BadInput if there are too few."""
    source = tasks.Source(task, f"train {config.seed}", config.facts, config.filler)
    found, drawn = [], 0
    bar = bars.bar(total=config.groups, desc=f"{task}, sampling", unit="group")
    for _ in range(config.rounds):
        rows = [source[i] for i in range(drawn, drawn + config.round)]
        prompts = [chat.encode_prompt(tokenizer, row, False, 2**30) for row in rows]
        seeds = [config.seed * 2**32 + (drawn + i) * config.completions for i in range(len(rows))]
        how = config.completions, 1.0, config.max_completion, seeds, chat.stop_ids(tokenizer)
        for row, prompt, group in zip(rows, prompts, engine.generate(prompts, *how), strict=True):
            drawn += 1
            texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
            values = [rewards.score(rewards.exact, chat.answer_text(text, False), row) for text in texts]
            if len(set(values)) > 1:
                completions = [completion.ids for completion in group]
                found.append(
                    {"prompt": prompt, "completions": completions, "rewards": values, "drawn": drawn}
                )
        bar.update(min(len(found), config.groups) - bar.n)
        if len(found) >= config.groups:
            break
    bar.close()
    if len(found) < config.groups:
        raise BadInput(
            f"{task}: the rewards of {len(found)} of {drawn} groups differ, --groups wants {config.groups}; "
            "raise --rounds, or choose --facts and --filler that the model answers half of"
        )
    durable.write(path, "".join(json.dumps(group) + "\n" for group in found[: config.groups]))


# -------------------------------------------------------------------------------------------------- gradients


class Adam:
    """Where AdamW would bring weights that begin at 0, at learning rate 1, were all gradients taken at the
    same weights. A step is of `step` groups."""

    def __init__(self, shapes, step):
        self.step, self.groups = step, 0
        self.weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self.adam = torch.optim.AdamW(self.weights.values(), lr=1.0, weight_decay=0.0)

    def add(self, gradients):
        self.groups += 1
        for name, gradient in gradients.items():
            weight = self.weights[name]
            weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)
        if self.groups % self.step == 0:
            self.adam.step()
            self.adam.zero_grad()


def loss_of(model, group, tokens):
    """DAPO's loss of a group, were it one of as many as have `tokens` completion tokens each on average."""
    completions = [torch.tensor(ids) for ids in group["completions"]]
    lengths = [len(ids) for ids in completions]
    advantages = grpo.advantages(torch.tensor(group["rewards"], dtype=torch.float32))
    logprobs, _ = model.completion_logprobs(model.read(torch.tensor(group["prompt"])), completions)
    totals = grpo.Totals(len(lengths), tokens, max(lengths))
    per_token = advantages.repeat_interleave(torch.tensor(lengths))
    return dapo.loss(logprobs, logprobs.detach(), per_token, lengths, totals)[0]


def measure(model, groups, step):
    """-> {"PROJECTION.KEY": (heads, D) or (blocks, heads, D), fp32}, see above, and of_all, {part of the
    model: share}. What is left of a step at the end does not count for AdamW."""
    D, n = model.config.head_dim, len(groups)
    blocks = min(BLOCKS, n) // 2 * 2  # of both halves as many
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name.endswith(("q_proj.weight", "k_proj.weight"))]
    shapes = {name: parameters[name].shape for name in names}
    adams = Adam(shapes, step), Adam(shapes, step)
    sums = {name: torch.zeros(blocks, *shape) for name, shape in shapes.items()}
    squares = {name: torch.zeros(blocks, shape[0]) for name, shape in shapes.items()}
    tokens = sum(len(ids) for group in groups for ids in group["completions"]) / n
    with saliency.Tracker(model) as tracker:
        for i, group in enumerate(bars.bar(groups, desc="gradients", unit="group")):
            loss_of(model, group, tokens).backward()
            gradients = {name: parameters[name].grad for name in names}  # of the others they add up
            adams[i % 2].add(gradients)
            for name, gradient in gradients.items():
                sums[name][i % blocks] += gradient
                squares[name][i % blocks] += gradient.square().sum(1)
                parameters[name].grad = None
    result = {}
    for name, magnitude in tracker.magnitudes().items():
        weight = f"{name}.weight"
        a, b = (sums[weight][half::2].sum(0) / len(groups[half::2]) for half in (0, 1))
        moves = [adam.weights[weight].detach() for adam in adams]
        total = parameters[weight].grad = sums[weight].sum(0)
        rows = {
            "squares": squares[weight].sum(0),
            "squares_without": squares[weight].sum(0) - squares[weight],
            "total": total.square().sum(1),
            "total_without": torch.stack([(total - block).square().sum(1) for block in sums[weight]]),
            "cross": (a * b).sum(1),
            "moved": sum(moved.square().sum(1) for moved in moves) / 2,
            "gained": -((moves[0] * b).sum(1) + (moves[1] * a).sum(1)) / 2,
        }
        result[f"{name}.magnitude"] = magnitude
        result |= {f"{name}.{key}": values.unflatten(-1, (-1, D)) for key, values in rows.items()}
    return result, of_all(parameters)


def of_all(parameters):
    """{name: parameter with its gradient} -> {part of the model: share of the squared gradient}."""
    parts = dict.fromkeys(("q", "k", "v", "o", "mlp", "norms", "embedding"), 0.0)
    for name, parameter in parameters.items():
        words = name.split(".")
        if "mlp" in words:
            part = "mlp"
        elif words[-2].endswith("_proj"):
            part = words[-2][0]
        else:
            part = "norms" if words[-2].endswith("norm") else "embedding"
        parts[part] += parameter.grad.double().square().sum().item()
    whole = sum(parts.values())
    return {part: value / whole for part, value in parts.items()}


# -------------------------------------------------------------------------------------------------- summaries


def partners(magnitudes, name):
    """Magnitudes {projection: (heads, D)} -> of a projection (heads, D): the magnitude of what each of its
    dimensions is multiplied with. In q . k RoPE mixes the dimensions d and d + D/2; a head of K meets all
    the heads of Q that share it."""
    q_name, k_name = (f"{name.removesuffix('q_proj').removesuffix('k_proj')}{w}_proj" for w in "qk")
    heads, key_heads = len(magnitudes[q_name]), len(magnitudes[k_name])
    other = magnitudes[k_name if name == q_name else q_name].square()
    pairs = other.unflatten(-1, (2, -1)).sum(-2).repeat(1, 2)  # of both dimensions, at each of them
    if name == q_name:
        return pairs.repeat_interleave(heads // key_heads, 0).sqrt()
    return pairs.unflatten(0, (key_heads, -1)).mean(1).sqrt()


def rank_correlation(a, b):
    """(heads, D) both -> Spearman's, of each head, mean over heads."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a, b)]
    centered = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    norms = [x.square().sum(-1).sqrt() for x in centered]
    return ((centered[0] * centered[1]).sum(-1) / (norms[0] * norms[1])).mean().item()


def select(keys, fraction, rule="top"):
    """{name: (heads, D)} -> {name: (heads, D) bool}, saliency's choice in each head."""
    masks = saliency.select_rows(keys, fraction, rule)
    return {name: masks[f"{name}.weight"].view_as(key) for name, key in keys.items()}


def share(values, masks, names):
    """{name: (heads, D)}, bool masks alike -> the share of the sum over `names` that lies in the masks."""
    return (sum(values[m][masks[m]].sum() for m in names) / sum(values[m].sum() for m in names)).item()


def reliability(total, squares, n, masks, chosen):
    """Squared norm of the sum and sum of the squared norms of n gradients, {name: (heads, D)} -> {"q": ...,
    "k": ...}: what `errors` are of, see above."""
    signal = {m: (total[m] - squares[m]) / (n * (n - 1)) for m in total}
    noise = {m: (squares[m] - total[m] / n) / (n - 1) for m in total}
    result = {}
    for which in "qk":
        own = [name for name in total if name.endswith(f"{which}_proj")]
        made = {}
        for kind in CLASSES:
            mask = masks[kind]
            pairs = [(signal[m][mask[m]].sum().item(), noise[m][mask[m]].sum().item()) for m in own]
            layers = [STEP * s / v for s, v in pairs]
            made[kind] = {
                "gradient": share(total, mask, own),
                "signal": share(signal, mask, own),
                "snr": STEP * sum(s for s, _ in pairs) / sum(v for _, v in pairs),
                "snr_mean": sum(layers) / len(layers),
                "snr_layers": layers,
            }
        top, bottom = made["top"], made["bottom"]
        made["top_minus_bottom"] = {key: top[key] - bottom[key] for key in ("snr", "snr_mean")}
        made["chosen_by"] = {key: share(signal, mask, own) for key, mask in chosen.items()}
        result[which] = made
    return result


def jackknife(parts):
    """What one statistic is without each of the blocks -> its standard error; dicts and lists of such, alike
    (Efron and Stein, 1981)."""
    if isinstance(parts[0], dict):
        return {key: jackknife([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], list):
        return [jackknife(values) for values in zip(*parts, strict=True)]
    mean = sum(parts) / len(parts)
    return math.sqrt(sum((value - mean) ** 2 for value in parts) * (len(parts) - 1) / len(parts))


def summarize(rows, n, fraction):
    """What `measure` gave of n groups -> {"q": ..., "k": ...}, see above."""
    names = [name.removesuffix(".magnitude") for name in rows if name.endswith(".magnitude")]

    def of(key):
        return {name: rows[f"{name}.{key}"].double() for name in names}

    magnitude, total, squares, moved = of("magnitude"), of("total"), of("squares"), of("moved")
    met = {name: partners(magnitude, name) for name in names}
    masks = {rule: select(magnitude, fraction, rule) for rule in ("top", "bottom")}
    masks["middle"] = {name: ~(masks["top"][name] | masks["bottom"][name]) for name in names}
    unseen = select(met, fraction, "bottom")
    by = {"own": magnitude, "partner": met, "gradient": total}
    by = {key: select(values, fraction) for key, values in by.items()}
    result = reliability(total, squares, n, masks, by)
    without = [of(f"{key}_without") for key in ("total", "squares")]
    blocks = len(without[0][names[0]])
    parts = []
    for b in range(blocks):
        fewer = [{m: values[b] for m, values in each.items()} for each in without]
        parts.append(reliability(*fewer, n - len(range(b, n, blocks)), masks, by))
    errors = jackknife(parts)
    columns = {
        "rows": {name: torch.ones_like(values) for name, values in magnitude.items()},
        "magnitude": {name: values.square() for name, values in magnitude.items()},
        "sgd": of("cross"),
        "adam_moved": moved,
        "adam_gain": of("gained"),
    }
    signal = {m: total[m] - squares[m] for m in names}
    ranked = {"own": magnitude, "partner": met}
    for which, made in result.items():
        own = [name for name in names if name.endswith(f"{which}_proj")]
        for kind in CLASSES:
            made[kind] |= {key: share(values, masks[kind], own) for key, values in columns.items()}
        made["errors"] = errors[which]
        made["rank"] = {
            key: sum(rank_correlation(total[m], values[m]) for m in own) / len(own)
            for key, values in ranked.items()
        }
        made["unseen"] = {"signal": share(signal, unseen, own), "adam_moved": share(moved, unseen, own)}
    return result


def report(summary):
    """A task's entry in gradients.json -> tables as text, in per cent but for snr, ± standard errors."""
    keys = "rows magnitude gradient snr snr_mean sgd adam_moved adam_gain".split()
    table = [["", *keys]]
    for which in "qk":
        for kind in (*CLASSES, "top_minus_bottom"):
            cells, errors = summary[which][kind], summary[which]["errors"][kind]
            row = []
            for key in keys:
                scale, digits = (1, 2) if key.startswith("snr") else (100, 1)
                error = f" ±{scale * errors[key]:.{digits}f}" if key in errors else ""
                row.append(f"{scale * cells[key]:.{digits}f}{error}" if key in cells else "")
            table.append([f"{which.upper()} {kind.replace('_', ' ')}", *row])
    lines = [stats.table(table), ""]
    parts = ", ".join(f"{part} {100 * value:.1f}" for part, value in summary["of_all"].items())
    lines.append(f"squared gradient of all weights: {parts}")
    for which in "qk":
        own, errors = summary[which], summary[which]["errors"]["chosen_by"]
        chosen = ", ".join(
            f"by {key} {100 * value:.1f} ±{100 * errors[key]:.1f}" for key, value in own["chosen_by"].items()
        )
        ranks = ", ".join(f"{key} {value:+.2f}" for key, value in own["rank"].items())
        unseen = f"signal {100 * own['unseen']['signal']:.1f}, moved {100 * own['unseen']['adam_moved']:.1f}"
        lines.append(f"{which.upper()}: signal in rows chosen {chosen}; rank {ranks}; least seen: {unseen}")
    return "\n".join(lines)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not config.checkpoint:
        raise BadInput("no checkpoint is given; its directory comes before lists like --tasks")
    config.checkpoint = hub.local(config.checkpoint)
    model_config, tokenizer, _ = subject.load(config.checkpoint)
    if config.groups < 4 * config.step:
        raise BadInput(f"--groups {config.groups}: each half needs two of AdamW's steps of {config.step}")
    out = Path(config.out or f"runs/gradients/{subject.name(config.checkpoint)}")
    lock = durable.claim(out, "gradients", ["settings.json"])
    settings = settings_of(config, model_config)
    if (out / "settings.json").exists() and durable.read_object(out / "settings.json") != settings:
        raise BadInput(f"{out} holds gradients of other settings; choose another --out or remove it")
    durable.write_json(out / "settings.json", settings)

    if missing := [task for task in config.tasks if not (out / f"{task}.jsonl").exists()]:
        from rollout import Rollout  # after the checks above: importing vLLM takes seconds

        engine = Rollout(config.checkpoint, model_config.context_length, "float32")
        for task in missing:
            sample(config, task, engine, tokenizer, out / f"{task}.jsonl")
        engine.close()
        del engine
    path = out / "gradients.json"
    summary = durable.read_object(path) if path.exists() else {"settings": settings}  # of other tasks, too
    for task in config.tasks:
        groups = [group for _, _, group in durable.json_lines(out / f"{task}.jsonl")]
        rows = out / f"{task}.safetensors"
        if not rows.exists():
            model = Qwen3.from_pretrained(config.checkpoint)
            tensors, parts = measure(model, groups, config.step)
            with durable.replacing(rows) as partial:
                save_file(tensors, partial, {"of_all": json.dumps(parts)})
            del model
        with safe_open(rows, "pt") as file:
            parts = json.loads(file.metadata()["of_all"])
        counts = {"groups": len(groups), "sampled": groups[-1]["drawn"], "of_all": parts}
        summary[task] = counts | summarize(load_file(rows), len(groups), config.fraction)
        print(f"{config.checkpoint}, {task}: {len(groups)} groups of {groups[-1]['drawn']}; per cent")
        print(f"{report(summary[task])}\n")
    durable.write_json(path, summary)
    print(f"results: {path}")
