"""Rewards: (answer text, row) -> float; 1.0 means correct. The row is the one the prompt came from (data.py).

Use your own by --reward module:function.
"""

import importlib
import math
import re
import string
import traceback

from cli import BadInput


def exact(answer, row):
    """1.0 if the answer is one of row["answer"] up to case, punctuation, articles and white space (SQuAD's EM)."""
    golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return float(normalize(answer) in {normalize(gold) for gold in golds})


def normalize(text):
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def load_reward(spec):
    """The function that "module:function" names. Raises BadInput when there is no such module or function."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise BadInput(f"--reward {spec}: {error}; write module:function, the module on PYTHONPATH") from error
    if not callable(function):
        raise BadInput(f"--reward {spec}: {name} is not a function")
    return function


def score(reward, answer, row):
    """The reward as a finite float; anything else the user's function returns is an error that names the row."""
    try:
        value = reward(answer, row)
    except Exception as error:  # the user's code: show where it failed, then say for which row
        traceback.print_exc()
        raise BadInput(f"the reward function failed on row {row['id']}: {error!r}") from error
    try:
        value = float(value)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(f"the reward function returned no finite number for row {row['id']}")
    return value
