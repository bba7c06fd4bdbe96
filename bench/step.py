"""One group forward and backward: our shared prompt beside one row per completion, as in TRL's trainer.

    python bench/step.py                      # tables, results.json and a figure, 10 minutes on 2 CPU cores
    python bench/step.py --shape 0.6B         # on a GPU, in bf16

The other side is transformers' Qwen3 ("sdpa" attention) on rows [prompt | completion], with logits for the
completion only. Both have the same weights, tokens and loss, and run in turn; both keep their activations, or
both recompute blocks where the table says so. Activation memory is the peak of what is allocated during
forward and backward, less the gradients, which both need. At P = 0 there is nothing to share: ours is then
model.logprobs, also with a row per completion, without its first token, which nothing predicts. P = 1 is the
shortest shared prompt.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from measure import attention_share, peak_bytes, seconds
from shapes import build, card, draw_group, train_on, transformers_twin
from tqdm import tqdm

from base import processes
from base.cli import one_line_errors, option, parse
from model import Qwen3


@dataclass
class Config:
    shape: str = option("laptop", "laptop, or the name of a published size")
    rounds: int = option(
        1, "timed rounds of each, after a warm-up; more if they are quick (4 seconds in total)", least=1
    )
    out: str = option("runs/bench-step", "directory for results.json and step.png")
    seed: int = option(0, "seed of weights and tokens")


one_line_errors()
config = parse(Config, __doc__)
torch.manual_seed(config.seed)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = processes.compute_dtype()
shape = build(config.shape)
ours = Qwen3.from_config(shape, dtype, device)
theirs = transformers_twin(ours, dtype, device)
theirs.train()  # gradient checkpointing is off in eval mode; Qwen3 has no dropout
gradient_bytes = sum(p.numel() * p.element_size() for p in ours.parameters())


def rows_of(prompt, completions):
    """Right-padded rows and their attention mask, as a trainer without shared prompts builds them."""
    rows = [torch.cat((prompt, completion)) for completion in completions]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def dense_logprobs(prompt, completions):
    """log-probabilities of the completions' tokens [(R_i,)] by transformers; without their first if there is
    no prompt."""
    ids, mask = rows_of(prompt, completions)
    first = max(1, len(prompt))
    kept = ids.size(1) - first + 1
    logits = theirs(ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, first:, None])[..., 0]
    return [row[: len(prompt) + len(completion) - first] for row, completion in zip(logprobs, completions)]


def rows_logprobs(completions):
    """The same, without a prompt, by our model in the dense layout."""
    ids, mask = rows_of(completions[0][:0], completions)
    mask = mask.bool()
    mask[:, 0] = False
    return list(ours.logprobs(ids, mask).split([len(completion) - 1 for completion in completions]))


def compare(P, lengths, tokens_per_pass=2**30, recompute=False):
    """Both on one group -> {"ours": {...}, "theirs": {...}, ...}"""
    prompt, completions = draw_group(shape, P, lengths, device)
    weights = [torch.randn(n if P else n - 1, device=device) for n in lengths]
    ours.checkpointing = recompute
    if recompute:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        theirs.gradient_checkpointing_disable()

    def run_ours():
        if P:
            train_on(ours, prompt, completions, weights, tokens_per_pass)
        else:
            (torch.cat(weights) * torch.cat(rows_logprobs(completions))).sum().backward()
        ours.zero_grad()

    def run_theirs():
        torch.cat([w * lp for w, lp in zip(weights, dense_logprobs(prompt, completions))]).sum().backward()
        theirs.zero_grad()

    with torch.no_grad():
        mine = ours.group_logprobs(prompt, completions) if P else rows_logprobs(completions)
        pairs = zip(mine, dense_logprobs(prompt, completions))
        difference = max((a - b).abs().max().item() for a, b in pairs)
    mine, other = seconds(run_ours, run_theirs, rounds=config.rounds)
    mine_memory, other_memory = (peak_bytes(run) - gradient_bytes for run in (run_ours, run_theirs))
    tokens, other_tokens = len(prompt) + sum(lengths), len(lengths) * (len(prompt) + max(lengths))
    return {
        "P": P,
        "G": len(lengths),
        "R": f"{min(lengths)}-{max(lengths)}" if min(lengths) < max(lengths) else lengths[0],
        "recompute": recompute,
        "tokens_per_pass": None if tokens_per_pass == 2**30 else tokens_per_pass,
        "ours": {"seconds": mine, "bytes": mine_memory, "tokens": tokens},
        "theirs": {"seconds": other, "bytes": other_memory, "tokens": other_tokens},
        "microseconds_per_token_without_attention": 1e6 * mine * (1 - attention_share(run_ours)) / tokens,
        "largest_difference": difference,
    }


def line(r):
    a, b = r["ours"], r["theirs"]
    note = "  both recompute" if r["recompute"] else ""
    return (
        f"{r['P']:5} {r['G']:3} {r['R']!s:>6} "
        f"{a['seconds']:8.3f} {b['seconds']:8.3f} {b['seconds'] / a['seconds']:7.2f} "
        f"{a['bytes'] / 2**20:8.0f} {b['bytes'] / 2**20:8.0f} {b['bytes'] / a['bytes']:7.2f} "
        f"{a['tokens']:7} {b['tokens']:7} {r['microseconds_per_token_without_attention']:9.1f} "
        f"{r['largest_difference']:8.0e}{note}"
    )


out = Path(config.out)
out.mkdir(parents=True, exist_ok=True)
print(card(shape), dtype)
print(
    "    P   G      R     ours   theirs  faster  our MiB   theirs smaller  tokens  theirs us/token*  differ"
)
unequal = torch.linspace(math.log(8), math.log(256), 16).exp().int().tolist()
cases = [dict(P=P, lengths=[64] * G) for P in (0, 1, 256, 1024, 2048, 4096) for G in (4, 16)]
cases += [dict(P=P, lengths=unequal) for P in (256, 2048)] + [dict(P=2048, lengths=[64] * 16, recompute=True)]
bar = tqdm(total=len(cases) + 5, unit="case")
table = []
for case in cases:
    table.append(compare(**case))
    bar.update()
    tqdm.write(line(table[-1]))
tqdm.write(
    "* microseconds per token of ours, without attention kernels: constant if time is linear in P + sum(R)"
)
tqdm.write("at a fixed budget of 256 completion tokens a pass, blocks recomputed on both sides:")
growth = []
for G in (1, 2, 4, 8, 16):
    growth.append(compare(2048, [64] * G, tokens_per_pass=256, recompute=True))
    bar.update()
    tqdm.write(line(growth[-1]))
bar.close()
results = {"card": card(shape), "dtype": str(dtype), "seed": config.seed, "table": table, "growth": growth}
(out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
sizes = [r["G"] for r in growth]
lines = ("theirs", "a row per completion", "tab:red"), ("ours", "shared prompt, in passes", "tab:blue")
for who, label, colour in lines:
    left.plot(sizes, [r[who]["seconds"] for r in growth], "o-", color=colour, label=label)
    right.plot(sizes, [r[who]["bytes"] / 2**20 for r in growth], "o-", color=colour, label=label)
left.set(xlabel="completions G", ylabel="seconds, forward and backward", ylim=0)
right.set(xlabel="completions G", ylabel="activation memory, MiB", ylim=0)
left.legend()
for axes in (left, right):
    axes.grid(alpha=0.3)
figure.suptitle("one group: prompt of 2,048 tokens, completions of 64, blocks recomputed", fontsize=11)
figure.savefig(out / "step.png", dpi=120)
print(f"{out}/results.json {out}/step.png")
