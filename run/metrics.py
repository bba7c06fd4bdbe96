"""metrics.jsonl of train.py, one object a step
step, prompts_drawn          steps done; prompts drawn from the source so far
rounds                       generation rounds dynamic sampling needed
underfull                    groups that the batch lacks after --max-rounds; it has trained on those it has
reward, accuracy             mean reward of all sampled completions; share of them with reward >= 1. With
                             several rewards: mean of their weighted sum; share by the first of them
rewards                      only with several: of each, by its name, mean and std (standard deviation) over
                             all sampled completions
rewards_timed_out            rewards that took more than --reward-timeout and count as 0
all_right, all_wrong         share of sampled groups whose rewards are all equal and >= 1, all equal and below
completion_tokens, finished  mean length of a trained completion; share of them that stopped by themselves
tokens_trained               tokens through the network in one training forward: over groups, P + sum(R_i)
tokens_dropped               completion tokens without a loss: vLLM's log-probability was not finite
tokens_unshared              tokens_trained if the prompt were repeated per completion: G * P + sum(R_i)
skipped                      updates left out since their loss, gradient or a log-probability was not finite.
                             What follows is of the others, null without any
loss                         the policy loss. With one update per rollout every ratio is 1 and a group's
                             advantages sum to 0, so it says nothing of how well training goes (0 with equal
                             lengths or a sequence mean): watch reward. Its gradient is not 0.
ratio, clip_fraction         mean pi / pi_old (gspo: of completions, by tokens); share of tokens whose
                             gradient clipping, or clip-cov, removed
entropy, kl                  mean entropy per token, nats; mean k3 to the reference model (0 if --beta 0)
mismatch_mean, mismatch_max  |trainer - sampler| log-probability of tokens, nats: has vLLM our weights?
mismatch_k3                  k3 estimate of KL(sampler || trainer) per token
importance_capped            share of tokens whose importance weight reached the cap
grad_norm, grad_norm_masked  gradient norm before and after masking (before clipping)
selected_share               share of squared Q/K magnitude in the selected rows
gradient_share               share of the squared gradient of W_Q and W_K in them, before masking
moved_selected               root mean square change of a weight of W_Q, W_K in one update, in selected rows
moved_unselected             in the others: by momentum with --unselected grad (null if all are selected)
mask_overlap                 share of the last update's rows that the one before selected too (at first null)
learning_rate                of the step's updates
held_out                     with --eval-every, at its steps and the last: {set: {"prompts", "prompt_tokens",
                             "accuracy", "accuracy_greedy"}}, of the model that the step has left
seconds, tokens_per_second   wall time by stage (rollout, reward, logprobs, backward, mask, step, sync, and in
                             the first step rehearsal of the largest group) on rank 0, without checkpoints;
                             prompt and completion tokens trained on per second of the whole step. The only
                             keys that differ between two runs with the same seed on the same machine,
                             interrupted or not.
"""

import math
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
import torch.distributed as dist

import saliency
from base.cli import BadInput

SUMS = "loss ratio clip_fraction kl entropy mismatch_mean mismatch_k3 importance_capped".split()
OF_MOVE = "moved_selected moved_unselected gradient_share".split()
OF_UPDATE = ["grad_norm", "grad_norm_masked", "selected_share", *OF_MOVE]


class Clock:
    """Seconds of a step by stage, on this rank."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.restart()

    def restart(self):
        self.started, self.seconds = time.perf_counter(), defaultdict(float)

    @contextmanager
    def stage(self, name):
        started = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - started

    def metrics(self, tokens):
        elapsed = time.perf_counter() - self.started
        seconds = {name: round(value, 4) for name, value in {**self.seconds, "total": elapsed}.items()}
        return {"seconds": seconds, "tokens_per_second": round(tokens / elapsed, 1)}


class Tally:
    """What the passes of an update add up: SUMS over its completion tokens, the largest mismatch, and each
    completion's entropy."""

    def __init__(self, groups, context_parallel, device):
        self.groups, self.places = groups, {group.index: i for i, group in enumerate(groups)}
        self.tokens = sum(sum(group.known_lengths) for group in groups)  # over all ranks
        self.context_ranks = context_parallel  # they share a group's tokens, and all of them add its sums
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.mismatch_max = torch.zeros(1, dtype=torch.float64, device=device)
        sizes = len(groups), len(groups[0].completions)
        self.entropies = torch.zeros(sizes, dtype=torch.float64, device=device)  # sums over tokens

    @torch.no_grad()
    def add(self, group, part, loss, stats, entropies, old_logprobs, sampler_logprobs, importance_cap):
        """A pass, the completions `part` of a group: its loss and grpo.LossStats; of its tokens, (N,) each,
        entropies and log-probabilities."""
        d = (old_logprobs - sampler_logprobs).double()
        sums = {
            "loss": loss,
            "ratio": stats.ratio,
            "clip_fraction": stats.clipped,
            "kl": stats.kl,
            "entropy": entropies.sum(),
            "mismatch_mean": d.abs().sum(),
            "mismatch_k3": (d.exp() - d - 1).sum(),
            "importance_capped": (d.exp() >= importance_cap).sum() if importance_cap else d.new_zeros(()),
        }
        self.sums += torch.stack([sums[name].double() for name in SUMS]) / self.context_ranks
        if len(d):  # a pass may have no token left
            self.mismatch_max = torch.maximum(self.mismatch_max, d.abs().max())
        own = entropies.split([group.known_lengths[i] for i in part])
        own = torch.stack([each.sum() for each in own]).double() / self.context_ranks
        row, places = self.entropies[self.places[group.index]], torch.tensor(part, device=own.device)
        row.index_add_(0, places, own)

    def reduce(self):
        """Sum over all ranks, on each, and give each group the mean entropies of its completions; one copy
        to the CPU for all of it."""
        flat = torch.cat((self.sums, self.entropies.flatten()))
        dist.all_reduce(flat)
        dist.all_reduce(self.mismatch_max, dist.ReduceOp.MAX)
        self.sums, entropies = flat.cpu().split((len(SUMS), self.entropies.numel()))
        for group, own in zip(self.groups, entropies.view(self.entropies.shape), strict=True):
            group.entropies = own / torch.tensor(group.known_lengths)

    @property
    def finite(self):
        return self.tokens > 0 and bool(self.sums.isfinite().all())

    def check_mismatch(self, step, limit):
        """Raises BadInput when sampler and trainer do not have the same weights."""
        mismatch = self.sums[SUMS.index("mismatch_mean")].item() / max(1, self.tokens)
        if math.isfinite(mismatch) and mismatch > limit:
            raise BadInput(
                f"step {step}: the sampler's log-probabilities differ from the trainer's by {mismatch:.2g} "
                f"nats on average (limit {limit:g}): vLLM does not have the trainer's weights or rounds "
                "otherwise"
            )

    def with_update(self, norm, masked_norm, moved, magnitudes, masks, previous_masks):
        """The same, with what is known once the update was made: gradient norms, saliency.masked_step's
        result, this update's rows and those of the one before."""
        share = saliency.selected_share(magnitudes, masks)
        values = norm, masked_norm, *torch.stack((share, *moved)).tolist()
        self.of_update = dict(zip(OF_UPDATE, values, strict=True))
        self.mask_overlap = saliency.overlap(masks, previous_masks).item() if previous_masks else None
        return self


def of_step(config, progress, clock, batch, sampled, rounds, updates, learning_rate):
    """The line of a step that has ended, see above. config: train.py's."""
    line = {"step": progress.step, "prompts_drawn": progress.prompts_drawn, "rounds": rounds}
    line |= {"underfull": config.prompts - len(batch)}
    line |= of_rollout(sampled, batch, config.reward) | of_updates(updates, min(config.updates, len(batch)))
    line |= {"learning_rate": learning_rate, **clock.metrics(line["tokens_trained"])}
    return line


def of_rollout(sampled, batch, reward_names):
    """All groups that were sampled and those trained on (rollout.Group) -> the metrics about them."""
    rewards = torch.stack([group.rewards for group in sampled])  # (groups, G)
    equal = (rewards == rewards[:, :1]).all(1)
    completions = [completion for group in batch for completion in group.completions]
    tokens = sum(len(completion.ids) for completion in completions)
    values = torch.cat([group.values for group in sampled])  # (groups * G, K)
    of_each = {}
    if len(reward_names) > 1:
        known = values.nan_to_num(0.0)
        mean, std = known.mean(0).tolist(), known.std(0, correction=0).tolist()
        of_each["rewards"] = {
            n: {"mean": m, "std": s} for n, m, s in zip(reward_names, mean, std, strict=True)
        }
    return {
        "reward": torch.stack([group.scores for group in sampled]).mean().item(),
        **of_each,
        "rewards_timed_out": values.isnan().sum().item(),
        "accuracy": (rewards >= 1).float().mean().item(),
        "all_right": (equal & (rewards[:, 0] >= 1)).float().mean().item(),
        "all_wrong": (equal & (rewards[:, 0] < 1)).float().mean().item(),
        "completion_tokens": tokens / len(completions),
        "finished": sum(completion.finished for completion in completions) / len(completions),
        "tokens_trained": sum(group.tokens for group in batch),
        "tokens_dropped": tokens - sum(sum(group.known_lengths) for group in batch),
        "tokens_unshared": tokens + sum(len(group.prompt) * len(group.completions) for group in batch),
    }


def of_updates(updates, wanted):
    """Tallies of the updates that were made, of `wanted` -> their metrics. The loss is a mean already; the
    other sums are over tokens."""
    skipped = {"skipped": wanted - len(updates)}
    if not updates:
        return skipped | dict.fromkeys((*SUMS, "mismatch_max", *OF_UPDATE, "mask_overlap"))
    total = torch.stack([tally.sums for tally in updates]).sum(0) / sum(tally.tokens for tally in updates)
    result = skipped | dict(zip(SUMS, total.tolist(), strict=True))
    result["loss"] = sum(tally.sums[SUMS.index("loss")].item() for tally in updates) / len(updates)
    result["mismatch_max"] = max(tally.mismatch_max.item() for tally in updates)
    for name in OF_UPDATE:
        result[name] = sum(tally.of_update[name] for tally in updates) / len(updates)
    return result | {"mask_overlap": updates[-1].mask_overlap}
