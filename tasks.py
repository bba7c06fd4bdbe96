"""Tasks made on the fly: long-context in kind, small enough for a laptop, with prompts without end.

A source is indexed: source[i] is the i-th row (data.py says what a row is), the same for the same seed.
"""

import random

from cli import BadInput

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
    """A passage of `facts` facts hidden among `filler` sentences, and `asked` questions with three-word answers.

    -> (passage, [(question, answer), ...]). A fact and a filler sentence take 9 tokens each of assets/tiny's tokenizer.
    """
    names = rng.sample(NAMES, facts)
    facts_told = [f"The code for {name} is {' '.join(rng.sample(WORDS, 3))}." for name in names]
    sentences = facts_told.copy()
    for _ in range(filler):
        time = rng.choice(("morning", "evening"))
        sentences.append(f"The {rng.choice(PEOPLE)} {rng.choice(VERBS)} in the {rng.choice(PLACES)} every {time}.")
    rng.shuffle(sentences)
    picked = rng.sample(range(facts), asked)
    return " ".join(sentences), [(f"What is the code for {names[i]}?", facts_told[i]) for i in picked]


class RecallSource:
    """The recall task without end: source[i] depends on (seed, i) only, so equal seeds give equal prompts."""

    def __init__(self, seed, facts, filler):
        if not 1 <= facts <= len(NAMES):
            raise BadInput(f"--facts {facts}: there are names for 1 to {len(NAMES)}")
        self.seed, self.facts, self.filler = seed, facts, filler

    def __getitem__(self, i):
        passage, questions = recall(random.Random(f"{self.seed} recall {i}"), self.facts, self.filler)
        question, answer = questions[0]
        return {"id": f"recall-{self.seed}-{i}", "prompt": f"{passage}\n\n{question}", "answer": answer}
