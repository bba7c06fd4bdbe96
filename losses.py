"""Which loss an --algorithm is; the losses of GSPO, SAPO, Clip-Cov and KL-Cov.

    loss, pick = losses.choose(config)        # pick: which tokens Clip-Cov or KL-Cov marks, None for others
    loss(logprobs, old_logprobs, advantages, lengths, totals, importance)     # as grpo.loss

Advantages, sampling and rewards are GRPO's; only the loss differs, and there is no KL term.
docs/algorithms.md has the table.
"""

from functools import partial

import torch

import dapo
import grpo

# Default of --epsilon-low and --epsilon-high; None: the algorithm does not clip.
EPSILONS = {
    "dapo": dapo.EPSILONS,
    "grpo": grpo.EPSILONS,
    "gspo": (3e-4, 4e-4),  # section 5.1 of GSPO's paper: a mean over tokens moves far less than a token does
    "sapo": None,
    "clip-cov": (
        1.0,
        1.0,
    ),  # leaves ratios up to 2 alone: as in scripts that follow the authors', not read in theirs
    "kl-cov": None,
}
DYNAMIC_SAMPLING = ("dapo", "clip-cov", "kl-cov")
NEED_UPDATES = ("gspo", "sapo", "kl-cov")  # differ from a plain policy gradient only where ratios are not 1


def epsilons(config):
    """The configuration's, or where it says 0 the algorithm's own."""
    low, high = EPSILONS[config.algorithm] or (0.0, 0.0)
    return config.epsilon_low or low, config.epsilon_high or high


def choose(config):
    """run.config.Config -> the loss, called as grpo.loss is, with the configuration's settings in it; and
    what picks the tokens that Clip-Cov and KL-Cov hold back, None for the others."""
    clipping = {"epsilons": epsilons(config)}
    dual = {**clipping, "dual_clip": config.dual_clip}
    loss = {
        "dapo": partial(dapo.loss, **dual),
        "grpo": partial(grpo.loss, **dual, aggregation=config.aggregation, beta=config.beta),
        "gspo": partial(gspo_loss, **clipping),
        "sapo": sapo_loss,
        "clip-cov": partial(clip_cov_loss, **clipping),
        "kl-cov": kl_cov_loss,
    }[config.algorithm]
    return loss, {"clip-cov": clip_cov_tokens, "kl-cov": kl_cov_tokens}.get(config.algorithm)


# ---------------------------------------------------------------------------------- GSPO (arXiv 2507.18071)


def gspo_loss(logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, epsilons=EPSILONS["gspo"]):
    """Ratio and clipping of a whole completion: -min(s A, clip(s, 1 - low, 1 + high) A), mean over
    completions, with s_i = exp(mean over tokens of logprobs - old) (eq. 5) -> (0-dim loss, LossStats).
    Arguments are grpo.loss's; completions must be whole.

    Each token carries its completion's s, so LossStats counts tokens as elsewhere; a completion's factor for
    the sampler is the mean of its tokens' importance. Against an epsilon of 3e-4 rounding counts: logprobs
    and old_logprobs must be fp32 and come from the same forward code in the same passes, not old_logprobs
    from the sampler. In the first update of a rollout s is 1 and the gradient GRPO's; the paper makes four.
    """
    sizes = torch.tensor(lengths, device=logprobs.device)
    log_ratios = torch.stack(
        [part.mean() for part in (logprobs - old_logprobs).split(lengths)]
    )  # (completions,)
    ratio = log_ratios.clamp(-20, 20).exp().repeat_interleave(sizes)  # (N,)
    per_token, clipped = grpo.clipped_term(ratio, advantages, epsilons)
    return grpo.aggregate(per_token * importance, lengths, "sequence", totals, ratio, clipped)


# ---------------------------------------------------------------------------------- SAPO (arXiv 2511.20347)


def sapo_loss(logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, tau_pos=1.0, tau_neg=1.05):
    """A smooth gate in place of clipping: -f(r) A, f(r) = sigmoid(tau (r - 1)) * 4 / tau, mean over sequences
    of the mean over tokens -> (0-dim loss, LossStats). Arguments are grpo.loss's.

    tau is tau_pos where A > 0, else tau_neg: what is to become rarer fades sooner. Nothing is clipped, so
    LossStats.clipped is 0. At ratio 1 the gate's slope is 1, and the gradient is GRPO's.
    """
    ratio = grpo.token_ratios(logprobs, old_logprobs)
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    per_token = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages * importance
    return grpo.aggregate(per_token, lengths, "sequence", totals, ratio, torch.zeros_like(ratio))


# ------------------------------------------------------------------- Clip-Cov and KL-Cov (arXiv 2505.22617)
#
# They hold back the few tokens whose update lowers entropy most: those with the largest covariance of
# advantage and log-probability, likely already and to become likelier. Clip-Cov takes their gradient away,
# KL-Cov pulls them to the old policy. Both come with DAPO's token mean and dynamic sampling, without its
# overlong punishment, as in the authors' scripts.
#
# Covariance and choice are over the tokens of a whole minibatch, on all ranks, so they come before its first
# pass. The authors take the log-probabilities of the running update and choose within a micro-batch; here the
# sampler's are taken. They are of the same policy up to rounding and to the updates since the rollout, they
# cost no forward, and every rank has all of them: ranks choose alike without communication, and how the
# minibatch is split changes nothing.


def covariance(advantages, logprobs):
    """(A - mean A)(log pi - mean log pi) of each token, all (N,) of a minibatch."""
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def clip_cov_tokens(covariances, seed, share=2e-4, low=1.0, high=5.0):
    """Clip-Cov's tokens, (N,) bool: `share` of all, at least one, at random among those with covariance in
    (low, high)."""
    candidates = ((covariances > low) & (covariances < high)).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return _marked(candidates[order[: max(1, int(share * len(covariances)))]], covariances)


def kl_cov_tokens(covariances, seed, share=2e-3):
    """KL-Cov's tokens, (N,) bool: the `share` of all, at least one, with the largest covariance (2e-3: the
    authors' for 7B, 2e-4 for 32B). Nothing is drawn; `seed` is there because clip_cov_tokens has one."""
    return _marked(covariances.topk(max(1, int(share * len(covariances)))).indices, covariances)


def _marked(indices, like):
    marks = torch.zeros_like(like, dtype=torch.bool)
    marks[indices] = True
    return marks


def mark(groups, pick, seed):
    """Set .marked of each group, G times (R_i,) bool: the tokens that `pick` (clip_cov_tokens,
    kl_cov_tokens) marks.

    groups: all of a minibatch over all ranks, in the same order on each, with .advantages (G,), .lengths, and
    .completions with the sampler's .logprobs.
    """
    advantages = torch.cat([g.advantages.repeat_interleave(torch.tensor(g.lengths)) for g in groups])  # (N,)
    logprobs = torch.cat([torch.tensor(c.logprobs) for g in groups for c in g.completions])  # (N,)
    finite = logprobs.isfinite()
    logprobs[~finite] = logprobs[finite].mean()  # covariance 0, so that it is not picked
    marks = iter(pick(covariance(advantages, logprobs), seed).split([n for g in groups for n in g.lengths]))
    for group in groups:
        group.marked = [next(marks) for _ in group.lengths]


def clip_cov_loss(
    logprobs,
    old_logprobs,
    advantages,
    lengths,
    totals,
    importance=1.0,
    *,
    marked,
    epsilons=EPSILONS["clip-cov"],
):
    """GRPO's clipped loss with a token mean, without the tokens that `marked` (N,) bool marks -> (0-dim
    loss, LossStats). Arguments are grpo.loss's."""
    ratio = grpo.token_ratios(logprobs, old_logprobs)
    per_token, clipped = grpo.clipped_term(ratio, advantages, epsilons)
    return grpo.aggregate(per_token * ~marked * importance, lengths, "token", totals, ratio, clipped | marked)


def kl_cov_loss(
    logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, *, marked, coefficient=1.0
):
    """-r A, plus coefficient * |logprobs - old| where `marked` (N,) bool marks, token mean -> (0-dim loss,
    LossStats). Arguments are grpo.loss's.

    Nothing is clipped. The pull is 0 in the first update of a rollout, so there must be a second. importance
    multiplies -r A only, as it does not multiply GRPO's KL term.
    """
    ratio = grpo.token_ratios(logprobs, old_logprobs)
    pull = coefficient * marked * (logprobs - old_logprobs).abs()
    per_token = -ratio * advantages * importance + pull
    return grpo.aggregate(per_token, lengths, "token", totals, ratio, torch.zeros_like(ratio))
