"""Clip-Cov and KL-Cov (arXiv 2505.22617): hold back the few tokens whose update lowers entropy most.

Those are the tokens with the largest covariance of advantage and log-probability: likely already, and to become likelier.
Clip-Cov takes the gradient of a few of them away, KL-Cov pulls them to the old policy. Both come with DAPO's token mean and
dynamic sampling, without its overlong punishment and without a KL term, as in the authors' scripts.

Covariance and choice are over the tokens of a whole minibatch, on all ranks, so they come before its first pass. The authors
take the log-probabilities of the running update, and choose among the tokens of a micro-batch; here the sampler's are taken.
They are of the same policy up to rounding and to the updates since the rollout, they cost no forward, and every rank holds
those of all completions: all ranks choose alike without a word, and how the minibatch is split changes nothing. At that
policy every ratio is 1, so no token that is chosen is clipped already.
"""

import torch

import grpo

EPSILONS = 1.0, 1.0  # Clip-Cov leaves ratios up to 2 alone: as in scripts that follow the authors', not read in theirs


def covariance(advantages, logprobs):
    """(A - mean A)(log pi - mean log pi) of each token, all (N,) of a minibatch."""
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def choose_clip(covariances, seed, share=2e-4, low=1.0, high=5.0):
    """Clip-Cov's tokens, (N,) bool: `share` of all, at least one, at random among those with covariance in (low, high)."""
    candidates = ((covariances > low) & (covariances < high)).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return _marked(candidates[order[: max(1, int(share * len(covariances)))]], covariances)


def choose_kl(covariances, seed, share=2e-3):
    """KL-Cov's tokens, (N,) bool: the `share` of all, at least one, with the largest covariance (2e-3: the authors' for 7B,
    2e-4 for 32B). Nothing is drawn; `seed` is there because choose_clip has one."""
    return _marked(covariances.topk(max(1, int(share * len(covariances)))).indices, covariances)


def _marked(indices, like):
    marks = torch.zeros_like(like, dtype=torch.bool)
    marks[indices] = True
    return marks


def choose(groups, how, seed):
    """The tokens that `how` (choose_clip or choose_kl) picks of a minibatch: for each group, of each completion (R_i,) bool.

    groups: all of the minibatch over all ranks, in the same order on each, with .advantages (G,), .lengths, and
    .completions with the sampler's .logprobs.
    """
    advantages = torch.cat([g.advantages.repeat_interleave(torch.tensor(g.lengths)) for g in groups])  # (N,)
    logprobs = torch.cat([torch.tensor(c.logprobs) for g in groups for c in g.completions])  # (N,)
    known = logprobs.isfinite()
    logprobs[~known] = logprobs[known].mean()  # so that it is none to choose
    chosen = iter(how(covariance(advantages, logprobs), seed).split([n for g in groups for n in g.lengths]))
    return [[next(chosen) for _ in group.lengths] for group in groups]


def clip_loss(logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, *, chosen, epsilons=EPSILONS):
    """GRPO's clipped loss with a token mean, without the tokens that `chosen` (N,) bool marks -> (0-dim loss, LossStats).
    Arguments are grpo.loss's."""
    ratio = grpo.token_ratios(logprobs, old_logprobs)
    per_token, clipped = grpo.clipped_term(ratio, advantages, epsilons)
    return grpo.aggregate(per_token * ~chosen * importance, lengths, "token", totals, ratio, clipped | chosen)


def kl_loss(logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, *, chosen, coefficient=1.0):
    """-r A, plus coefficient * |logprobs - old| where `chosen` (N,) bool marks, token mean -> (0-dim loss, LossStats).

    Nothing is clipped. The pull is 0 in the first update of a rollout, so there must be a second. importance multiplies -r A
    only, as it does not multiply GRPO's KL term.
    """
    ratio = grpo.token_ratios(logprobs, old_logprobs)
    pull = coefficient * chosen * (logprobs - old_logprobs).abs()
    per_token = -ratio * advantages * importance + pull
    return grpo.aggregate(per_token, lengths, "token", totals, ratio, torch.zeros_like(ratio))
