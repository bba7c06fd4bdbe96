"""LongAct training: reinforcement learning that updates, of W_Q and W_K, only the rows behind high-magnitude activations.

    torchrun train.py                                       # assets/tiny on the recall task: minutes on a laptop
    torchrun --nproc-per-node 2 train.py                    # the same on two processes
    torchrun --nproc-per-node 8 train.py --config recipes/rl.toml recipes/dapo-longact.toml     # the paper's setting

It reads top to bottom, one step of training as the data flows: prompts -> groups of completions (rollout.py) -> rewards
(rewards.py) -> advantages (grpo.py) -> who trains what, in which passes (schedule.py) -> log-probabilities (model.py) ->
loss (dapo.py, grpo.py, gspo.py, sapo.py, cov.py) -> backward -> masks from this step's activations (saliency.py) -> masked
gradients -> clip -> AdamW -> weights to vLLM. A group's prompt is read once; its completions follow in passes of
--tokens-per-pass, each with its own backward, and the prompt's backward comes last: memory depends on the prompt and a pass,
not on the number of completions.

Where we depart from the papers, or had to choose
- LongAct does not say which tokens count: every real token of prompt and completions does, once per sequence (--tokens). It
  rounds fraction * head size in a way it does not say: down, at least one row.
- Its mask is on gradients, so AdamW's momentum still moves a row that was selected before (--unselected grad;
  moved_unselected says how far). Weight decay is 0 by default: it would move every row. --unselected frozen changes neither
  the row nor its moments.
- The mask of a step comes from that step's own forward; with several updates per rollout, from each update's.
- Masking comes before clipping, so when clipping binds the other weights get a larger share of the step.
- DAPO: surplus groups of dynamic sampling are dropped, not kept for the next step. Rewards are mapped to 2 r - 1 (+1
  correct, -1 not) before the overlong punishment is added, whose range of 1 is relative to that.
- Clip-Cov and KL-Cov choose their tokens once per update, by the sampler's log-probabilities (cov.py says why).
- vLLM's log-probabilities and ours differ by rounding; truncated importance sampling corrects it (--importance-cap).

A run may be killed at any moment; --resume auto goes on with it (resume.py). At SIGTERM and SIGINT it saves and exits with
code 75 (interrupt.py).
"""

import json
import math
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import cov
import dapo
import data
import dry_run
import durable
import grpo
import memory
import metrics
import parallel
import plan
import plot
import processes
import prompts
import resume
import saliency
import schedule
import scoring
from algorithms import DYNAMIC_SAMPLING, epsilons, policy
from checkpoint import check_weights, generation_config
from cli import BadInput, one_line_errors, parse
from config import MAY_CHANGE, Config, check
from interrupt import EXIT_CODE, Interrupt
from model import Qwen3, Qwen3Config


@dataclass
class Group:
    """One prompt and its completions; `index` is its place among all prompts drawn, which fixes its seed."""

    index: int
    prompt: list  # P token ids
    completions: list  # G rollout.Completion
    rewards: torch.Tensor  # (G,) as the reward function gave them
    advantages: torch.Tensor = None  # (G,)
    old_logprobs: list = None  # G times (R_i,), on the rank that trains it
    chosen: list = None  # G times (R_i,) bool: tokens that clip-cov or kl-cov holds back

    @property
    def lengths(self):  # R_i of each completion
        return [len(completion.ids) for completion in self.completions]

    @cached_property
    def known(self):  # of each completion, how many tokens the sampler gave a finite log-probability; the others are dropped
        return [sum(map(math.isfinite, completion.logprobs)) for completion in self.completions]

    @property
    def tokens(self):  # what it costs to train on it
        return len(self.prompt) + sum(self.lengths)


one_line_errors()
config = parse(Config, f"{__doc__}\n{metrics.__doc__}")

# ------------------------------------------------------------------------------------------------- ranks and devices

rank, world, device, compute_dtype = processes.here()
cuda, main = device.type == "cuda", rank == 0
config.replicate = config.replicate or processes.nodes()
check(config, config.ranks or world, cuda)
if config.plan:
    if main:
        print(plan.report(config, config.ranks or world), end="")
    sys.exit()
if config.deterministic:
    processes.deterministic(cuda)

# ------------------------------------------------------------------------------------------------------------- prompts

model_config = Qwen3Config.from_pretrained(config.model)
parallel.check_heads(config.context_parallel, model_config)
config.context = config.context or model_config.context_length
if config.context > model_config.context_length:
    raise BadInput(f"--context {config.context} is more than the {model_config.context_length} tokens of {config.model}")
if config.max_completion >= config.context:
    raise BadInput(f"--max-completion {config.max_completion} leaves no room for a prompt in {config.context} tokens")
tokenizer = data.load_tokenizer(config.model, model_config.vocab_size)
with torch.device("meta"):
    check_weights(Qwen3(model_config), config.model)  # names and shapes, before anything takes time
generation_config(config.model)  # vLLM will read it
stop_ids = data.stop_ids(tokenizer)
prompt_limit = config.context - config.max_completion


def encode(row, limit=prompt_limit):
    return data.encode_prompt(tokenizer, row, config.thinking, limit, config.truncate_prompts)


score_all = scoring.start(config.reward, config.reward_workers, config.reward_timeout)
source, held_out, longest_prompt = prompts.load(config, encode, prompt_limit, score_all, main)

# ----------------------------------------------------------------------------------------------- engine, then model

processes.connect(device)
torch.manual_seed(config.seed)
if config.dry_run:
    config = dry_run.of_rl(config, model_config, tokenizer, world)
    longest_prompt, held_out = config.context - config.max_completion, {}
    encode, score_all = partial(encode, limit=longest_prompt), dry_run.in_turn(score_all)
config.name = processes.together(lambda: config.name or time.strftime("%Y-%m-%d-%H%M%S"))[0]  # ranks' clocks differ
run = Path("runs") / config.name
lock = resume.claim(run, config.resume) if main else None
fixed = resume.settings(config, MAY_CHANGE)
checkpoint, state = resume.find(run / "checkpoints", config.resume, fixed) if config.resume else (None, None)
if checkpoint and state["step"] > config.steps:
    raise BadInput(f"--steps {config.steps}: the run has made {state['step']} already")

from rollout import Rollout  # noqa: E402  (after the checks above: importing vLLM takes seconds)

engine = Rollout(
    config.model,
    config.context,
    str(compute_dtype).removeprefix("torch."),
    config.seed,
    config.tensor_parallel,
    config.vllm_share,
)
mesh = parallel.weight_mesh(device.type, config.replicate)
context = parallel.context_group(device.type, config.context_parallel)
place = rank // config.context_parallel, world // config.context_parallel  # which context group, of how many
model = Qwen3.from_pretrained(config.model, torch.float32, device, mesh, compute_dtype, context)
model.checkpointing = config.checkpointing
reference = Qwen3.from_pretrained(config.model, compute_dtype, device, mesh, compute_dtype, context) if config.beta else None
optimizer = torch.optim.AdamW(
    model.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay
)
config.mismatch_limit = config.mismatch_limit or (0.1 if compute_dtype == torch.bfloat16 else 1e-3)
config.epsilon_low, config.epsilon_high = epsilons(config)
policy_loss, choose = policy(config)
random_rows = torch.Generator().manual_seed(config.seed)
seconds = defaultdict(float)


@contextmanager
def stage(name):
    started = time.perf_counter()
    yield
    if cuda:
        torch.cuda.synchronize()
    seconds[name] += time.perf_counter() - started


def sample(rows, indices, n, temperature, progress=False):
    """rows and their indices -> Groups with rewards, on every rank the same list in the same order.

    Each engine samples its share; the seed of a completion depends on its prompt's index and its place only.
    """
    share, shares = rank // config.tensor_parallel, world // config.tensor_parallel
    rows, indices = rows[share::shares], indices[share::shares]
    with stage("rollout"):
        encoded = [encode(row) for row in rows]
        seeds = [config.seed * 2**32 + index * config.completions for index in indices]
        limits = temperature, config.max_completion, seeds, stop_ids, progress and main
        sampled = engine.generate(encoded, n, *limits) if encoded else []

    def scored():
        texts = [[tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions] for completions in sampled]
        pairs = [(data.answer_text(t, config.thinking), row) for row, own in zip(rows, texts, strict=True) for t in own]
        rewards = torch.tensor(score_all(pairs)).view(len(rows), n)
        return [Group(*group) for group in zip(indices, encoded, sampled, rewards, strict=True)]

    with stage("reward"):
        everyone = processes.together(scored)
    leaders = everyone[:: config.tensor_parallel]  # ranks of one engine all hold the same groups
    return sorted((group for groups in leaders for group in groups), key=lambda group: group.index)


def evaluate():
    """Accuracy on each set of held-out prompts: at temperature 1, as the paper evaluates, and greedily, one completion
    -> {name: {"prompts", "prompt_tokens" (mean), "accuracy", "accuracy_greedy"}}."""
    results = {}
    for name, rows in held_out.items():
        results[name] = {"prompts": len(rows)}
        for key, n, temperature in (("accuracy", config.eval_completions, 1.0), ("accuracy_greedy", 1, 0.0)):
            groups = sample(rows, [2**24 + i for i in range(len(rows))], n, temperature, progress=True)
            results[name]["prompt_tokens"] = sum(len(group.prompt) for group in groups) / len(groups)
            results[name][key] = torch.stack([group.rewards >= 1 for group in groups]).float().mean().item()
    return results


def print_accuracy(when, results):
    for name, result in results.items():
        sampled, greedy, n = result["accuracy"], result["accuracy_greedy"], result["prompts"]
        which = f" ({name})" if len(results) > 1 else ""
        print(f"{when} {sampled:.3f} of {n} held-out prompts right at temperature 1, {greedy:.3f} greedy{which}")


def ids_of(group, part):
    return [torch.tensor(group.completions[i].ids, device=device) for i in part]


@torch.no_grad()
def logprobs_of(policy, group, parts):
    """The group's completions through a policy without training it, in passes -> list of (R_i,) fp32."""
    prompt = policy.read(torch.tensor(group.prompt, device=device))
    result = [None] * len(group.completions)
    for part in parts:
        logprobs, _ = policy.completion_logprobs(prompt, ids_of(group, part), config.temperature)
        for i, own in zip(part, logprobs.split([group.lengths[i] for i in part])):
            result[i] = own
    return result


def explain_out_of_memory(prompt_tokens):
    what = f"{prompt_tokens} prompt tokens and up to {config.tokens_per_pass} completion tokens a pass"
    mend = f"--tokens-per-pass or --context ({config.context}), or use --checkpointing, more ranks or --context-parallel"
    return memory.explain(what, mend)


if checkpoint:
    extra = resume.load(checkpoint, model, optimizer)
    engine.sleep()
    engine.sync(model)
else:
    state, extra = {"step": 0, "prompts_drawn": 0, "skips_in_a_row": 0, "before": None}, {}
if main:
    settings = {**asdict(config), "ranks": world, "device": str(device)}
    durable.write(run / "config.json", json.dumps(settings, indent=2) + "\n")
    metrics_file = resume.open_metrics(run / "metrics.jsonl", state["step"])
    print(f"run directory: {run}" + (f", going on after step {state['step']}" if checkpoint else ""), flush=True)
first, drawn, skips, before = (state[key] for key in ("step", "prompts_drawn", "skips_in_a_row", "before"))
masks, magnitudes = (
    {n[len(k) :]: t.to(device) for n, t in extra.items() if n.startswith(k)} for k in ("mask ", "magnitude ")
)
if checkpoint:
    random_rows.set_state(torch.tensor(state["random_rows"], dtype=torch.uint8))
    resume.set_random_states(state["random"])
elif held_out and config.eval_before:
    before = evaluate()
    if main:
        print_accuracy("before:", before)


def snapshot(step):
    """What the next step begins with, beside weights, moments and the masks and magnitudes of this one."""
    counters = {"step": step, "prompts_drawn": drawn, "skips_in_a_row": skips, "before": before, "settings": fixed}
    return {**counters, "random": resume.random_states(), "random_rows": random_rows.get_state().tolist()}


def save():
    global saved
    saved = state["step"]
    tensors = {**{f"mask {n}": t for n, t in masks.items()}, **{f"magnitude {n}": t for n, t in magnitudes.items()}}
    resume.save(run / "checkpoints", saved, model, optimizer, state, tensors, config.keep)


@contextmanager
def saved_before_it_stops():
    """What ends the run while nothing of the step has been trained costs no step: it is mended, and the run goes on."""
    try:
        yield
    except BadInput:
        if saved < state["step"]:
            save()
        raise


# -------------------------------------------------------------------------------------------------------------- loop

# leave: after an error the bar goes, so that the error stays last on the screen.
bar = tqdm(total=config.steps, initial=first, desc="train", unit="step", disable=not main, leave=False)
saved, interrupt = first, Interrupt()
for step in range(first + 1, config.steps + 1):
    seconds.clear()
    started = time.perf_counter()
    learning_rate = config.learning_rate * min(1.0, step / max(1, config.warmup))
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate

    # Rollout and reward. Dynamic sampling draws until the batch is full of groups whose completions differ in correctness.
    batch, sampled, rounds = [], [], 0
    with saved_before_it_stops():
        while len(batch) < config.prompts and not interrupt.asked():
            if rounds == config.max_rounds:
                raise BadInput(
                    f"step {step}: {rounds} rounds of {config.prompts} prompts gave {len(batch)} groups whose rewards "
                    f"differ, {config.prompts} are needed; the task is too hard or too easy, or raise "
                    f"--max-rounds or --completions"
                )
            indices = list(range(drawn, drawn + config.prompts))
            groups = sample([source[i] for i in indices], indices, config.completions, config.temperature)
            batch += [g for g in groups if config.algorithm not in DYNAMIC_SAMPLING or dapo.keep_group(g.rewards)]
            sampled += groups
            drawn += config.prompts
            rounds += 1
    if interrupt.asked():
        break  # this step has changed nothing yet
    batch = batch[: config.prompts]
    engine.sleep()

    # Advantages, from shaped rewards.
    for group in batch:
        rewards = group.rewards
        if config.algorithm == "dapo":
            limits = config.max_completion, config.overlong_cache
            penalties = [dapo.overlong_penalty(length, *limits) for length in group.lengths]
            rewards = 2 * rewards - 1 + torch.tensor(penalties)
        group.advantages = grpo.advantages(rewards, config.normalize_std)

    # Minibatches, one per update. With several, old log-probabilities are computed once, before the first changes them.
    minibatches = [batch[i :: config.updates] for i in range(config.updates)]
    if config.updates > 1:
        with stage("logprobs"):
            for minibatch in minibatches:
                for group, parts in schedule.turns(minibatch, *place, config.tokens_per_pass):
                    with explain_out_of_memory(len(group.prompt)):
                        group.old_logprobs = logprobs_of(model, group, parts)

    made, mask_overlap = [], None  # the updates' figures
    for update, minibatch in enumerate(minibatches):
        known = sum(sum(group.known) for group in minibatch)
        tokens = max(1, known)  # completion tokens over all ranks
        totals = grpo.Totals(len(minibatch) * config.completions, tokens, config.max_completion)
        if choose:
            seed = config.seed * 2**32 + step * config.updates + update
            for group, chosen in zip(minibatch, cov.choose(minibatch, choose, seed), strict=True):
                group.chosen = chosen
        sums = torch.zeros(8, dtype=torch.float64, device=device)  # metrics.SUMS
        worst = torch.zeros(1, dtype=torch.float64, device=device)
        with saliency.Tracker(model, config.site, config.tokens) as tracker:
            for group, parts in schedule.turns(minibatch, *place, config.tokens_per_pass):
                with stage("logprobs"), explain_out_of_memory(len(group.prompt)):
                    prompt = model.read(torch.tensor(group.prompt, device=device))  # its keys and values, once
                    leaves = prompt.detach()
                    ref_logprobs = logprobs_of(reference, group, parts) if reference else None
                for part in parts:
                    with stage("logprobs"), explain_out_of_memory(len(group.prompt)):
                        logprobs, entropies = model.completion_logprobs(leaves, ids_of(group, part), config.temperature)
                    sampler = torch.cat([torch.tensor(group.completions[i].logprobs) for i in part])
                    kept = sampler.isfinite().nonzero()[:, 0].to(device)  # indices into the part's tokens
                    sampler, logprobs, entropies = sampler.to(device)[kept], logprobs[kept], entropies[kept]

                    def of_part(values):  # G times (R_i,) -> (N,), the part's tokens that are kept
                        return torch.cat([values[i] for i in part]).to(device)[kept]  # noqa: B023

                    old = of_part(group.old_logprobs) if group.old_logprobs else logprobs.detach()
                    lengths = [group.known[i] for i in part]
                    advantages = group.advantages[part].repeat_interleave(torch.tensor(lengths)).to(device)
                    terms = {}
                    if config.importance_cap:
                        terms["importance"] = grpo.importance_weights(old, sampler, config.importance_cap)
                    if reference:
                        terms["ref_logprobs"] = of_part(ref_logprobs)
                    if choose:
                        terms["chosen"] = of_part(group.chosen)
                    loss, stats = policy_loss(logprobs, old, advantages, lengths, totals, **terms)
                    with stage("backward"), explain_out_of_memory(len(group.prompt)):
                        (loss * (world if mesh else 1)).backward()  # FSDP2 averages gradients over ranks; ours is a sum
                    d = (old - sampler).double()
                    k3 = (d.exp() - d - 1).sum()
                    capped = (d.exp() >= config.importance_cap).sum() if config.importance_cap else d.new_zeros(())
                    own = loss.detach(), stats.ratio, stats.clipped, stats.kl, entropies.sum(), d.abs().sum(), k3, capped
                    own = torch.stack([value.detach().double() for value in own])
                    sums += own / config.context_parallel  # as many ranks count it
                    worst = torch.maximum(worst, d.abs().max())
                with stage("backward"), explain_out_of_memory(len(group.prompt)):
                    prompt.backward(leaves)  # what the passes left at the prompt's keys and values
        dist.all_reduce(sums)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        mismatch = sums[5].item() / tokens
        if math.isfinite(mismatch) and mismatch > config.mismatch_limit:
            raise BadInput(
                f"step {step}: the sampler's log-probabilities differ from the trainer's by {mismatch:.2g} nats on average "
                f"(limit {config.mismatch_limit:g}): vLLM does not have the trainer's weights or rounds otherwise"
            )
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
        if not (known and math.isfinite(norm) and sums.isfinite().all()):  # of all ranks, so they agree
            skips += 1
            optimizer.zero_grad()
            if skips > config.max_skips:
                raise BadInput(
                    f"step {step}: loss or gradient was not finite in {skips} updates in a row "
                    f"(--max-skips {config.max_skips}); start anew with a lower --learning-rate"
                )
            continue
        skips = 0

        # LongAct: masks from this update's activations, before clipping.
        with stage("mask"):
            magnitudes, previous_masks = tracker.magnitudes(), masks
            masks = saliency.select_rows(magnitudes, config.fraction, config.rule, random_rows)
            saliency.mask_gradients(model, masks)
        with stage("step"), explain_out_of_memory(longest_prompt):
            masked_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
            moved = saliency.masked_step(optimizer, model, masks, config.unselected)
            optimizer.zero_grad()
        figures = norm, masked_norm, saliency.selected_share(magnitudes, masks).item(), moved[0].item(), moved[1].item()
        made.append((tokens, sums.cpu(), worst.item(), figures))
        mask_overlap = saliency.overlap(masks, previous_masks).item() if previous_masks else None
    if step == first + 1:  # the optimizer has its moments now: what does not fit shows in this step, not in hours
        with stage("rehearsal"):
            with explain_out_of_memory(longest_prompt):
                lengths = schedule.fullest(config.max_completion, config.completions, config.tokens_per_pass)
                memory.rehearse(model, reference, longest_prompt, lengths)
            optimizer.zero_grad()
    with stage("sync"):
        engine.sync(model)

    # What happened, and what the next step, or the next life, begins with.
    state = snapshot(step)
    if main:
        elapsed = time.perf_counter() - started
        line = {"step": step, "prompts_drawn": drawn, "rounds": rounds, **metrics.of_rollout(sampled, batch)}
        line |= {"skipped": config.updates - len(made), **metrics.of_updates(made)}
        line |= {"mask_overlap": mask_overlap, "learning_rate": learning_rate}
        line["seconds"] = {**{name: round(value, 4) for name, value in seconds.items()}, "total": round(elapsed, 4)}
        line["tokens_per_second"] = round(line["tokens_trained"] / elapsed, 1)
        durable.append(metrics_file, line)
        bar.set_postfix_str(f"reward {line['reward']:.3f}, {line['tokens_per_second']:,.0f} tokens/s")
        bar.update()
    if step % config.save_every == 0 or step == config.steps:
        save()

# --------------------------------------------------------------------------------------------------------------- end

bar.leave = True
bar.close()
if interrupt.asked():
    if saved < state["step"]:
        save()
    if main:
        print(f"interrupted after step {state['step']}; --name {config.name} --resume auto goes on", file=sys.stderr)
    engine.close()
    sys.exit(EXIT_CODE)
interrupt.close()
after = evaluate() if held_out else None
model.save_pretrained(run / "checkpoint", compute_dtype, companions_from=config.model)
if main:
    if after:
        print_accuracy("after: ", after)
        durable.write(run / "results.json", json.dumps({"before": before, "after": after}, indent=2) + "\n")
    plot.reward_curve(run)
    if masks:  # unless every update was skipped
        plot.save_magnitudes(run / "magnitudes.safetensors", magnitudes, masks)
        plot.heatmap(run)
    print(dry_run.PASSED if config.dry_run else f"checkpoint: {run}/checkpoint  figures: reward.png, magnitudes.png")
engine.close()
