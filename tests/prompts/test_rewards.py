"""rewards.py: what each reward accepts, and the holes of the published ones, which ours must not have."""

import math
import sys
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.cli import BadInput
from prompts import chat, rewards

SOURCES = "musique_0_20000", "long_toc_choices_0_20000", "docmath_40000_plus", "hotpotqa"
QA, CHOICE, MATH, BOXED = ({"id": "r", "data_source": source} for source in SOURCES)
REWARDS = [rewards.exact, rewards.contains, rewards.numeric, rewards.choice, rewards.boxed]


@pytest.mark.parametrize("answer, gold, value", [
    ("The Cat.", "cat", 1), ("cat", ["dog", "a cat"], 1), ("cats", "cat", 0), ("", "cat", 0),
    ("the", "cat", 0),
    ("cat dog", "cat", 0), ("c", "cat", 0), ("15", "1.5", 0), ("1.5", "1.5", 1), ("5", "-5", 0),
    ("1,500", "1500", 1),
    ("", "A", 0), ("the", "A", 0), ("a", "A", 1), ("", "-", 0), ("-", "-", 1),
])  # fmt: skip
def test_exact(answer, gold, value):
    assert rewards.exact(answer, {"answer": gold}) == value


@pytest.mark.parametrize("answer, gold, value", [
    ("Therefore, the answer is Paris.", "Paris", 1),
    ("The answer is: **Paris**", "Therefore, the answer is Paris.", 1),  # golds are stored as sentences
    ("the answer is London. No, the answer is Paris", ["Lyon", "Paris"], 1),
    ("the answer is the city of Paris in France", "Paris", 1),
    ("the answer is Parisian", "Paris", 0),  # whole words
    ("Paris", "Paris", 0),  # not in the form that was asked for
    ("the answer is Rome Paris Lyon Bonn Oslo Bern Riga Kiev Cairo Lima", "Paris", 0),  # a list of guesses
    ("the answer is Yes, they did", "yes", 1), ("the answer is yes or no", "yes", 0),
    ("the answer is not yes", "yes", 0),
    ("the answer is 15", "1.5", 0),
])  # fmt: skip
def test_contains(answer, gold, value):
    assert rewards.contains(answer, {"answer": gold}) == value


@pytest.mark.parametrize("answer, gold, value", [
    ("the answer is 12.5", "12.5", 1), ("the answer is $1,234.50.", "the answer is 1234.5", 1),
    ("the answer is 5. So the answer is 7", "7", 1), ("the answer is 5. So the answer is 7", "5", 0),
    ("the answer is 12.5%", "0.125", 1), ("the answer is 12.5%", "12.5", 1),
    ("the answer is 0.125", "12.5%", 1),
    ("the answer is $3.2 million", "3200000", 1), ("the answer is \u22123", "-3", 1),
    ("the answer is -$3", "-3", 1),
    ("the answer is 100.1", "100.05", 1), ("the answer is 100.3", "100.05", 0),  # 0.15% of 100.05 is 0.15
    ("the answer is 2022", "2020", 0),  # whole numbers are not rounded ones
    ("the answer is 3", "-3", 0), ("the answer is 1/2", "1", 0), ("the answer is 3:00", "3", 0),
    ("the answer is 1e9", "1", 0), ("the answer is 2nd", "2", 0), ("the answer is 1.2.3", "1.2", 0),
    ("the answer is \\boxed{12.5}", "12.5", 1), ("5", "5", 0), ("the answer is five", "5", 0),
    ("the answer is 0", "0.0", 1),
])  # fmt: skip
def test_numeric(answer, gold, value):
    assert rewards.numeric(answer, {"answer": gold}) == value


@pytest.mark.parametrize("answer, gold, value", [
    ("The correct answer is (B)", "B", 1), ("The correct answer is **B**.", "The correct answer is (B)", 1),
    ("the correct answer is (b)", "B", 1),
    ("The correct answer is (A). Rather: the correct answer is (B)", "(B)", 1),
    ("The correct answer is (B)是", "B", 1), ("B", "B", 0), ("The correct answer is (A)", "B", 0),
])  # fmt: skip
def test_choice(answer, gold, value):
    assert rewards.choice(answer, {"answer": gold}) == value


@pytest.mark.parametrize("answer, gold, value", [
    ("so \\boxed{Paris}", ["Rome", "paris"], 1), ("\\boxed{Rome} or \\boxed{Paris}", "Rome", 0),
    ("\\boxed{x^{2}}", "x^{2}", 1), ("\\boxed{Paris", "Paris", 0), ("Paris", "Paris", 0),
    ("\\boxed{}", "Paris", 0),
    ("\\boxed{15}", "1.5", 0),
])  # fmt: skip
def test_boxed(answer, gold, value):
    assert rewards.boxed(answer, {"answer": gold}) == value


def test_the_source_names_the_reward():
    assert rewards.by_source("The correct answer is (C)", {**CHOICE, "answer": "C"}) == 1
    assert rewards.by_source("the answer is 4", {**MATH, "answer": "4.0"}) == 1
    assert rewards.by_source("the answer is Ann", {**QA, "answer": "Ann"}) == 1
    assert rewards.by_source("\\boxed{Ann}", {**BOXED, "answer": ["Ann"]}) == 1
    for row in ({"answer": "x"}, {"answer": "x", "data_source": "gsm8k"}):
        with pytest.raises(BadInput, match=r"is not known; known are long_toc_choices, docmath"):
            rewards.by_source("x", row)


# -------------------------------------------------------------------------- holes of the published ones (D.2)

HOLES = {
    "nothing is contained in everything": (QA, "the answer is", "Paris"),
    "an article is nothing": (QA, "the answer is the", "Paris"),
    "punctuation is nothing": (QA, "the answer is -", "Paris"),
    "a letter is in most answers": (QA, "the answer is s", "Paris"),
    "a part of a word": (QA, "the answer is comparison", "Paris"),
    "all candidates": (
        QA, "the answer is Rome, Lyon, Bonn, Oslo, Bern, Riga, Kiev, Cairo, Lima, Paris", "Paris"
    ),
    "both yes and no": (QA, "the answer is yes and no", "yes"),
    "the sign is ignored": (MATH, "the answer is -5", "the answer is 5"),
    "powers of ten are ignored": (MATH, "the answer is 5", "the answer is 5000"),
    "a hundredth": (MATH, "the answer is 12.5", "the answer is 0.125"),
    "years that are close": (MATH, "the answer is 2022", "the answer is 2020"),
    "the first of several": (MATH, "the answer is 5 or the answer is 6", "5"),
    "a word that begins like a choice": (CHOICE, "The correct answer is All of them", "A"),
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_the_published_reward_pays_for_it_and_ours_does_not(hole):
    row, answer, gold = HOLES[hole]
    assert rewards.published(answer, {**row, "answer": gold}) == 1
    assert rewards.by_source(answer, {**row, "answer": gold}) == 0


@pytest.mark.parametrize("row, answer, gold", [
    (QA, "the answer is Paris.", "the answer is Paris"), (MATH, "the answer is 12.5", "12.5"),
    (MATH, "the answer is 0.3333", "the answer is 0.33333"), (CHOICE, "The correct answer is (B)", "B"),
    (BOXED, "so\n\\boxed{New York}", ["new york"]),
])  # fmt: skip
def test_both_pay_for_what_is_right(row, answer, gold):
    assert (
        rewards.published(answer, {**row, "answer": gold})
        == rewards.by_source(answer, {**row, "answer": gold})
        == 1
    )


def test_published_memagent_reads_the_last_300_characters_and_compares_up_to_spaces():
    row = {**BOXED, "answer": ["New York", "\\frac{1}{2}"]}
    assert rewards.published("\\boxed{NewYork}", row) == rewards.published("\\boxed{\\dfrac{1}{2}}", row) == 1
    assert rewards.published("\\boxed{New York}" + " " * 300, row) == 0
    assert rewards.published("\\boxed{the New York}", row) == 0 and rewards.published("New York", row) == 0


@pytest.mark.parametrize("text", ["__import__('os').abort()", "9**9**9", "1/2", "2+2"])
def test_no_number_is_evaluated(text):
    """QwenLong-L1 hands the model's text to eval(). Ours reads numerals, in both forms: these are not equal
    to what they would evaluate to, and nothing happens."""
    for gold in ("4", "0.5"):
        row = {**MATH, "answer": gold}
        assert (
            rewards.by_source(f"the answer is {text}", row)
            == rewards.published(f"the answer is {text}", row)
            == 0
        )


@pytest.mark.parametrize("row, right", [
    (QA, "the answer is Ann"), (MATH, "the answer is 4"), (CHOICE, "The correct answer is (C)"),
    (BOXED, "\\boxed{Ann}"),
])  # fmt: skip
def test_only_what_follows_the_end_of_thinking_counts(row, right):
    row = {**row, "answer": {"musique_0_20000": "Ann", "hotpotqa": ["Ann"]}.get(row["data_source"], "4")}
    row["answer"] = "C" if row["data_source"].startswith("long_toc") else row["answer"]
    for completion, value in (
        (f"<think>\nhm\n</think>\n\n{right}", 1),
        (f"<think>\n{right}\n</think>\n\nI do not know", 0),
        (f"<think>\n{right}", 0),  # never ended
    ):
        assert rewards.by_source(chat.answer_text(completion, thinking=True), row) == value


# ------------------------------------------------------------------------------------- whatever the answer is

PIECES = ["the answer is ", "The correct answer is ", "(B)", "\\boxed{", "}", "1e999999", "-", ".", "%", "0",
          "12,345.6",
          "9" * 400, "\u0661", "¥", " ", "\x00", "İ", "million", "{" * 50,
          "the answer is 9", "The correct answer is (", "a ", "1,", "the answer is \\boxed{{"]  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@settings(max_examples=100, deadline=None)
@given(texts, st.sampled_from(["4", "-0.5", "the answer is 12%", "the answer is 0"]))
def test_any_answer_gets_0_or_1(answer, number):
    for reward, gold in zip(REWARDS, ["Ann", "Ann", number, "C", ["Ann", "Bob"]], strict=True):
        assert reward(answer, {"answer": gold}) in (0.0, 1.0)
    for row, gold in ((QA, "Ann"), (MATH, number), (CHOICE, "C"), (BOXED, ["Ann"])):
        for reward in (rewards.by_source, rewards.published):
            assert reward(answer, {**row, "answer": gold}) in (0.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
def test_exact_is_symmetric_and_an_answer_that_is_there_equals_itself(a, b):
    assert rewards.exact(a, {"answer": b}) == rewards.exact(b, {"answer": a})
    assert rewards.exact(a, {"answer": a}) == float(bool(a.strip()))


# Words of one half of the alphabet are golds, of the other half what has nothing to do with them. No
# articles, no yes or no.
golds = st.lists(st.text("bcdefgBCDEFG0", min_size=2, max_size=5), min_size=1, max_size=4).map(" ".join)
others = st.lists(st.text("pqrsuvwPQRSUVW", min_size=2, max_size=5), max_size=7).map(" ".join)
decorations = st.text(" ,;!?'\"", max_size=3)


@settings(max_examples=100)
@given(golds, others, decorations, st.sampled_from([str, str.upper, str.lower, str.swapcase]))
def test_the_gold_in_the_form_that_was_asked_for_is_right(gold, other, mark, case):
    """Whatever its case, articles and punctuation, alone or one of several, bare or as a sentence."""
    said, rows = (
        f"{mark}The {case(gold)}{mark}",
        [{"answer": accepted} for accepted in (gold, [other, gold], [gold + ".", other])],
    )
    for row in rows:
        assert rewards.exact(said, row) == rewards.boxed(f"so \\boxed{{{said}}}", row) == 1
        assert rewards.contains(f"{other}. Therefore, THE ANSWER IS: **{said}**.", row) == 1
        assert rewards.contains(f"the answer is {other} {said}", row) == 1  # 7 words more
        assert rewards.by_source(f"the answer is {said}", {**QA, **row}) == 1
    assert rewards.contains(f"the answer is {said}", {"answer": f"The answer is {gold}."}) == 1


@settings(max_examples=100)
@given(golds, others, decorations)
def test_an_answer_without_the_golds_words_is_wrong(gold, other, mark):
    row = {"answer": [gold, f"the answer is {gold}"]}
    for said in (other, mark + other, f"The {other}", gold[:-1] + "x", f"x{gold}"):
        assert rewards.exact(said, row) == rewards.boxed(f"\\boxed{{{said}}}", row) == 0
        assert rewards.contains(f"{gold}. So the answer is {said}", row) == 0  # the gold came before
        assert rewards.by_source(f"the answer is {said}", {**QA, **row}) == 0
    assert rewards.contains(gold, row) == rewards.boxed(gold, row) == 0  # not in the form


@settings(max_examples=100)
@given(
    st.decimals(-(10**9), 10**9, places=2),
    st.integers(-(10**12), 10**12),
    st.sampled_from(["", " dollars", ".", " m"]),
)
def test_a_number_is_itself_however_it_is_written(decimal, whole, unit):
    for number in (decimal, whole):
        for said in (
            f"{number}",
            f"{number:,}",
            f"$ {number:,}".replace("$ -", "-$"),
            f"\\boxed{{{number}}}",
        ):
            assert rewards.numeric(f"So the answer is {said}{unit}", {"answer": ["7e", str(number)][1:]}) == 1
        assert rewards.numeric(f"the answer is {number}", {"answer": f"the answer is {number:,}"}) == 1
        assert rewards.numeric(f"the answer is {number}", {"answer": str(-number)}) == float(number == 0)
        assert rewards.numeric(f"{number}", {"answer": str(number)}) == 0  # not in the form
    assert rewards.numeric(f"the answer is {whole}", {"answer": str(whole + 1)}) == 0


@settings(max_examples=100)
@given(
    texts.filter(lambda text: "correct answer" not in text.lower()),
    st.sampled_from("ABCD"),
    st.sampled_from("ABCD"),
)
def test_a_choice_is_the_last_letter_in_the_form(text, said, gold):
    for row in ({"answer": gold}, {"answer": f"The correct answer is ({gold})"}):
        for form in (f"({said})", f"**{said}**", f"{said.lower()}."):
            assert rewards.choice(
                f"The correct answer is (A). No: the correct answer is {form} {text}", row
            ) == (said == gold)
        assert rewards.choice(text, row) == 0


@pytest.mark.parametrize("piece", PIECES)
def test_a_million_characters_are_nothing_special(piece):
    """Twice the text takes about twice the time, or this would not end."""
    answer = piece * (10**6 // len(piece))
    for row, gold in ((QA, "Ann"), (MATH, "4"), (CHOICE, "C"), (BOXED, ["Ann"])):
        assert rewards.by_source(answer, {**row, "answer": gold}) == 0
        assert math.isfinite(rewards.published(answer, {**row, "answer": gold}))


# ------------------------------------------------------------------------------------------- loading, calling


@pytest.mark.parametrize(
    "reward, gold", [(rewards.numeric, "five"), (rewards.choice, "E"), (rewards.choice, "")]
)
def test_a_row_that_the_reward_cannot_use_is_named(reward, gold):
    with pytest.raises(BadInput, match=r'row line 3: "answer" .* which rewards:'):
        rewards.score(reward, "", {"id": "line 3", "answer": gold})


@pytest.mark.parametrize("spec", ["data", "nowhere:f", "data:nothing", "data:NAMES", ":", "data:"])
def test_rewards_that_do_not_exist_are_refused(spec):
    with pytest.raises(BadInput, match="--reward"):
        rewards.load_reward(spec)


def test_a_module_says_what_its_reward_lacks_before_anything_takes_time(monkeypatch):
    def check_reward():
        raise BadInput("no judge")

    module = ModuleType("mine")
    module.score, module.check_reward = rewards.exact, check_reward
    monkeypatch.setitem(sys.modules, "mine", module)
    with pytest.raises(BadInput, match="^no judge$"):
        rewards.load_reward("mine:score")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "high"])
def test_a_reward_that_is_no_finite_number_names_the_row(value):
    with pytest.raises(BadInput, match="row line 3"):
        rewards.score(lambda answer, row: value, "a", {"id": "line 3"})
