"""GSM8K (arXiv 2110.14168): its file, prompts and answers. The evaluation: eval_gsm8k.py."""

import re
from decimal import Decimal

from base.cli import BadInput
from base.durable import json_lines

# Wei et al. 2022 (arXiv 2201.11903), table 20, as published.
EXEMPLARS = """\
Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are \
done, there will be 21 trees. How many trees did the grove workers plant today?
A: There are 15 trees originally. Then there were 21 trees after some more were planted. So there must \
have been 21 - 15 = 6. The answer is 6.

Q: If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?
A: There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.

Q: Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in \
total?
A: Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating \
35, they had 74 - 35 = 39. The answer is 39.

Q: Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops \
did Jason give to Denny?
A: Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = \
8. The answer is 8.

Q: Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he \
have now?
A: Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 \
= 9. The answer is 9.

Q: There were nine computers in the server room. Five more computers were installed each day, from monday \
to thursday. How many computers are now in the server room?
A: There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 \
computers were added. 9 + 20 is 29. The answer is 29.

Q: Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many \
golf balls did he have at the end of wednesday?
A: Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 \
more, he had 35 - 2 = 33 golf balls. The answer is 33.

Q: Olivia has $23. She bought five bagels for $3 each. How much money does she have left?
A: Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 \
dollars left. 23 - 15 is 8. The answer is 8."""

# Ours.
INSTRUCTION = 'Think step by step. End with a line of the form "#### answer", the answer as a plain number.'

STOP = "\nQ:"  # how a base model begins its next question

MARKER = re.compile(r"####|\\boxed *\{|\banswer\b[*_ ]{0,9}(?:is\b|:|=)", re.IGNORECASE)
LOOKED_AT = 200  # characters after a marker
# LaTeX's thousands, spaces and fractions, and a minus sign.
LATEX = {"{,}": ",", "\\,": "", "\\!": "", "\\;": " ", "\\ ": " ", "\u2212": "-"}
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
NUMERAL = re.compile(r"(?<![\w.,^])(-?)\\?[$€£¥]?(-?(?:\d[\d.,]*|\.\d+))", re.ASCII)
SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z])")
OPERATORS = r"[-+/:^×÷·*,;&]|x|\\times|\\cdot|\\div|or|and|to|plus|minus|times"
# Makes the number before it a part of something: 1 1/2, 1e3, 3(4), 3:00, 2 + 3, 2-3, 3 to 4, 18 million.
PART = re.compile(
    rf"\d|\s{{1,9}}\d|[eE^][+-]?\d|\(\d|[\s)}}\]*_`]{{0,9}}(?:{OPERATORS})[\s(\\{{$]{{0,9}}\.?\d"
    r"|\s?(?:k\b|hundred|thousand|million|billion|dozen|(?:more|less|fewer) than)"
)


def base_prompt(question):
    """Eight worked examples, then the question."""
    return f"{EXEMPLARS}\n\nQ: {question.strip()}\nA:"


def chat_prompt(question):
    return f"{question.strip()}\n\n{INSTRUCTION}"


def base_answer(completion):
    """What a base model says before it goes on with questions of its own."""
    return completion.split("\nQ:")[0]


def number(text):
    """ "1,234.50" -> Decimal("1234.5"); None if it is no number."""
    text = text.replace(",", "")
    return Decimal(text) if re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", text) else None


def extract(text):
    """The number that an answer gives, as a Decimal: what follows the last ####, "answer is", "answer:" or
    \boxed{ that has a digit after it; None if there is none, or if it is not clear which number is meant.

    It is clear if it stands right after the marker or is the only one in its sentence and line, and is not
    part of something else (PART). Both sides of an equation may give it, but not two numbers."""
    for written, plain in LATEX.items():
        text = text.replace(written, plain)
    text = FRACTION.sub(r" \1/\2", text)
    for marker in reversed(list(MARKER.finditer(text))):
        line = text[marker.end() : marker.end() + LOOKED_AT].lstrip(" \t\r\n:*_").split("\n")[0]
        if re.search(r"\d", line):
            sides = SENTENCE_END.split(line)[0].split("=")
            numbers = {_clear(side) for side in sides} - {None}
            return numbers.pop() if len(numbers) == 1 else None
    return None


def _clear(text):
    """The number that stands at the start of a text or is the only one in it, as a Decimal, or None."""
    found = NUMERAL.search(text)
    if not found:
        return None
    digits = found[2].rstrip(".,")
    before, after = text[: found.start()], text[found.start(2) + len(digits) :]
    first, alone = not re.search(r"\w", before, re.ASCII), not re.search(r"\d", after)
    if PART.match(after) or before.rstrip().endswith("-") or not (first or alone):
        return None
    return number(found[1] + digits)


def read(path):
    """The official JSONL, a line of which is {"question", "answer": "reasoning #### 18"} -> list of (id,
    question, Decimal). Raises BadInput with the line's number."""
    rows = []
    for name, where, row in json_lines(path):
        texts = [row.get(key) for key in ("question", "answer")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise BadInput(f'{where} must be an object with the texts "question" and "answer"')
        question, answer = texts
        gold = number(answer.split("####")[-1].strip()) if "####" in answer else None
        if gold is None or not question.strip():
            raise BadInput(
                f'{where}: "answer" must end with #### and a number, and "question" must not be empty'
            )
        rows.append((name, question, gold))
    return rows
