"""Which loss an --algorithm is, and what belongs to it. README's table "Other algorithms" says the same in words."""

from functools import partial

import cov
import dapo
import grpo
import gspo
import sapo

# --epsilon-low and --epsilon-high by default; None: it does not clip
EPSILONS = {
    "dapo": dapo.EPSILONS,
    "grpo": grpo.EPSILONS,
    "gspo": gspo.EPSILONS,
    "sapo": None,
    "clip-cov": cov.EPSILONS,
    "kl-cov": None,
}
DYNAMIC_SAMPLING = ("dapo", "clip-cov", "kl-cov")
NEED_UPDATES = ("gspo", "sapo", "kl-cov")  # differ from a plain policy gradient only where ratios are not 1


def epsilons(config):
    """The configuration's, or where it says 0 the algorithm's own."""
    low, high = EPSILONS[config.algorithm] or (0.0, 0.0)
    return config.epsilon_low or low, config.epsilon_high or high


def policy(config):
    """-> loss(logprobs, old_logprobs, advantages, lengths, totals, **terms), as in grpo.py, with the configuration's
    settings in it, and what chooses the tokens that clip-cov and kl-cov hold back (None for the others)."""
    clipping = {"epsilons": epsilons(config)}
    dual = {**clipping, "dual_clip": config.dual_clip}
    loss = {
        "dapo": partial(dapo.loss, **dual),
        "grpo": partial(grpo.loss, **dual, aggregation=config.aggregation, beta=config.beta),
        "gspo": partial(gspo.loss, **clipping),
        "sapo": sapo.loss,
        "clip-cov": partial(cov.clip_loss, **clipping),
        "kl-cov": cov.kl_loss,
    }[config.algorithm]
    return loss, {"clip-cov": cov.choose_clip, "kl-cov": cov.choose_kl}.get(config.algorithm)
