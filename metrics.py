"""metrics.jsonl of train.py, one object a step
step, prompts_drawn          steps done; prompts drawn from the source so far
rounds                       generation rounds dynamic sampling needed
reward, accuracy             mean reward of all sampled completions; share of them with reward >= 1
all_right, all_wrong         share of sampled groups whose rewards are all equal and >= 1, all equal and below
completion_tokens, finished  mean length of a trained completion; share of them that stopped by themselves
tokens_trained               tokens through the network in one training forward: sum over groups of P + sum(R_i)
tokens_dropped               completion tokens that no loss has, since vLLM's log-probability of them was not finite
tokens_unshared              what it would be with the prompt repeated per completion: sum of G * P + sum(R_i)
skipped                      updates left out since their loss, gradient or a log-probability was not finite. What follows is
                             of the others, null without any
loss                         the policy loss. With one update per rollout every ratio is 1 and a group's advantages sum to
                             0, so it reads near 0 (with equal lengths exactly 0) however well training goes: watch
                             reward. Its gradient is not 0.
ratio, clip_fraction         mean pi / pi_old (gspo: of completions, by tokens); share of tokens whose gradient clipping,
                             or clip-cov, removed
entropy, kl                  mean entropy of the policy per token, nats; mean k3 to the reference model (0 if --beta 0)
mismatch_mean, mismatch_max  |trainer - sampler| log-probability of sampled tokens, nats: proves vLLM has our weights
mismatch_k3                  k3 estimate of KL(sampler || trainer) per token
importance_capped            share of tokens whose importance weight reached the cap
grad_norm, grad_norm_masked  gradient norm before and after masking (before clipping)
selected_share               share of squared Q/K magnitude in the selected rows
moved_selected               root mean square change of a weight of W_Q, W_K in one update, in selected rows
moved_unselected             and in the others: momentum's doing with --unselected grad (null if all are selected)
mask_overlap                 share of selected rows selected in the update before too, in the last one (null in the first)
learning_rate                of the step's updates
seconds, tokens_per_second   wall time by stage (rollout, reward, logprobs, backward, mask, step, sync, rehearsal of the
                             largest group in the first step after a start) on rank 0, without checkpoints; prompt and
                             completion tokens trained on per second of the whole step. The only keys that differ between
                             two runs with the same seed on the same machine, interrupted or not.
"""

import torch

SUMS = ("loss", "ratio", "clip_fraction", "kl", "entropy", "mismatch_mean", "mismatch_k3", "importance_capped")
FIGURES = ("grad_norm", "grad_norm_masked", "selected_share", "moved_selected", "moved_unselected")


def of_rollout(sampled, batch):
    """All groups that were sampled and those trained on (train.Group) -> the metrics about them."""
    rewards = torch.stack([group.rewards for group in sampled])  # (groups, G)
    equal = (rewards == rewards[:, :1]).all(1)
    completions = [completion for group in batch for completion in group.completions]
    tokens = sum(len(completion.ids) for completion in completions)
    return {
        "reward": rewards.mean().item(),
        "accuracy": (rewards >= 1).float().mean().item(),
        "all_right": (equal & (rewards[:, 0] >= 1)).float().mean().item(),
        "all_wrong": (equal & (rewards[:, 0] < 1)).float().mean().item(),
        "completion_tokens": tokens / len(completions),
        "finished": sum(completion.finished for completion in completions) / len(completions),
        "tokens_trained": sum(group.tokens for group in batch),
        "tokens_dropped": tokens - sum(sum(group.known) for group in batch),
        "tokens_unshared": tokens + sum(len(group.prompt) * len(group.completions) for group in batch),
    }


def of_updates(updates):
    """[(completion tokens, SUMS over them (8,), largest mismatch, FIGURES of the update), ...] of the updates that were made
    -> their metrics. The loss is a mean already; the other sums are over tokens."""
    if not updates:
        return dict.fromkeys((*SUMS, "mismatch_max", *FIGURES))
    tokens, sums, mismatches, figures = zip(*updates)
    result = dict(zip(SUMS, (torch.stack(sums).sum(0) / sum(tokens)).tolist(), strict=True))
    result["loss"] = torch.stack(sums)[:, 0].mean().item()
    result["mismatch_max"] = max(mismatches)
    return result | {key: sum(values) / len(updates) for key, values in zip(FIGURES, zip(*figures), strict=True)}
