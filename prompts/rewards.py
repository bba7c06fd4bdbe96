"""Rewards: (answer text, row) -> float; 1.0 means correct. The row is the prompt's (prompts/sources.py).

--reward module:function chooses one, of these or your own. Those here return 0.0 or 1.0 for any answer:

    rewards:exact      the whole answer is one of row["answer"] (SQuAD's exact match)
    rewards:contains   what follows the last "the answer is" contains one of them, and few other words
    rewards:numeric    what follows the last "the answer is" is that number
    rewards:choice     the last "The correct answer is (B)" has the right letter
    rewards:boxed      the content of the last \\boxed{} is one of row["answer"] (exact match)
    rewards:by_source  contains, numeric, choice or boxed, by row["data_source"] as in DocQA-RL-1.6K and
                       MemAgent's files
    rewards:published  the same as QwenLong-L1 and MemAgent score it, with the holes that a policy learns to
                       exploit; for comparison
    judge:by_source    by_source; where it gives 0 to text or a number, a language model is asked
                       (prompts/judge.py)

The answer is the text after the last </think> (chat.answer_text). With --thinking, which QwenLong-L1 requires
of its base model, the answer is empty if thinking never ended, and an empty answer scores 0.

row["answer"] is an accepted answer or a list of them, each bare or as the sentence that the prompt asks for
("The correct answer is (B)"), as in DocQA-RL-1.6K. One that a rule cannot read, such as a number without
digits, raises BadInput.
"""

import contextlib
import copy
import importlib
import math
import os
import re
import string
import struct
import sys
import traceback
from decimal import Decimal

from base import durable
from base.cli import BadInput

# ------------------------------------------------------------------------------------------------------- text

# Words that an answer may have beyond those wanted: room for a sentence, not for a list of guesses (our
# choice).
EXTRA_WORDS = 8


def exact(answer, row):
    """1.0 if the answer is one of row["answer"] up to case, punctuation, articles and white space: SQuAD's
    exact match (arXiv 1606.05250), except that 1.5 is not 15, -5 is not 5, and texts that consist only of
    articles and punctuation must be equal."""
    return float(normalize(answer) in {normalize(gold) for gold in golds(row)} - {""})


def contains(answer, row):
    """1.0 if what follows the last "the answer is" has the words of one of row["answer"] in sequence, and at
    most EXTRA_WORDS others. A "yes" or "no" that is wanted must be the first word, and not both may occur."""
    said = normalize(stated_answer(answer))
    wanted = [normalize(stated_answer(gold) or gold) for gold in golds(row)]
    return float(any(_contains(said, gold) for gold in wanted))


def _contains(said, gold):
    words = said.split()
    if not gold or not words or len(words) > len(gold.split()) + EXTRA_WORDS:
        return False
    if gold in ("yes", "no"):
        return words[0] == gold and not {"yes", "no"} <= set(words)
    return f" {gold} " in f" {said} "


def boxed(answer, row):
    """1.0 if the content of the last \\boxed{} is one of row["answer"], compared as in `exact`."""
    return exact(last_boxed(answer), row)


def golds(row):
    """The accepted answers of a row -> list of str."""
    return row["answer"] if isinstance(row["answer"], list) else [row["answer"]]


def stated_answer(text):
    """What follows the last "the answer is", without bold marks and a final full stop; "" without one."""
    parts = re.split("the answer is", text.replace("**", ""), flags=re.IGNORECASE)
    return parts[-1].strip(" \n:.") if len(parts) > 1 else ""


def last_boxed(text):
    """The content of the last \\boxed{...}, which may contain pairs of braces; "" if there is none or it does
    not close."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for place in range(start, len(text)) if "\\boxed{" in text else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return ""


def normalize(text):
    """SQuAD's normalisation, but decimal points and signs are kept, as words, and a text that is not empty
    never becomes empty."""
    numbers = re.sub(r"(?<=\d)\.(?=\d)", "point", re.sub(r"(?<!\w)[-\u2212](?=\.?\d)", "minus", text))
    return squad_normalize(numbers) or text.strip().lower()


def squad_normalize(text):
    """Lower case, without punctuation and articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# ---------------------------------------------------------------------------------------- numbers and choices

# A numeral that is not part of a fraction, a time, a power or a word, and what scales it.
NUMBER = re.compile(
    r"(?<![\w.,/^:])([-\u2212]?)\s?[$€£¥]?\s?([-\u2212]?)"
    r"(\d{1,3}+(?:,\d{3})++(?:\.\d++)?|\d++(?:\.\d++)?|\.\d++)(?![.,]?\d|\s*[/^:*×]\s*\d|\w)"
    r"(?:\s*(%|(?:percent|thousand|million|billion)\b))?",
    re.ASCII | re.IGNORECASE,
)
SCALE = {"": 1, "thousand": 10**3, "million": 10**6, "billion": 10**9}
TOLERANCE = Decimal("0.0015")  # relative, for numbers that are not whole; QwenLong-L1's
LETTER = re.compile(r"the correct answer is:?\s*\(?([A-D])(?![A-Za-z])", re.IGNORECASE)


def numeric(answer, row):
    """1.0 if the first number after the last "the answer is" is one of row["answer"]: equal, or within 0.15%
    if one of the two is not whole. Sign and scale count, but 12.5% is also 0.125. The text is never evaluated
    as code. Raises BadInput for a row["answer"] without a number."""
    wanted = [_readings(stated_answer(gold) or gold) for gold in golds(row)]
    if not all(wanted):
        raise BadInput(f'"answer" {row["answer"]!r:.80} has no number, which rewards:numeric needs')
    said = _readings(stated_answer(answer))
    return float(any(_equal(a, b) for a in said for gold in wanted for b in gold))


def _readings(text):
    """The first number of a text -> list of Decimal: [] without one, two for a percentage, else one."""
    found = NUMBER.search(text[:200])
    if not found:
        return []
    sign, inner_sign, digits, scale = found.groups(default="")
    value = Decimal(digits.replace(",", "")) * (-1 if sign or inner_sign else 1)
    if scale.lower() in ("%", "percent"):
        return [value, value / 100]
    return [value * SCALE[scale.lower()]]


def _equal(a, b):
    if a == a.to_integral_value() and b == b.to_integral_value():
        return a == b
    return abs(a - b) <= TOLERANCE * abs(b)


def choice(answer, row):
    """1.0 if the last "The correct answer is (B)" of the answer has the letter of row["answer"]. Raises
    BadInput for a row["answer"] that is not one of A to D."""
    wanted = {(LETTER.findall(gold) or [gold.strip(" ().")])[-1].upper() for gold in golds(row)}
    if not wanted <= set("ABCD"):
        raise BadInput(f'"answer" {row["answer"]!r:.80} is not one of A to D, which rewards:choice needs')
    said = LETTER.findall(answer.replace("*", ""))
    return float(bool(said) and said[-1].upper() in wanted)


# -------------------------------------------------------------------------------------------------- by source

SOURCES = {  # part of a row's "data_source" -> its reward
    "long_toc_choices": choice,
    "docmath": numeric,
    "multihoprag": contains,
    "musique": contains,
    "hotpotqa": boxed,
}


def by_source(answer, row):
    """The reward of row["data_source"], see SOURCES. Raises BadInput for a source that is not there."""
    return SOURCES[source(row)](answer, row)


def source(row):
    """The key of SOURCES that is in row["data_source"]. Raises BadInput if none is."""
    for name in SOURCES:
        if name in str(row.get("data_source")):
            return name
    raise BadInput(f'"data_source" {row.get("data_source")!r} is not known; known are {", ".join(SOURCES)}')


# ----------------------------------------------------------------------------------------------- as published


def stated_choice(response):
    """The letter that a response gives, by LongBench v2's two patterns (arXiv 2412.15204); None without one.
    The second pattern also reads "The correct answer is All of them" as A; kept, as in published scores."""
    response = response.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if match := re.search(pattern, response):
            return match[1]
    return None


def published(answer, row):
    """QwenLong-L1's rule rewards (arXiv 2505.17667) for the sources of DocQA-RL-1.6K, MemAgent's (arXiv
    2507.02259) for hotpotqa. For comparison only. Raises BadInput for another source.

    One thing is not theirs: QwenLong-L1 evaluates the model's number as Python; here it is read with float().
    """
    name = source(row)
    if name == "hotpotqa":
        # The last 300 characters, exact match after `_strip_math`. That golds are lowercased like the answer
        # is our reading.
        said = last_boxed(answer[-300:].lower())
        return float(bool(said) and _strip_math(said) in [_strip_math(gold.lower()) for gold in golds(row)])
    rules = {"long_toc_choices": _published_choice, "docmath": _published_number}
    rule = rules.get(name, _published_text)
    return float(any(rule(answer, gold) for gold in golds(row)))


def _published_choice(answer, gold):
    return (stated_choice(answer) or "").lower() == (stated_choice(gold) or gold).strip().lower()


def _published_text(answer, gold):
    if "the answer is" not in answer:
        return False

    def stated(text):
        return squad_normalize(text.replace("*", "").rsplit("the answer is", 1)[-1].strip(" .\n"))

    said, gold = stated(answer), stated(gold)
    return gold in said or said in gold


def _published_number(answer, gold):
    gold = gold if "the answer is" in gold.lower() else f"the answer is {gold}"
    pattern = re.compile(r"the answer is ([=≈`%$°£€¥]*-?[0-9.,]+)", re.IGNORECASE)
    said, gold = pattern.search(answer), pattern.search(gold)
    if not said or not gold:
        return False
    try:
        p, g = (float(found[1].lstrip("=≈`%$°£€¥").replace(",", "").rstrip(".")) for found in (said, gold))
        small, large = sorted((abs(p), abs(g)))
        if small == large or (small and round(math.log10(large / small), 9).is_integer()):
            return True
        for ratio, factor in ((50, 100), (500, 1000), (50_000, 100_000)):
            if small and large / small >= ratio and abs(small * factor - large) <= 0.0015 * large:
                return True
        return math.ceil(p * 1000) == math.ceil(g * 1000) or abs(p - g) <= 0.0015 * abs(g)
    except (ValueError, OverflowError):  # "1.2.3", ".", or beyond what a float holds
        return False


def _strip_math(text):
    """The part of MATH's normalisation that MemAgent uses."""
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac").replace(" .", " 0.")
    for left_out in ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", " "):
        text = text.replace(left_out, "")
    return text


# ------------------------------------------------------------------------------------------- loading, calling

# Modules that --reward may name without their room.
OURS = {"rewards": "prompts.rewards", "judge": "prompts.judge"}


def load_reward(spec):
    """-> the function that "module:function" names. Raises BadInput if there is no such module or function,
    or if importing it fails or closes this process's standard output.

    If the module has a function check_reward(), it is called now; it raises BadInput if something is missing
    that the reward needs.
    """
    module_name, _, name = spec.partition(":")
    module_name, closed_before = OURS.get(module_name, module_name), closed_streams()
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        fix = "write module:function, the module on PYTHONPATH"
        raise BadInput(f"--reward {spec}: {error}; {fix}") from error
    except BaseException as error:  # KeyboardInterrupt and SystemExit, too: it is the user's code
        show_traceback(error)
        raise BadInput(f"--reward {spec}: {module_name} fails when it is imported: {say(error)}") from error
    finally:
        check_streams(closed_before, f"--reward {spec}: importing {module_name}")
    if not callable(function):
        raise BadInput(f"--reward {spec}: {name} is not a function")
    try:
        getattr(module, "check_reward", lambda: None)()
    except BadInput:
        raise
    except BaseException as error:
        show_traceback(error)
        raise BadInput(f"--reward {spec}: {module_name}.check_reward() fails: {say(error)}") from error
    return function


def check_streams(closed_before, what):
    """Raises BadInput if standard output or standard error was closed since; it is opened again if possible,
    as the error must be shown."""
    closed = closed_streams() - closed_before
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        if name in closed:
            with contextlib.suppress(OSError):
                setattr(sys, name, open(descriptor, "w", closefd=False))
    if closed:
        raise BadInput(f"{what} closes {' and '.join(sorted(closed))}")


def closed_streams():
    """-> which of "stdout" and "stderr" are closed, as Python's file or as the system's."""
    closed = {name for name in ("stdout", "stderr") if getattr(getattr(sys, name), "closed", True)}
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.add(name)
    return closed


def source_digests(specs):
    """{spec: SHA-256 of the file of its module, or None where there is no file}, for functions that
    load_reward has loaded."""
    files = {}
    for spec in specs:
        name = spec.partition(":")[0]
        files[spec] = getattr(sys.modules[OURS.get(name, name)], "__file__", None)
    return {spec: file and durable.sha256(file) for spec, file in files.items()}


def score(reward, answer, row, name="the reward function"):
    """reward(answer, row) -> the reward as a float that is finite in fp32. The function gets a copy of the
    row, so that it cannot change it for other answers. Raises BadInput, which names the row, if the function
    raises or returns anything else. name: how a message calls it.

    A function that forks and returns in both processes returns in the first only.
    """
    process, closed_before, problem, value = os.getpid(), closed_streams(), None, None
    try:
        value = reward(answer, copy.deepcopy(row))
    except BaseException as error:  # KeyboardInterrupt and SystemExit, too: it is the user's code
        problem = error
    if os.getpid() != process:
        end_forked(problem)
    check_streams(closed_before, f"row {row['id']}: {name}")
    if isinstance(problem, BadInput):
        raise BadInput(f"row {row['id']}: {problem}") from problem
    if problem:
        show_traceback(problem)
        raise BadInput(f"{name} failed on row {row['id']}: {say(problem)}") from problem
    try:
        number = float(value)
    except BaseException as error:
        what = f"no finite number for row {row['id']}, but {say(value)}: {say(error)}"
        raise BadInput(f"{name} returned {what}") from error
    if not math.isfinite(number):
        raise BadInput(f"{name} returned no finite number for row {row['id']}, but {number}")
    try:
        struct.pack("<f", number)
    except OverflowError as error:
        what = "which fp32 cannot hold: at most 3.4e38"
        raise BadInput(f"{name} returned {number:g} for row {row['id']}, {what}") from error
    return number


def end_forked(problem):
    """End a process that the reward function has forked, as Python would after this exception or None."""
    code = 0
    if isinstance(problem, SystemExit):
        code = problem.code if isinstance(problem.code, int) else int(problem.code is not None)
    elif problem:
        show_traceback(problem)
        code = 1
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(code)


def say(value):
    """A value or error of the user's as text of at most 200 characters, also if it cannot say what it is."""
    try:
        text = repr(value)
    except BaseException:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def show_traceback(error):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # sys.stderr may be closed, or None
        traceback.print_exception(error)
