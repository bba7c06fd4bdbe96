"""samples.jsonl: what a run has read and written, to look at while it learns.

train.py, one object for each group that is shown (--log-groups), those of a step together
  step, prompt_id              the step that drew it; the id of the prompt's row
  used                         "trained"; "dropped": thrown away by dynamic sampling; "failed": the step ended
                               the run
  prompt, prompt_tokens        its text as the model reads it, with control tokens; of more characters than
                               PROMPT_CHARACTERS the middle is left out, and it says how much; its tokens
  completions                  of each: text, tokens; finished: whether it stopped by itself; reward (null if
                               the reward function failed), with several the first's, and rewards: each, in
                               --reward's order (null: timed out); score: their weighted sum, which
                               advantages are made of (null as reward); advantage (null unless trained);
                               logprob: mean over its tokens, nats, as sampled; entropy: mean, nats, of the
                               trainer before the update (null unless trained)

sft.py, one object for each document that is shown
  step, id, text               the step that trains it; the id of its row; its text, with control tokens
  trained                      [[start, end], ...] of the characters that are trained on

Which are shown is a fixed rule: of the groups in the order of their mean rewards (with several the first's;
of documents: of their tokens) the first, the last, and others between them at equal distances. So 2 are the
worst and the best.
"""

import math
from itertools import groupby

PROMPT_CHARACTERS = 4000


def spread(items, count, key):
    """`count` of the items (-1: all), spread over the values of `key`, see above -> list, the smallest
    first."""
    order = sorted(items, key=key)
    if not 0 <= count < len(order):
        return order
    if count == 1:
        return [order[len(order) // 2]]
    return [order[i * (len(order) - 1) // (count - 1)] for i in range(count)]


def cut(text):
    """A text without its middle if it is long, with a note of what is left out."""
    if len(text) <= PROMPT_CHARACTERS:
        return text
    half = PROMPT_CHARACTERS // 2
    return f"{text[:half]}[... {len(text) - 2 * half:,} characters left out ...]{text[-half:]}"


def number(value):
    """A number as JSON can hold it: None for one that is not finite."""
    return round(value, 6) if value is not None and math.isfinite(value) else None


class Groups:
    """What samples.jsonl has of train.py's steps. rounds: the groups (rollout.Group) of each round that the
    step under way has drawn; the last may still lack rewards."""

    def __init__(self, tokenizer, count):
        self.tokenizer, self.count, self.rounds = tokenizer, count, []

    def of_step(self, step, batch, sampled):
        """Lines of a step that has ended: groups trained on, and all that were sampled."""
        trained = {group.index for group in batch}
        dropped = [group for group in sampled if group.index not in trained]
        self.rounds = []
        return self._lines(step, "trained", batch) + self._lines(step, "dropped", dropped)

    def of_failure(self, step):
        """Lines of the step under way, which has ended the run."""
        return self._lines(step, "failed", [group for groups in self.rounds for group in groups])

    def _lines(self, step, used, groups):
        def key(group):  # without rewards first
            return -math.inf if group.rewards is None else group.rewards.mean().item(), group.index

        return [self._line(step, used, group) for group in spread(groups, self.count, key)]

    def _line(self, step, used, group):
        def of_each(values):
            return [None] * len(group.completions) if values is None else values.tolist()

        made = group.rewards, group.scores, group.advantages, group.entropies, group.values
        columns = zip(group.completions, *map(of_each, made), strict=True)
        completions = []
        for completion, reward, score, advantage, entropy, each in columns:
            known = [logprob for logprob in completion.logprobs if math.isfinite(logprob)]
            shown = {"text": self.tokenizer.decode(completion.ids, skip_special_tokens=False)}
            shown |= {"tokens": len(completion.ids), "finished": completion.finished}
            shown |= {"reward": number(reward), "score": number(score), "advantage": number(advantage)}
            if each is not None and len(each) > 1:
                shown["rewards"] = [number(value) for value in each]
            shown |= {"logprob": number(sum(known) / len(known)) if known else None}
            completions.append(shown | {"entropy": number(entropy)})
        prompt = cut(self.tokenizer.decode(group.prompt, skip_special_tokens=False))
        line = {"step": step, "prompt_id": group.id, "used": used, "prompt": prompt}
        return line | {"prompt_tokens": len(group.prompt), "completions": completions}


def of_documents(step, rows, count, encode, tokenizer):
    """Lines of sft.py's step. encode: row -> token ids, and of each whether it is trained on."""
    return [
        document(step, row, *encode(row), tokenizer) for row in spread(rows, count, lambda r: r["tokens"])
    ]


def document(step, row, ids, trained, tokenizer):
    text, spans = "", []
    # Read and said are encoded apart, so no character has tokens of both.
    for train, pairs in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        start = len(text)
        text += tokenizer.decode([token for token, _ in pairs], skip_special_tokens=False)
        spans += [[start, len(text)]] * train
    return {"step": step, "id": row["id"], "text": text, "trained": spans}
