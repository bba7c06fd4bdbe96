"""One step of train.py, told with its own numbers: docs/one-step.md and its figures, in under a minute.

    python -m studies.one_step                                              # vLLM samples the completions
    python -m studies.one_step --completions docs/one-step/completions.json # those of a page written before

The text stands in studies/one_step.md, a template of str.format: {s.norm:.2f} is a variable of `take_step`,
{t.table} one of `derived`. @[file:name] becomes a link to the lines of a function or class, @[file~text] one
to the statement that begins with this text. When code has moved, the second command writes the page again
with the same completions.

`take_step` is the step: what train.py does with FLAGS, in the same order, on one process of a CPU. The test
runs train.py with these flags and compares the weights.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import ast
import json
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

import dapo
import grpo
import losses
import saliency
from base import durable
from base.cli import one_line_errors, option, parse
from core import schedule
from model import Qwen3
from prompts import chat, rewards, tasks
from rollout import Completion, Group, Rollout
from run import defaults, metrics
from run.config import Config as Training
from run.preflight import check_model, prompt_room
from studies import one_step_figures

ROOT = Path(__file__).parent.parent
FLAGS = "--seed 12 --prompts 1 --completions 8 --tokens-per-pass 48 --steps 1 --eval-prompts 0"
LAYER, HEAD = 0, 3  # whose numbers are shown
Q, K = (f"model.layers.{LAYER}.self_attn.{which}_proj" for which in "qk")
ENDS = slice(15), slice(-22, None)  # of the prompt, whose tokens are shown
POINTER = re.compile(r"@\[([\w./]+)([:~])(.+?)\]")


@dataclass
class Config:
    out: str = option("docs", "where one-step.md and one-step/ are written")
    completions: str = option("", "completions.json of a page: tell of these instead of sampling")


class Stored:
    """In place of a Rollout: the completions that one has given before, in the same order."""

    def __init__(self, path):
        answers = json.loads(Path(path).read_text())
        self.answers = iter([Completion(**completion) for completion in answer] for answer in answers)

    def generate(self, *arguments, **options):
        return [next(self.answers)]

    def sync(self, model):
        pass

    sleep = close = lambda self: None


# --------------------------------------------------------------------------------------------------- the step


def take_step(config, engine):
    """train.py's first step with one prompt; engine: a Rollout or Stored -> what is told of it, by name."""
    model_config, tokenizer, config.context, _ = check_model(config.model, config.context)
    source = tasks.Source(config.task, f"train {config.seed}", config.facts, config.filler)
    defaults.fill(config, model_config, bf16=False)
    room = prompt_room(config.context, config.max_completion)

    def draw(number, _):
        row, seed = source[number], config.seed * 2**32 + number * config.completions
        prompt = chat.encode_prompt(tokenizer, row, config.thinking, room)
        how = config.completions, config.temperature, config.max_completion, [seed], chat.stop_ids(tokenizer)
        [completions] = engine.generate([prompt], *how)
        texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        answers = [chat.answer_text(text, config.thinking) for text in texts]
        scores = [rewards.score(rewards.exact, answer, row) for answer in answers]
        return [Group(number, prompt, completions, torch.tensor(scores))]

    [group], sampled, _ = dapo.fill_batch(draw, dapo.keep_group, 1, 1, config.max_rounds, lambda: False)
    shaped = dapo.shape_rewards(group.rewards, group.lengths, config.max_completion, config.overlong_cache)
    group.advantages = grpo.advantages(shaped, config.normalize_std)

    model = Qwen3.from_pretrained(config.model)
    learning_rate = config.learning_rate * schedule.warmup_factor(1, config.warmup)
    adam = {"betas": (0.9, config.adam_beta2), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, **adam)
    tally = metrics.Tally([group], config.context_parallel, torch.device("cpu"))
    totals = grpo.Totals(config.completions, tally.tokens, config.max_completion)
    [(_, passes, _)] = schedule.work_for_rank([group], 0, 1, config.tokens_per_pass)
    with saliency.Tracker(model, config.site, config.saliency_tokens) as tracker:
        prompt = model.read(torch.tensor(group.prompt))
        leaves = prompt.detach()
        turns = [train_pass(config, model, group, part, leaves, totals, tally) for part in passes]
        prompt.backward(leaves)
    tally.check_mismatch(1, config.mismatch_limit)

    parameters = dict(model.named_parameters())
    norm = get_total_norm([parameter.grad for parameter in parameters.values()]).item()
    gradients = {name: parameters[f"{name}.weight"].grad.clone() for name in (Q, K)}
    magnitudes = tracker.magnitudes()
    masks = saliency.select_rows(magnitudes, config.fraction, config.rule)
    squares = saliency.mask_gradients(model, masks)
    masked_gradients = {name: parameters[f"{name}.weight"].grad.clone() for name in (Q, K)}
    masked_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moved = saliency.masked_step(optimizer, model, masks, squares, config.unselected)
    optimizer.zero_grad()
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    engine.sync(model)

    tally.with_update(norm, masked_norm, moved, magnitudes, masks, {})
    [later] = draw(group.index, 1)
    with torch.no_grad():  # the new weights' log-probabilities of what the old ones, and they, have sampled
        of_earlier, of_later = (
            model.group_logprobs(
                torch.tensor(each.prompt), each.completion_ids(range(config.completions), "cpu")
            )
            for each in (group, later)
        )
    return SimpleNamespace(**locals())


def train_pass(config, model, group, part, leaves, totals, tally):
    """train.py's function of this name -> the pass's log-probabilities, loss and gradient at the leaves."""
    completions = group.completion_ids(part, "cpu")
    logprobs, entropies = model.completion_logprobs(leaves, completions, config.temperature)
    sampler, known = group.sampler_logprobs(part, "cpu")
    logprobs, entropies = logprobs[known], entropies[known]
    old, lengths = logprobs.detach(), [group.known_lengths[i] for i in part]
    advantages = group.advantages[part].repeat_interleave(torch.tensor(lengths))
    importance = grpo.importance_weights(old, sampler, config.importance_cap)
    config.epsilon_low, config.epsilon_high = losses.epsilons(config)
    policy_loss, _ = losses.choose(config)
    loss, stats = policy_loss(logprobs, old, advantages, lengths, totals, importance=importance)
    loss.backward()
    tally.add(group, part, loss, stats, entropies, old, sampler, config.importance_cap)
    at_keys = leaves.keys[LAYER].grad.norm().item()
    own = dict(zip(part, old.split(lengths)))
    return SimpleNamespace(part=part, logprobs=own, loss=loss, at_keys=at_keys)


# --------------------------------------------------------------------------------------------------- the page


def derived(s):
    """What take_step gave -> what the page shows of it beside its own variables: tables, texts, numbers."""
    decode = partial(s.tokenizer.decode, skip_special_tokens=False)
    starts, ends = (listing([(i, decode([i])) for i in s.group.prompt[cut]]) for cut in ENDS)
    asked = s.source[s.group.index]
    texts = [s.tokenizer.decode(c.ids, skip_special_tokens=True) for c in s.group.completions]
    passage, question = asked["prompt"][:210].rsplit(" ", 1)[0], asked["prompt"].split("\n\n")[1]
    lengths, parameters = s.group.lengths, sum(weight.numel() for weight in s.before.values())
    C, layers = s.model_config.hidden_size, s.model_config.num_hidden_layers
    P, G, N, (H, D), Hk = (
        len(s.group.prompt),
        len(lengths),
        sum(lengths),
        s.magnitudes[Q].shape,
        len(s.magnitudes[K]),
    )
    shortest, longest, unshared = min(lengths), max(lengths), G * P + N
    first, last = (len(s.group.prompt[cut]) for cut in ENDS)
    keys, values = tuple(s.prompt.keys[LAYER].shape), tuple(s.prompt.values[LAYER].shape)

    scores, shaped, advantages = (x.tolist() for x in (s.group.rewards, s.shaped, s.group.advantages))
    columns = range(G), map(code, texts), lengths, scores, shaped, advantages
    answers = table(
        f"{i} | {text} | {R} | {r:.0f} | {x:+.0f} | {a:+.4f}" for i, text, R, r, x, a in zip(*columns)
    )
    times = unshared / s.group.tokens
    right, mean, std, lowest, highest = (
        int(sum(scores)),
        s.shaped.mean(),
        s.shaped.std(),
        min(advantages),
        max(advantages),
    )
    pass_tokens = ", then ".join(f"{sum(lengths[i] for i in turn.part)}" for turn in s.turns)
    passes = ", then ".join(", ".join(map(str, turn.part)) for turn in s.turns)
    logprobs = dict(sorted(each for turn in s.turns for each in turn.logprobs.items()))  # {i: (R_i,)}
    sampler = {i: torch.tensor(completion.logprobs) for i, completion in enumerate(s.group.completions)}
    far = max((logprobs[i] - sampler[i]).abs().max() for i in sampler)
    wrong = scores.index(0)
    columns = s.group.completions[wrong].ids, logprobs[wrong], sampler[wrong]
    heard = table(
        f"{code(decode([i]))} | {i} | {its:.5f} | {ours:.5f} | {ours.exp():.4f}"
        for i, ours, its in zip(*columns)
    )
    losses = " and ".join(f"{turn.loss:+.4f}" for turn in s.turns)
    loss = sum(turn.loss.item() for turn in s.turns)
    at_keys = ", then ".join(f"{turn.at_keys:.4f}" for turn in s.turns)

    M, weight = s.magnitudes[Q][HEAD], f"{Q}.weight"
    chosen = {name: mask.sum().item() for name, mask in s.masks.items()}
    order, kept = M.sort(descending=True, stable=True).indices.tolist(), chosen[weight] // H
    largest, even = M.max(), kept / D
    (rows_q, chosen_q), (rows_k, chosen_k) = (
        (len(s.masks[f"{n}.weight"]), chosen[f"{n}.weight"]) for n in (Q, K)
    )
    head_share = M[order[:kept]].square().sum() / M.square().sum()
    share = saliency.selected_share(s.magnitudes, s.masks)
    prompt_root = s.prompt.squares[LAYER].q[0, HEAD, order[0]].sqrt()
    dims, rows = (", ".join(map(str, sorted(first + d for d in order[:kept]))) for first in (0, HEAD * D))
    gradient, masked = s.gradients[Q], s.masked_gradients[Q]
    missed = max(order[kept:], key=lambda d: gradient[HEAD * D + d].norm().item())  # the most that is lost
    missed_row = HEAD * D + missed
    old, new = s.before[weight], s.after[weight]
    moved_q, moved_k = ((s.before[f"{n}.weight"] != s.after[f"{n}.weight"]).any(1).sum() for n in (Q, K))
    norms, changes = [], []
    for d in dict.fromkeys([*order[:2], *order[kept - 1 : kept + 1], missed, order[-1]]):
        row = HEAD * D + d
        both = f"{gradient[row].norm():.4f} | {masked[row].norm():.4f}"
        norms.append(f"{order.index(d) + 1} | {row} | {d} | {M[d]:.2f} | {both}")
    for row in (HEAD * D + order[0], missed_row):
        for column in gradient[row].abs().topk(2).indices:
            g, left, a, b = (x[row, column].item() for x in (gradient, masked, old, new))
            signs = f"{g:+.4f} | {left + 0.0:+.4f} | {a:+.6f} | {b:+.6f} | {b - a:+.6f}"
            changes.append(f"{row} | {column} | {signs}")

    fresh = max((x - torch.tensor(c.logprobs)).abs().max() for x, c in zip(s.of_later, s.later.completions))
    stale = torch.cat([(s.of_earlier[i] - sampler[i]).abs() for i in sampler]).mean()
    odds = [f"{x.sum().exp():.4f} | {y.sum().exp():.4f}" for x, y in zip(logprobs.values(), s.of_earlier)]
    columns = range(G), map(code, texts), advantages, odds
    outcome = table(f"{i} | {text} | {a:+.2f} | {both}" for i, text, a, both in zip(*columns))
    norms, changes = table(norms), table(changes)
    return SimpleNamespace(**locals())


def listing(tokens, width=5):
    """[(id, text), ...] -> lines of `width` tokens."""
    cells = [f"{i:4} {text!r:16}" for i, text in tokens]
    return "\n".join("".join(cells[i : i + width]).rstrip() for i in range(0, len(cells), width))


def table(rows):
    """Texts with " | " between their cells -> the lines of a table."""
    return "\n".join(f"| {row} |" for row in rows)


def code(text):
    """Text as code in a cell of a table."""
    return "`" + text.replace("|", "\\|").replace("\n", "\\n") + "`"


def link(pointer):
    """A match of POINTER -> a link to the lines. KeyError unless there is such code, once."""
    file, how, what = pointer.groups()
    source = (ROOT / file).read_text()
    if how == ":":
        found = [ast.parse(source)]
        for name in what.split("."):
            found = [inner for outer in found for inner in outer.body if getattr(inner, "name", "") == name]
    else:
        statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
        lines = source.splitlines()
        found = [node for node in statements if lines[node.lineno - 1].strip().startswith(what)]
    if len(found) != 1:
        raise KeyError(f"{pointer[0]}: {len(found)} such places in {file}")
    return f"[{file} `{what}`](../{file}#L{found[0].lineno}-L{found[0].end_lineno})"


def page(s):
    """The text of docs/one-step.md."""
    template = (ROOT / "studies" / "one_step.md").read_text()
    return POINTER.sub(link, template.format(s=s, t=derived(s), flags=FLAGS, layer=LAYER, head=HEAD))


def main(config):
    training, out = parse(Training, "", FLAGS.split()), Path(config.out)
    lock = durable.claim(out, "one step", ["one-step.md"])
    if config.completions:
        engine = Stored(config.completions)
    else:
        context = check_model(training.model, training.context)[2]
        engine = Rollout(training.model, context, "float32", training.seed)
    s = take_step(training, engine)
    engine.close()
    (out / "one-step").mkdir(parents=True, exist_ok=True)
    sampled = [[asdict(completion) for completion in group.completions] for group in (*s.sampled, s.later)]
    lines = ",\n".join("[" + ",\n".join(map(json.dumps, each)) + "]" for each in sampled)
    durable.write(out / "one-step" / "completions.json", f"[{lines}]\n")
    one_step_figures.draw(s, out / "one-step", Q, K, HEAD)
    durable.write(out / "one-step.md", page(s))
    print(f"{out}/one-step.md")
    lock.close()


if __name__ == "__main__":
    one_line_errors()
    main(parse(Config, __doc__))
