"""Passages of prompts/tasks.py, read without a model."""

import re

TOLD = re.compile(r"The code for (\w+) is (?:the code for (\w+)|([a-z]+ [a-z]+ [a-z]+))\.")


def read(passage, name):
    """Follow a name through the passage -> its code, and the hops it took. The last sentence about a name is
    right."""
    told = {who: (other, code) for who, other, code in TOLD.findall(passage)}
    hops = 0
    while told[name][0]:
        name, hops = told[name][0], hops + 1
    return told[name][1], hops
