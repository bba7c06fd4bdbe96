"""Which rank trains which group, which completions, or documents of sft.py, go through the network together,
and how the learning rate moves.

Everything here is arithmetic on lengths that every rank knows, so ranks agree without a word. FSDP2 gathers
weights by collectives, hence all ranks must call the model equally often: they hold equally many groups, and
train the k-th of each in equally many passes.
"""

import math


def assign(tokens, ranks):
    """Assign groups of `tokens[i]` tokens to ranks, equally many to each -> for each rank its indices, the
    longest first.

    The next longest group goes to the rank with the fewest tokens that still has room. len(tokens) must be a
    multiple of ranks.
    """
    room = len(tokens) // ranks
    assignments = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = min((r for r in range(ranks) if len(assignments[r]) < room), key=lambda r: (loads[r], r))
        assignments[rank].append(i)
        loads[rank] += tokens[i]
    return assignments


def passes(lengths, budget, at_least=1):
    """Cut completions into passes of at most `budget` tokens -> lists of indices, the longest completions
    first.

    A pass counts as if all were as long as its longest, since it is padded for attention to itself: a long
    completion does not make memory of short ones beside it. A completion longer than the budget gets a pass
    of its own. at_least: how many passes there must be; the largest are halved until there are.
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
    """Lengths of the pass that takes the most memory of all that `passes` makes of completions up to `length`
    tokens."""
    tokens = min(completions * length, max(length, budget))
    count = -(-tokens // length)
    return [tokens // count] * count


def packs(lengths, budget, multiple):
    """Documents of `lengths[i]` tokens -> packs (lists of indices) of at most `budget` tokens, as many as a
    multiple of `multiple`, of which len(lengths) must be one. First fit, the longest first; a longer document
    has a pack of its own."""
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
    """What `rank` trains, in order: [(group, passes over its completions), ...], the longest group first.

    groups: all of an update, each with .tokens (prompt and completions) and .lengths (of G completions each).
    """
    assignments = assign([group.tokens for group in groups], ranks)
    result = []
    for indices in zip(*assignments):  # what the ranks train at the same time
        most = max(len(passes(groups[i].lengths, budget)) for i in indices)
        group = groups[indices[rank]]
        result.append((group, passes(group.lengths, budget, most)))
    return result


def warmup_factor(step, warmup):
    """What the learning rate of step 1, 2, ... is multiplied by: up to 1 over `warmup` steps, linearly."""
    return min(1.0, step / max(1, warmup))


def cosine_factor(done, steps):
    """What the learning rate is multiplied by after `done` of `steps` steps: a cosine from 1 down to a
    tenth."""
    return 0.55 + 0.45 * math.cos(math.pi * (done / steps))
