"""Which rank trains which group, what goes through the network together, and how the learning rate changes.

Everything here is arithmetic on lengths that every rank knows, so ranks agree without communicating. FSDP2
gathers weights by collectives, hence all ranks must call the model equally often: they train the same number
of groups, and the k-th group of each rank in the same number of passes.
"""

import math


def assign(tokens, ranks):
    """Assign groups to ranks, the same number to each -> for each rank the indices of its groups, the longest
    first.

    tokens: list of int, the tokens of each group; its length must be a multiple of `ranks`. The next longest
    group goes to the rank that has the fewest tokens so far and still has room.
    """
    room = len(tokens) // ranks
    assignments = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = min((r for r in range(ranks) if len(assignments[r]) < room), key=lambda r: (loads[r], r))
        assignments[rank].append(i)
        loads[rank] += tokens[i]
    return assignments


def sequences(prompts, completions, engines):
    """Completions that an engine generates at once: all that it has of a round, and not fewer than 64, which
    held-out prompts use; not more than 1,024, vLLM's own limit on an H100."""
    return max(64, min(1024, -(-prompts // engines) * completions))


def passes(lengths, budget, at_least=1):
    """Divide completions into passes of at most `budget` tokens -> lists of indices, the longest first.

    lengths: tokens of each completion. Each completion of a pass counts as many tokens as its longest, since
    attention pads them, so short completions are not put beside a long one. A completion longer than the
    budget gets a pass of its own. at_least: how many passes there must be; the largest are halved until there
    are that many, or one for each completion.
    """
    parts = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not parts or (len(parts[-1]) + 1) * lengths[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(i)
    while len(parts) < min(at_least, len(lengths)):
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts[largest]
        parts[largest : largest + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def fullest(length, completions, budget):
    """-> the lengths of the completions in the pass that takes the most memory, of all that `passes` could
    make of `completions` completions of up to `length` tokens."""
    tokens = min(completions * length, max(length, budget))
    count = -(-tokens // length)
    return [tokens // count] * count


def packs(lengths, budget, multiple):
    """Documents of `lengths[i]` tokens -> packs, lists of indices, of at most `budget` tokens each.

    First fit, the longest first; a document longer than the budget has a pack of its own. The number of packs
    is a multiple of `multiple`, and len(lengths) must be one.
    """
    parts, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        k = next((k for k, free in enumerate(room) if lengths[i] <= free), len(parts))
        if k == len(parts):
            parts.append([])
            room.append(budget)
        parts[k].append(i)
        room[k] -= lengths[i]
    while len(parts) % multiple:
        k = max(range(len(parts)), key=lambda k: len(parts[k]))
        parts[k : k + 1] = [parts[k][::2], parts[k][1::2]]
    return parts


def work_for_rank(groups, rank, ranks, budget):
    """What `rank` of `ranks` trains, in order -> [(group, passes over its completions, counts), ...], the
    longest group first.

    groups: all groups of an update, each with .tokens (prompt and completions) and .lengths (of its
    completions). budget: completion tokens of a pass. If the groups are no multiple of the ranks, ranks
    without one go along with the shortest, whose result does not count there (counts is False).
    """
    shortest = min(groups, key=lambda group: group.tokens)
    filled = groups + [shortest] * (-len(groups) % ranks)
    assignments = assign([group.tokens for group in filled], ranks)
    result = []
    for indices in zip(*assignments):  # the groups that the ranks train at the same time
        most = max(len(passes(filled[i].lengths, budget)) for i in indices)
        group = filled[indices[rank]]
        result.append((group, passes(group.lengths, budget, most), indices[rank] < len(groups)))
    return result


def warmup_factor(step, warmup):
    """-> the learning rate's factor in step 1, 2, ...: linearly up to 1 over `warmup` steps."""
    return min(1.0, step / max(1, warmup))


def set_rate(optimizer, rate):
    """Give all parameters this learning rate."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate


def cosine_factor(done, steps):
    """-> the learning rate's factor after `done` of `steps` steps: a cosine from 1 down to a tenth."""
    return 0.55 + 0.45 * math.cos(math.pi * (done / steps))
