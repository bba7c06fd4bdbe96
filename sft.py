"""Supervised fine-tuning: cross entropy on what the assistant says. The paper's RL begins from such a model.

    torchrun --nproc-per-node 8 sft.py --config recipes/sft.toml --model Qwen3-8B-Base --data chats.parquet

Data are chats (prompts/sources.py), each a document: prompts/chat.py says how it becomes tokens. A step takes
the next --batch documents of the mixture; they lie one after the other in rows of --tokens-per-pass tokens,
each read as if it were alone: positions restart, attention stays within a document (core/attention.py), and
the loss is the mean over all trained tokens of the step. So neither packing nor the number of ranks changes
what is computed. Documents longer than --context are dropped and counted.

A run leaves in --out: config.json (every setting), metrics.jsonl, samples.jsonl (some documents of each step,
run/samples.py), loss.png, checkpoint/ (a Hugging Face directory), and checkpoints/ that the same command with
--resume auto goes on from (run/resume.py; to the same weights, on a CPU bit for bit). At a signal it
saves and exits with code 75 (base/interrupt.py).

metrics.jsonl, one object a step
  step, epoch                  steps done; how often the rows have been drawn on average
  loss                         mean cross entropy of the assistant's tokens, nats, before the step's update
  grad_norm, learning_rate     gradient norm before clipping; learning rate of the update
  documents, tokens            documents in the step; all their tokens
  tokens_trained, passes       the assistant's tokens; rows that went through the network, over all ranks
  skipped                      1 if the update was left out: loss or gradient was not finite (null then); or 0
  seconds, tokens_per_second   wall time of the step; tokens a second. The only keys that differ between two
                               runs with the same seed on the same machine
"""

from base.interrupt import EXIT_CODE, Interrupt, end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from base import durable, plot, processes
from base.cli import BadInput, one_line_errors, option, parse
from core import hub, lora, memory, parallel, schedule
from core.optimizer import MASTERS, make_optimizer
from model import Qwen3
from prompts import chat, load, sources
from run import defaults, dry_run, plan, resume, samples
from run.config import Shared, check_shared
from run.journal import Journal
from run.preflight import check_model


@dataclass
class Config(Shared):
    model: str = option(
        "assets/tiny", "checkpoint to start from: a directory, or ORG/NAME on the Hugging Face hub"
    )
    out: str = option("runs/sft", "directory of the run, see above")
    seed: int = option(1, "seed of the order of the data", least=0, most=2**31 - 1)
    batch: int = option(32, "documents a step, over all ranks", least=1, most=10**5)
    steps: int = option(0, "steps; the schedule is made for this number (default: one epoch)", least=0)
    context: int = option(0, "tokens of the longest document (0: what the model's config allows)", least=0)
    tokens_per_pass: int = option(16384, "tokens of documents that train at once; sets peak memory", least=1)
    learning_rate: float = option(
        None, "AdamW's peak learning rate (default: 1e-5; with --lora 1e-4)", above=0, most=1
    )
    schedule: str = option("cosine", "after warm-up: down to a tenth, or constant", ["cosine", "constant"])
    warmup: int = option(50, "steps of linear warm-up; at most a tenth of all", least=1)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", least=0)
    adam_beta2: float = option(0.99, "AdamW's second-moment decay")
    max_grad_norm: float = option(1.0, "gradient norm to clip at", above=0)
    save_every: int = option(100, "steps between checkpoints; there is one after the last step, too", least=1)


# What may differ when the run goes on; the data's and the model's files are compared by what is in them.
MAY_CHANGE = (
    "out data model resume save_every keep log_groups report_every max_skips deterministic tokens_per_pass "
    "checkpointing attention_recompute flash_attention compile dry_run plan ranks gpu gpu_memory tracker"
).split()

one_line_errors()
config = parse(Config, __doc__)
if not config.data:
    raise BadInput("no --data is given: a file of chats, see prompts/sources.py")
rank, world, device = processes.rank_and_device()
compute_dtype, main, out = processes.compute_dtype(), rank == 0, Path(config.out)
check_shared(config, "--resume auto")
if config.batch % (config.ranks or world):
    raise BadInput(f"--batch {config.batch} must be a multiple of the {config.ranks or world} ranks")
if config.plan:
    print(plan.sft_report(config, config.ranks or world) if main else "", end="")
    sys.exit()
if config.deterministic:
    processes.deterministic(device.type == "cuda")

# ------------------------------------------------------------------------------------------------------ data

config.model = hub.local(config.model)
model_config, tokenizer, context, generation = check_model(config.model, config.context)


def encode(row):
    return chat.encode_conversation(tokenizer, row["messages"])


def measure(row):
    ids, trained = encode(row)
    row["tokens"], row["trained"] = len(ids), sum(trained)
    return row["tokens"]


how = config.data_rows, config.seed, measure, context
files, _, lines = load.rows_of_files(config.data, sources.messages_row, *how, progress=main)
source = sources.Mixture(files, config.data_weights, config.seed)
row_count = sum(map(len, files))
config.steps = config.steps or math.ceil(row_count / config.batch)
config.learning_rate = config.learning_rate or defaults.SFT_LEARNING_RATE * defaults.lora_times(config)
lines += defaults.fill_checkpointing(config, max(context, config.tokens_per_pass))
if config.warmup > (most := max(1, config.steps // 10)):
    lines.append(f"warm-up: cut from {config.warmup} steps to {most} of {config.steps}, at most a tenth")
    config.warmup = most
if main:
    print("\n".join([chat.described(tokenizer), *lines]), flush=True)

# --------------------------------------------------------------------------------------- model and optimizer

if world > 1 or device.type == "cuda" or config.masters == "bf16":
    processes.connect(device)
if config.dry_run:
    config, encode = dry_run.of_sft(config, model_config, tokenizer, world), dry_run.endings(encode)
    out = Path(config.out)
    for i in range(config.batch):
        measure(source[i])

lock = resume.lock_run(out, config.resume, "sft.py", "--out") if main else None
fixed = resume.settings(config, MAY_CHANGE)
checkpoint = state = None
if config.resume:
    checkpoint, state = resume.find(out / "checkpoints", config.resume, fixed, Config())

mesh = copies = None
if dist.is_initialized():  # each node holds a copy of the weights
    mesh, copies = parallel.weight_mesh(device.type, processes.nodes(), config.masters == "bf16")
how = device, mesh, compute_dtype
model = Qwen3.from_pretrained(config.model, MASTERS[config.masters], *how, low_rank=lora.of_config(config))
model.compute_as(config)
optimizer = make_optimizer(config, model.parameters())

if checkpoint:
    resume.load(checkpoint, model, optimizer)
    resume.set_random_states(state["random"])
done, skips = (state["step"], state["skips_in_a_row"]) if checkpoint else (0, 0)
journal = Journal(out, config, done, "sft", device)


def save(step):
    state = {"settings": fixed, "random": resume.random_states(), "skips_in_a_row": skips}
    resume.save(out / "checkpoints", step, model, optimizer, state, {}, config.keep)


# ----------------------------------------------------------------------------------------------------- loop

interrupt = Interrupt()
with journal:
    for step in range(done + 1, config.steps + 1):
        started = time.perf_counter()
        decay = schedule.cosine_factor(step - 1, config.steps) if config.schedule == "cosine" else 1
        rate = config.learning_rate * decay * schedule.warmup_factor(step, config.warmup)
        rows = [source[i] for i in range((step - 1) * config.batch, step * config.batch)]
        trained = sum(row["trained"] for row in rows)  # tokens, over all ranks
        packs = schedule.packs([row["tokens"] for row in rows], config.tokens_per_pass, world)
        assignments = schedule.assign([sum(rows[i]["tokens"] for i in pack) for pack in packs], world)
        loss_sum = torch.zeros((), device=device)
        for k in assignments[rank]:
            documents = [encode(rows[i]) for i in packs[k]]
            # Both (1, T): the documents' tokens, and whether each is trained on.
            ids, mask = (
                torch.tensor([list(itertools.chain(*part))], device=device) for part in zip(*documents)
            )
            lengths = [rows[i]["tokens"] for i in packs[k]]
            what = f"training on {ids.numel()} tokens, the longest document {max(lengths)}"
            flags = f"--tokens-per-pass ({config.tokens_per_pass}) or --context ({context})"
            with memory.explain(what, f"{flags}, or use --checkpointing or more ranks"):
                loss = -model.logprobs(ids, mask, lengths).sum() / trained
                # FSDP2 averages gradients over the ranks of a mesh; ours is a sum.
                (loss * (mesh.size() if mesh else 1)).backward()
            loss_sum += loss.detach()
        parallel.add_copies(model.parameters(), copies)
        if dist.is_initialized():
            dist.all_reduce(loss_sum)
        norm = clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        schedule.set_rate(optimizer, rate)
        skips = 0 if math.isfinite(norm) and loss_sum.isfinite() else skips + 1  # of all ranks, so they agree
        if skips > config.max_skips:
            raise BadInput(
                f"step {step}: loss or gradient was not finite in {skips} updates in a row (--max-skips "
                f"{config.max_skips}); start anew with a lower --learning-rate"
            )
        if not skips:
            optimizer.step()
        optimizer.zero_grad()
        tokens, elapsed = sum(row["tokens"] for row in rows), time.perf_counter() - started
        metrics = {
            "step": step,
            "epoch": step * config.batch / row_count,
            "loss": loss_sum.item(),
            "grad_norm": norm,
            "learning_rate": rate,
            "documents": len(rows),
            "tokens": tokens,
            "tokens_trained": trained,
            "passes": len(packs),
            "skipped": int(skips > 0),
            "seconds": round(elapsed, 4),
            "tokens_per_second": round(tokens / elapsed, 1),
        }
        shown = samples.of_documents(step, rows, config.log_groups, encode, tokenizer)
        journal.step(metrics, "loss", shown)
        stop = interrupt.asked()
        if stop or step % config.save_every == 0 or step == config.steps:
            save(step)
        if stop:
            break

# ------------------------------------------------------------------------------------------------------- end

if interrupt.asked():
    journal.interrupted(f"--out {out}")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(EXIT_CODE)
interrupt.close()
model.save_pretrained(out / "checkpoint", compute_dtype, companions_from=config.model)
if main:
    # Whatever a base model stops at, this one ends its turn.
    generation["eos_token_id"] = chat.stop_ids(tokenizer)
    durable.write_json(out / "checkpoint" / "generation_config.json", generation)
    plot.loss_curve(out)
    journal.report("finished")
    print(dry_run.PASSED if config.dry_run else f"checkpoint: {out}/checkpoint  figure: {out}/loss.png")
if dist.is_initialized():
    dist.destroy_process_group()
