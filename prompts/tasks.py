"""Tasks made on the fly: long-context in kind, small enough for a laptop, with endless prompts.

A Source is indexed: source[i] is the i-th row ({"id", "prompt", "answer"}, see prompts/sources.py), the same
for the same seed. rng is a random.Random.
"""

import random

from base.cli import BadInput

# -------------------------------------------------------------------------------------------------- the tasks

NAMES = (
    "Maria Peter Anna Victor Clara Simon Laura Oscar Helen Bruno Nadia Felix Irene Louis Paula Roman Sofia "
    "Frank Julia Marco Diana Edgar Greta Henry Elena Jonas Marta Klaus Ellen Tomas Alice David Carla Leo "
    "Emma Paul Rosa Max Eva Karl Lena Otto Nora Hugo Vera Ivan Lucy Sven"
).split()
WORDS = (
    "lamp river stone cloud wheel apple sword tiger candle mirror bridge ladder basket feather hammer "
    "island jacket kettle lemon magnet needle orange pencil rabbit saddle tunnel violin wallet anchor "
    "button carpet dragon engine falcon garden helmet insect jungle kitten lizard marble napkin oyster "
    "parrot quartz ribbon shadow temple umbrella valley window yellow zebra arrow bottle copper desert "
    "eagle forest guitar harbor iron jewel knight leather monkey nectar onion pepper rocket silver thunder "
    "uncle velvet winter bamboo cactus donkey elbow fabric ginger honey ivory jelly kiwi lantern meadow "
    "nickel ocean planet rubber salmon tomato urchin vapor walnut acorn badger cherry dolphin ember flute "
    "granite hazel igloo juniper koala lotus mango nutmeg olive pebble quill raven spider turtle vessel "
    "willow"
).split()
PEOPLE = "baker sailor teacher farmer doctor painter soldier singer driver writer".split()
VERBS = "walked slept waited worked rested talked".split()
PLACES = "market station church library theatre museum castle office school kitchen".split()


def recall(rng, facts, filler, asked=1):
    """`facts` facts hidden among `filler` sentences, and `asked` questions about them.

    -> passage, [(question, answer), ...]; an answer is the whole sentence of the fact. A fact and a filler
    sentence each take 9 tokens of assets/tiny's tokenizer.
    """
    names = rng.sample(NAMES, facts)
    facts_told = [fact(rng, name) for name in names]
    passage = hide(rng, facts_told, filler)
    picked = rng.sample(range(facts), asked)
    return " ".join(passage), [(question(names[i]), facts_told[i]) for i in picked]


def tracking(rng, facts, filler):
    """As `recall` with one question, but each name's code is told twice, and the later one is right. The tiny
    model never saw this task in its warm start; it answers with either code."""
    names = rng.sample(NAMES, facts // 2)
    passage = hide(rng, [fact(rng, name) for name in names for _ in range(2)], filler)
    asked = rng.choice(names)
    told = [sentence for sentence in passage if sentence.startswith(f"The code for {asked} is ")]
    return " ".join(passage), [(question(asked), told[-1])]


def chain(rng, facts, filler, hops=2, asked=1):
    """As `recall`, but of hops + 1 names the first has a code, and each other has the code of the one before
    it: "The code for Nora is the code for Hugo." The questions are about the last of a chain, and
    when there are no more of those, about others.

    -> passage, [(question, answer), ...]; an answer names the code itself, "The code for Nora is red lamp
    ink."
    """
    length = hops + 1
    names = rng.sample(NAMES, facts // length * length)
    told, answers = [], {}
    for i, name in enumerate(names):
        if i % length == 0:
            told.append(fact(rng, name))
            code = told[-1].split(" is ")[1]
        else:
            told.append(f"The code for {name} is the code for {names[i - 1]}.")
        answers[name] = f"The code for {name} is {code}"
    lasts = set(names[hops::length])
    passage = " ".join(hide(rng, told, filler))
    rng.shuffle(names)
    picked = sorted(names, key=lambda name: name not in lasts)[:asked]
    return passage, [(question(name), answers[name]) for name in picked]


def fact(rng, name):
    """-> the sentence that tells the code of `name`, three random words."""
    return f"The code for {name} is {' '.join(rng.sample(WORDS, 3))}."


def question(name):
    """-> the question for the code of `name`."""
    return f"What is the code for {name}?"


def hide(rng, facts, filler):
    """-> list of sentences: the facts and `filler` others in random order."""
    sentences = facts.copy()
    for _ in range(filler):
        time = rng.choice(("morning", "evening"))
        who, did, place = rng.choice(PEOPLE), rng.choice(VERBS), rng.choice(PLACES)
        sentences.append(f"The {who} {did} in the {place} every {time}.")
    rng.shuffle(sentences)
    return sentences


TASKS = {"recall": recall, "tracking": tracking, "chain": chain}
LEAST_FACTS = {"recall": 1, "tracking": 2, "chain": 3}
MOST_FACTS = {"recall": len(NAMES), "tracking": 2 * len(NAMES), "chain": len(NAMES)}


class Source:
    """Endless rows of a task of TASKS: source[i] depends only on task, seed, i, facts and filler. Raises
    BadInput for more facts than there are names, or fewer than the task needs."""

    def __init__(self, task, seed, facts, filler):
        least, most = LEAST_FACTS[task], MOST_FACTS[task]
        if not least <= facts <= most:
            raise BadInput(f"--facts {facts}: the task {task} can have {least} to {most}")
        self.task, self.seed, self.facts, self.filler = task, seed, facts, filler

    def __getitem__(self, i):
        rng = random.Random(f"{self.seed} {self.task} {i}")
        passage, [(asked, answer)] = TASKS[self.task](rng, self.facts, self.filler)
        return {"id": f"{self.task}-{self.seed}-{i}", "prompt": f"{passage}\n\n{asked}", "answer": answer}
