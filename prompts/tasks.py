"""Tasks made on the fly: long-context in kind, small enough for a laptop, with prompts without end.

A source is indexed: source[i] is the i-th row (data.py says what a row is), the same for the same seed.
"""

import random

from base.cli import BadInput

# ------------------------------------------------------------------------------------------------------- recall task

NAMES = (
    "Maria Peter Anna Victor Clara Simon Laura Oscar Helen Bruno Nadia Felix Irene Louis Paula Roman Sofia Frank "
    "Julia Marco Diana Edgar Greta Henry Elena Jonas Marta Klaus Ellen Tomas Alice David Carla Leo Emma Paul Rosa Max "
    "Eva Karl Lena Otto Nora Hugo Vera Ivan Lucy Sven"
).split()
WORDS = (
    "lamp river stone cloud wheel apple sword tiger candle mirror bridge ladder basket feather hammer island jacket "
    "kettle lemon magnet needle orange pencil rabbit saddle tunnel violin wallet anchor button carpet dragon engine "
    "falcon garden helmet insect jungle kitten lizard marble napkin oyster parrot quartz ribbon shadow temple "
    "umbrella valley window yellow zebra arrow bottle copper desert eagle forest guitar harbor iron jewel knight "
    "leather monkey nectar onion pepper rocket silver thunder uncle velvet winter bamboo cactus donkey elbow fabric "
    "ginger honey ivory jelly kiwi lantern meadow nickel ocean planet rubber salmon tomato urchin vapor walnut acorn "
    "badger cherry dolphin ember flute granite hazel igloo juniper koala lotus mango nutmeg olive pebble quill raven "
    "spider turtle vessel willow"
).split()
PEOPLE = "baker sailor teacher farmer doctor painter soldier singer driver writer".split()
VERBS = "walked slept waited worked rested talked".split()
PLACES = "market station church library theatre museum castle office school kitchen".split()


def recall(rng, facts, filler, asked=1):
    """A passage of `facts` facts hidden among `filler` sentences, and `asked` questions with three-word
    answers.

    -> (passage, [(question, answer), ...]). A fact and a filler sentence take 9 tokens each of assets/tiny's
    tokenizer.
    """
    names = rng.sample(NAMES, facts)
    facts_told = [fact(rng, name) for name in names]
    passage = hide(rng, facts_told, filler)
    picked = rng.sample(range(facts), asked)
    return " ".join(passage), [(question(names[i]), facts_told[i]) for i in picked]


def tracking(rng, facts, filler):
    """Recall of what is changed on the way: each name's code is told twice, and the later one holds. As
    `recall`, with one question. The tiny model never saw this in its warm start; it answers with either."""
    names = rng.sample(NAMES, facts // 2)
    passage = hide(rng, [fact(rng, name) for name in names for _ in range(2)], filler)
    asked = rng.choice(names)
    told = [sentence for sentence in passage if sentence.startswith(f"The code for {asked} is ")]
    return " ".join(passage), [(question(asked), told[-1])]


def fact(rng, name):
    return f"The code for {name} is {' '.join(rng.sample(WORDS, 3))}."


def question(name):
    return f"What is the code for {name}?"


def hide(rng, facts, filler):
    """Facts and `filler` sentences in random order."""
    sentences = facts.copy()
    for _ in range(filler):
        time = rng.choice(("morning", "evening"))
        sentences.append(
            f"The {rng.choice(PEOPLE)} {rng.choice(VERBS)} in the {rng.choice(PLACES)} every {time}."
        )
    rng.shuffle(sentences)
    return sentences


TASKS = {"recall": recall, "tracking": tracking}
MOST_FACTS = {"recall": len(NAMES), "tracking": 2 * len(NAMES)}


class Source:
    """A task without end: source[i] depends on (task, seed, i) only, so equal seeds give equal prompts.
    Raises BadInput for more facts than there are names, or fewer than the task needs."""

    def __init__(self, task, seed, facts, filler):
        least = 2 if task == "tracking" else 1
        if not least <= facts <= MOST_FACTS[task]:
            raise BadInput(f"--facts {facts}: the task {task} can have {least} to {MOST_FACTS[task]}")
        self.task, self.seed, self.facts, self.filler = task, seed, facts, filler

    def __getitem__(self, i):
        passage, [(asked, answer)] = TASKS[self.task](
            random.Random(f"{self.seed} {self.task} {i}"), self.facts, self.filler
        )
        return {"id": f"{self.task}-{self.seed}-{i}", "prompt": f"{passage}\n\n{asked}", "answer": answer}
