"""LongAct training: RL that updates, within W_Q and W_K, only the rows with the largest activations.

    torchrun train.py                              # assets/tiny on the recall task: minutes on a laptop
    torchrun --nproc-per-node 2 train.py           # the same on two processes
    torchrun --nproc-per-node 8 train.py --config recipes/rl.toml recipes/dapo-longact.toml  # the paper's

It reads top to bottom. A step, as the loop near the end has it: prompts -> groups of completions (rollout.py)
-> rewards (prompts/rewards.py) -> advantages (grpo.py) -> who trains what, in which passes (core/schedule.py)
-> log-probabilities (model.py) -> loss (dapo.py, grpo.py, losses.py) -> backward -> masks from this step's
activations (saliency.py) -> masked gradients -> clip -> AdamW -> weights to vLLM.

Where we depart from the papers, or had to choose: docs/paper.md. A run may be killed at any moment: --resume
auto goes on with it (run/resume.py). SIGTERM, SIGINT, SIGUSR1: it saves, exits with 75 (base/interrupt.py).
"""

from base.interrupt import EXIT_CODE, Interrupt, end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

import dapo
import grpo
import losses
import saliency
from base import processes
from base.cli import one_line_errors, parse
from core import hub, lora, memory, parallel, schedule
from core.optimizer import MASTERS, make_optimizer
from model import Qwen3, logprobs_in_passes
from prompts import chat, load, scoring
from run import defaults, dry_run, metrics, plan, resume, samples
from run.best import Best
from run.config import MAY_CHANGE, Config, check, of_engine
from run.held_out import evaluate
from run.journal import Journal
from run.preflight import check_model, prompt_room
from run.progress import Progress

one_line_errors()
config = parse(Config, f"{__doc__}\n{metrics.__doc__}")

# ----------------------------------------------------------------------------------------- ranks and devices

rank, world, device = processes.rank_and_device()
compute_dtype, main = processes.compute_dtype(), rank == 0
config.replicate = config.replicate or processes.nodes()
check(config, config.ranks or world, device.type == "cuda")
if config.plan:
    print(plan.report(config, config.ranks or world) if main else "", end="")
    sys.exit()
if config.deterministic:
    processes.deterministic(device.type == "cuda")

# --------------------------------------------------------------------------------------------------- prompts

config.model = hub.local(config.model)
model_config, tokenizer, config.context, _ = check_model(config.model, config.context, config.site)
parallel.check_heads(config.context_parallel, model_config)
chosen = defaults.fill(config, model_config, compute_dtype == torch.bfloat16)
prompt_limit = prompt_room(config.context, config.max_completion)
how = {"thinking": config.thinking, "limit": prompt_limit, "truncate": config.truncate_prompts}
encode = partial(chat.encode_prompt, tokenizer, **how)  # row -> token ids
how = config.reward_workers, config.reward_timeout, config.reward_on_timeout
score_all = scoring.start(config.reward, *how)
reward_weights = torch.tensor(config.reward_weights or [1.0] * len(config.reward))
source, held_out, longest_prompt = load.for_training(config, encode, prompt_limit, score_all, main)
best = Best(config, held_out)
if main:
    print(chosen, chat.described(tokenizer), sep="\n", flush=True)

# ------------------------------------------------------------------------------ run directory, engine, model

processes.connect(device)
torch.manual_seed(config.seed)
if config.dry_run:
    config = dry_run.of_rl(config, model_config, tokenizer, world)
    longest_prompt, held_out = config.context - config.max_completion, {}
    encode, score_all = partial(encode, limit=longest_prompt), dry_run.in_turn(score_all)
config.name = config.name or processes.on_rank_0(resume.new_name)
directory = Path("runs") / config.name
lock = resume.lock_run(directory, config.resume, "train.py", "--name") if main else None
fixed = resume.settings(config, MAY_CHANGE)
progress = Progress(torch.Generator().manual_seed(config.seed))
checkpoint = progress.find(directory, config.resume, fixed, Config(), config.steps)

from rollout import Group, Rollout  # noqa: E402  (after the checks above: importing vLLM takes seconds)

engine = Rollout(**of_engine(config, compute_dtype, world))
mesh, copies = parallel.weight_mesh(device.type, config.replicate, config.masters == "bf16")
context = parallel.context_group(device.type, config.context_parallel)
# work(groups) -> [(group, passes), ...]: what this rank trains, alone or with those of its context group.
who = {"rank": rank // config.context_parallel, "ranks": world // config.context_parallel}
work = partial(schedule.work_for_rank, **who, budget=config.tokens_per_pass)
how = device, mesh, compute_dtype, context
model = Qwen3.from_pretrained(config.model, MASTERS[config.masters], *how, lora.of_config(config))
model.compute_as(config)
reference = None  # of the KL term
if config.beta:
    reference = lora.Base(model) if config.lora else Qwen3.from_pretrained(config.model, compute_dtype, *how)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = make_optimizer(config, model.parameters())
config.epsilon_low, config.epsilon_high = losses.epsilons(config)
policy_loss, marked_tokens = losses.choose(config)  # dapo.loss, unless --algorithm says otherwise
keep = dapo.keep_group if config.algorithm in losses.DYNAMIC_SAMPLING else lambda rewards: True
least = 1 if config.underfull == "train" else config.prompts
if checkpoint:
    progress.load(checkpoint, model, optimizer, device)
if checkpoint or config.masters == "bf16":  # else vLLM has read the very weights
    engine.sleep()  # sync wakes it up
    engine.sync(model)
clock = metrics.Clock(device)

# ---------------------------------------------------------------------------------------- rollout and reward


def share_of_engine(items):
    return items[rank // config.tensor_parallel :: world // config.tensor_parallel]


def generate(rows, indices, n, temperature, show_bar=False):
    """rows and their indices -> Groups without rewards, those of this rank's engine. The seed of a completion
    depends on its prompt's index and its place only."""
    rows, indices = share_of_engine(rows), share_of_engine(indices)
    with clock.stage("rollout"):
        encoded = [encode(row) for row in rows]
        seeds = [config.seed * 2**32 + index * max(n, config.completions) for index in indices]
        how = temperature, config.max_completion, seeds, chat.stop_ids(tokenizer), show_bar and main
        sampled = engine.generate(encoded, n, *how) if encoded else []
    parts = zip(indices, encoded, sampled, rows, strict=True)
    return [Group(index, prompt, completions, id=row["id"]) for index, prompt, completions, row in parts]


def score(groups, rows):
    """What `generate` made of the rows -> Groups with rewards, of all engines, on every rank the same list in
    the same order."""

    def scored():
        pairs = []
        for group, row in zip(groups, share_of_engine(rows), strict=True):
            texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in group.completions]
            pairs += [(chat.answer_text(text, config.thinking), row) for text in texts]
        values = torch.tensor(score_all(pairs)).split([len(group.completions) for group in groups])
        for group, own in zip(groups, values, strict=True):
            group.take_rewards(own, reward_weights)
        return groups

    with clock.stage("reward"):
        everyone = processes.gather_or_fail(scored)
    leaders = everyone[:: config.tensor_parallel]  # ranks of one engine all hold the same groups
    return sorted((group for groups in leaders for group in groups), key=lambda group: group.index)


def sample(rows, *how, **more):
    """`generate`, then `score`."""
    return score(generate(rows, *how, **more), rows)


def sample_round(start, count):
    """-> the groups of `count` prompts, from the `start`-th of this step's sampling on."""
    first = progress.prompts_drawn + start
    indices = list(range(first, first + count))
    rows = [source[i] for i in indices]
    shown.rounds.append(generate(rows, indices, config.completions, config.temperature))
    shown.rounds[-1] = score(shown.rounds[-1], rows)
    return shown.rounds[-1]


def set_advantages(group):
    scores = group.scores
    if config.algorithm == "dapo":
        scores = dapo.shape_rewards(scores, group.lengths, config.max_completion, config.overlong_cache)
    group.advantages = grpo.advantages(scores, config.normalize_std)


# --------------------------------------------------------------------------------------- training one group


def logprobs_of(policy, group, passes):
    """The group's completions through a policy without training it, in passes -> G times (R_i,) fp32."""
    prompt = torch.tensor(group.prompt, device=device)
    completions = group.completion_ids(range(len(group.completions)), device)
    return logprobs_in_passes(policy, prompt, completions, passes, config.temperature)


def remember_old_logprobs(minibatches):
    """Before the first of several updates: the trainer's log-probabilities, which ratios are relative to."""
    with clock.stage("logprobs"):
        for group, passes, _ in (each for minibatch in minibatches for each in work(minibatch)):
            with memory.explained(config, len(group.prompt)):
                group.old_logprobs = logprobs_of(model, group, passes)


def train_group(group, passes, counts, totals, tally):
    """Forward and backward of one group: its prompt once, its completions a pass at a time, each with its own
    backward, which leaves its gradient at the prompt's keys and values; last the prompt's backward. What it
    made dies with it. counts: False on a rank that only goes along, as all must call the model equally often:
    it adds nothing."""
    model.tracker.counts = counts
    with memory.explained(config, len(group.prompt)):
        with clock.stage("logprobs"):
            prompt = model.read(torch.tensor(group.prompt, device=device))
            leaves = prompt.detach()
            ref_logprobs = logprobs_of(reference, group, passes) if reference else None
        for part in passes:
            train_pass(group, part, leaves, ref_logprobs, totals, tally if counts else None)
        with clock.stage("backward"):
            prompt.backward(leaves)


def train_pass(group, part, leaves, ref_logprobs, totals, tally):
    """The completions `part` of a group after its prompt: log-probabilities, loss, backward. Tokens without a
    finite log-probability of the sampler's are left out of all that follows."""
    with clock.stage("logprobs"):
        completions = group.completion_ids(part, device)
        logprobs, entropies = model.completion_logprobs(leaves, completions, config.temperature)
    sampler, kept = group.sampler_logprobs(part, device)
    logprobs, entropies = logprobs[kept], entropies[kept]

    def of_part(values):  # G times (R_i,) -> (n,), those of the part's tokens that are kept
        return torch.cat([values[i] for i in part]).to(device)[kept]

    old = of_part(group.old_logprobs) if group.old_logprobs else logprobs.detach()
    lengths = [group.known_lengths[i] for i in part]  # of what is kept
    advantages = group.advantages[part].repeat_interleave(torch.tensor(lengths)).to(device)
    terms = {}
    if config.importance_cap:
        terms["importance"] = grpo.importance_weights(old, sampler, config.importance_cap)
    if reference:
        terms["ref_logprobs"] = of_part(ref_logprobs)
    if marked_tokens:
        terms["marked"] = of_part(group.marked)
    loss, stats = policy_loss(logprobs, old, advantages, lengths, totals, **terms)
    with clock.stage("backward"):  # FSDP2 averages gradients over the ranks of a mesh; ours is a sum
        (loss * ((mesh.size() if mesh else 1) if tally else 0)).backward()
    if tally:
        tally.add(group, part, loss, stats, entropies, old, sampler, config.importance_cap)


# ----------------------------------------------------------------------------------------- around the steps


def save():
    progress.save(directory / "checkpoints", model, optimizer, fixed, config.keep)


shown = samples.Groups(tokenizer, config.log_groups)
journal = Journal(directory, config, progress.step, "train", device, shown.of_failure)
best.go_on(directory, progress.step)
if held_out and config.eval_before and not checkpoint:
    with journal.told():
        progress.before = evaluate(held_out, sample, config.eval_completions, "before:" * main)

# ------------------------------------------------------------------------------------------------------ loop

first, G, interrupt = progress.step + 1, config.completions, Interrupt()
filling = keep, config.prompts, least, config.max_rounds, interrupt.asked, config.oversample
line = {}  # of metrics.jsonl, of the step before
with journal:
    for step in range(first, config.steps + 1):
        clock.restart()
        learning_rate = config.learning_rate * schedule.warmup_factor(step, config.warmup)
        schedule.set_rate(optimizer, learning_rate)
        with progress.saved_before_it_stops(f"step {step}", save):
            batch, sampled, rounds = dapo.fill_batch(sample_round, *filling)
        if interrupt.asked():
            break  # this step has changed nothing yet
        engine.sleep()
        for group in batch:
            set_advantages(group)

        minibatches = [batch[i :: config.updates] for i in range(min(config.updates, len(batch)))]
        if config.updates > 1:
            remember_old_logprobs(minibatches)  # before the first update changes them
        updates = []
        for update, minibatch in enumerate(minibatches, step * config.updates):
            tally = metrics.Tally(minibatch, config.context_parallel, device)
            totals = grpo.Totals(len(minibatch) * G, max(1, tally.tokens), config.max_completion)
            if marked_tokens:
                losses.mark(minibatch, marked_tokens, config.seed * 2**32 + update)
            with saliency.Tracker(model, config.site, config.saliency_tokens) as tracker:
                for group, passes, counts in work(minibatch):
                    train_group(group, passes, counts, totals, tally)
            with clock.stage("backward"):
                parallel.add_copies(model.parameters(), copies)
            tally.reduce()
            tally.check_mismatch(step, config.mismatch_limit)
            norm = get_total_norm([parameter.grad for parameter in trained]).item()
            if not (tally.finite and math.isfinite(norm)):  # of all ranks, so they agree
                optimizer.zero_grad()
                progress.skip_update(step, config.max_skips)
                continue

            with clock.stage("mask"):  # LongAct: rows of W_Q and W_K by this update's own activations
                magnitudes = tracker.magnitudes()
                masks = saliency.select_rows(magnitudes, config.fraction, config.rule, progress.random_rows)
                squares = saliency.mask_gradients(model, masks)
            with clock.stage("step"), memory.explained(config, longest_prompt):
                masked_norm = clip_grad_norm_(trained, config.max_grad_norm).item()
                moved = saliency.masked_step(optimizer, model, masks, squares, config.unselected)
                optimizer.zero_grad()
            updates.append(tally.with_update(norm, masked_norm, moved, magnitudes, masks, progress.masks))
            progress.finish_update(magnitudes, masks)
        if step == first:  # the optimizer has its moments now: what does not fit shows here, not in hours
            with clock.stage("rehearsal"):
                memory.rehearse(config, model, reference, longest_prompt)
        with clock.stage("sync"):
            engine.sync(model)

        progress.finish_step(step, len(sampled))
        line = metrics.of_step(config, progress, clock, batch, sampled, rounds, updates, learning_rate)
        lines, selection = shown.of_step(step, batch, sampled), (progress.magnitudes, progress.masks)
        with progress.saved_before_it_stops(f"held out, after step {step}", save):
            try:
                line |= best.evaluate(step, sample, model, compute_dtype, main)
            finally:  # the step has ended, whatever a reward does on held-out prompts
                journal.step(line, "reward", lines, selection)
        if step % config.save_every == 0 or step == config.steps:
            save()

# ------------------------------------------------------------------------------------------------------- end

if interrupt.asked():
    if progress.saved < progress.step:
        save()
    journal.interrupted(f"--name {config.name}")
    engine.close()
    sys.exit(EXIT_CODE)
interrupt.close()
with journal.told():
    after = line.get("held_out") or evaluate(held_out, sample, config.eval_completions, "after: " * main)
model.save_pretrained(directory / "checkpoint", compute_dtype, companions_from=config.model)
if main:
    progress.write_results(directory, after)
    journal.report("finished")
    done = f"checkpoint: {directory}/checkpoint  report.html, reward.png, magnitudes.png are beside it"
    print(dry_run.PASSED if config.dry_run else done)
engine.close()
