"""A sample file in LongBench v2's format (arXiv 2412.15204): invented facts among invented sentences.

    python -m studies.longbench_sample assets/longbench-sample.json     # the same file, byte for byte

It has every class and six domains, and two questions for each document. Guessing scores 25%, as in the
benchmark. Short, medium and long documents have about 400, 800 and 1,500 words, not the benchmark's 8
thousand to 2 million: assets/tiny reads 4,096 tokens. An easy question's wrong choices are nowhere in the
document; a hard question's are other people's codes.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from base import durable
from base.cli import BadInput, one_line_errors, option, parse
from prompts.tasks import WORDS, recall

FACTS = 8
FILLER = {"short": 40, "medium": 90, "long": 180}  # sentences of about 9 words and 9 tokens
DOMAINS = {
    "Single-Document QA": "Literary",
    "Multi-Document QA": "Multi-news",
    "Long In-context Learning": "User guide",
    "Long-dialogue History Understanding": "Dialogue history QA",
    "Code Repository Understanding": "Code repo QA",
    "Long Structured Data Understanding": "Table QA",
}


@dataclass
class Config:
    file: str = option("", "where to write it", positional=True)


def write(path, documents, filler, seed=0):
    """Write the JSON file `path`. documents: their number, each with an easy and a hard question; filler:
    {length class: number of filler sentences}; seed: of all random choices. Raises OSError."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(documents):
            rng = random.Random(f"{seed} longbench {i}")
            length = list(filler)[i % len(filler)]
            domain = list(DOMAINS)[i // len(filler) % len(DOMAINS)]
            context, asked = recall(rng, FACTS, filler[length], asked=FACTS)
            codes = [fact.split(" is ")[1].rstrip(".") for _, fact in asked]
            for j, difficulty in enumerate(("easy", "hard")):
                wrong = codes[2:5]
                if difficulty == "easy":
                    wrong = [" ".join(rng.sample(WORDS, 3)) for _ in range(3)]
                choices = rng.sample([codes[j], *wrong], 4)
                item = {"_id": f"sample-{i}-{j}", "domain": domain, "sub_domain": DOMAINS[domain]}
                item |= {"difficulty": difficulty, "length": length, "question": asked[j][0]}
                item |= {f"choice_{letter}": choice for letter, choice in zip("ABCD", choices)}
                item |= {"answer": "ABCD"[choices.index(codes[j])], "context": context}
                file.write(("[\n" if i + j == 0 else ",\n") + json.dumps(item, indent=2, ensure_ascii=False))
        file.write("\n]\n")


if __name__ == "__main__":
    one_line_errors()
    file = parse(Config, __doc__).file
    if not file:
        raise BadInput("no file is given: python -m studies.longbench_sample FILE")
    with durable.replacing(Path(file)) as partial:
        write(partial, 24, FILLER)
