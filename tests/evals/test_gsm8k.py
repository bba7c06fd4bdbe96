"""gsm8k.py by hand; eval_gsm8k.py as a script with real vLLM on assets/tiny."""

import json
import re
from decimal import Decimal

import pytest
import torch
from conftest import ROOT, output_of

from base.cli import BadInput
from evals import clamp, gsm8k

TINY = ROOT / "assets" / "tiny"
ROWS = [
    {"question": "Tom has 2 bags of 3 apples. How many?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"},
    {"question": "A car costs $1,000 and a tyre $250. In all?", "answer": "#### 1,250"},
    {"question": "3 - 5?", "answer": "#### -2"},
]


def written(tmp_path, rows):
    path = tmp_path / "test.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_exemplars_add_up():
    examples = gsm8k.EXEMPLARS.split("\n\n")
    answers = [6, 5, 39, 8, 9, 29, 33, 8]
    assert len(examples) == 8
    for example, answer in zip(examples, answers):
        question, reasoning = example.split("\n")
        assert question.startswith("Q: ") and question.endswith("?") and reasoning.startswith("A: ")
        assert reasoning.endswith(f"The answer is {answer}.") and "  " not in example
        assert gsm8k.extract(reasoning) == answer
    assert gsm8k.EXEMPLARS.startswith(
        "Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. "
    )
    assert examples[-1] == (
        "Q: Olivia has $23. She bought five bagels for $3 each. How much money does she have left?\n"
        "A: Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - "
        "15 dollars left. "
        "23 - 15 is 8. The answer is 8."
    )


def test_prompts():
    assert gsm8k.base_prompt(" Why? ") == gsm8k.EXEMPLARS + "\n\nQ: Why?\nA:"
    assert gsm8k.chat_prompt("Why?\n") == "Why?\n\n" + gsm8k.INSTRUCTION
    assert gsm8k.base_answer(" The answer is 3.\n\nQ: More?\nA: The answer is 4.") == " The answer is 3.\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("####18", 18),
        ("**#### $1,234**", 1234),
        ("####\n18.", 18),
        ("#### -$5", -5),
        ("#### 18.50", Decimal("18.5")),
        ("#### .5", Decimal("0.5")),
        ("#### 1,000,000 people", 1_000_000),
        ("The answer is 29.", 29),
        ("the final answer is: 29%", 29),
        (r"The answer is \boxed{\$18}", 18),
        (r"\boxed{7} #### 8", 8),
        (r"\boxed{70{,}000}", 70_000),
        (r"\boxed{1\,000.50}", Decimal("1000.5")),
        ("#### −5", -5),
        ("#### 3\nno, #### 4", 4),
        ("The answer is 9: nine", 9),
        ("#### 007", 7),
        ("#### 29 %", 29),
        ("#### 5kg", 5),
        ("#### 5 x-rays", 5),
        ("#### €5 each", 5),
        ("#### Answer: 18", 18),
        ("**#### answer 18**", 18),
        ("#### **18**\n3 more", 18),
        ("The answer is 18 dollars, 3 more than before.", 18),
        ("#### The answer is $3.50.", Decimal("3.5")),
        (r"\boxed{18\%}", 18),
        (r"\boxed{18 \text{ dollars}}", 18),
        ("#### 1/2", None),
        ("#### 12 / 2", None),
        ("#### 1.2/3", None),
        ("the answer is 3:00", None),
        ("#### 2^10", None),
        (r"\boxed{2^{10}}", None),
        (r"\boxed{3 \times 10^3}", None),
        (r"\boxed{1\frac{1}{2}}", None),
        ("#### 1e3", None),
        ("#### 1.5E+3", None),
        ("#### 1 1/2", None),
        ("#### 1 000", None),
        ("#### 5 x 3", None),
        ("#### 12-15", None),
        ("#### 1.2.3", None),
        ("#### eighteen", None),
        ("#### ", None),
        ("it is 18", None),
        ("", None),
        ("#### __import__('os')", None),
    ],
)
def test_extraction(text, number):
    assert gsm8k.extract(text) == number


OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")  # openai/grade-school-math
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # lm-evaluation-harness, gsm8k_cot: the last match


def test_the_table_of_what_is_accepted():
    """docs/evaluate.md: what ours, the official pattern and flexible-extract make of awkward completions."""
    text = (ROOT / "docs" / "evaluate.md").read_text().split("| a completion has |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(.+)` \| (\S+) \| (\S+) \| (\S+) \|$", text, re.M)
    assert len(rows) == 30
    for said, *told in rows:
        official = [match[1] for match in OFFICIAL.finditer(said)][:1]
        flexible = ["".join(match.groups(default="")) for match in FLEXIBLE.finditer(said)][-1:]
        # Both compare without commas, dollar signs and a last full stop.
        plain = [re.sub(r"[,$]|\.$", "", found[0]) if found else "-" for found in (official, flexible)]
        ours = gsm8k.extract(said)
        assert ["-" if ours is None else str(ours), *plain] == told, said


@pytest.mark.parametrize(
    "run", [" ", "\n", "*", "9", "9,", "-", "#### ", r"\boxed{", "#### 9", r"\frac{", "answer:"]
)
def test_extraction_takes_no_time_over_what_a_model_repeats(run):
    """With backtracking a thousand spaces took half a minute; as many as here would never end."""
    assert gsm8k.extract("####" + run * 10_000 + "/2 #### 7") == 7


def test_the_official_file(tmp_path):
    rows = gsm8k.read(written(tmp_path, [*ROWS, ""]))
    assert [gold for _, _, gold in rows] == [6, 1250, -2] and rows[1][:2] == ("line 2", ROWS[1]["question"])
    for bad, message in (
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ([], 'must be an object with the texts "question" and "answer"'),
        ({"question": "?", "answer": 3}, "must be an object with the texts"),
        ({"question": "?", "answer": "3"}, "must end with #### and a number"),
        ({"question": "?", "answer": "#### three"}, "must end with #### and a number"),
        ({"question": " ", "answer": "#### 3"}, '"question" must not be empty'),
    ):
        with pytest.raises(BadInput, match="line 2") as error:
            gsm8k.read(written(tmp_path, [ROWS[0], bad if isinstance(bad, str) else json.dumps(bad)]))
        assert message in str(error.value)
    with pytest.raises(BadInput, match="has no rows"):
        gsm8k.read(written(tmp_path, []))
    with pytest.raises(BadInput, match="cannot be read"):
        gsm8k.read(tmp_path / "none")


def test_the_script_and_its_report(tmp_path):
    """One run of vLLM, under a clamp; then its predictions are replaced by hand and reported again."""
    heads = {"q": 8, "k": 2}
    names = {f"model.layers.{i}.self_attn.{which}_proj": n for i in range(3) for which, n in heads.items()}
    infinite = {name: torch.full((n * 32,), torch.inf) for name, n in names.items()}
    clamp.save(tmp_path / "clamp", infinite, {"rule": "all", "fraction": 1.0})
    arguments = [
        TINY,
        "--data",
        written(tmp_path, ROWS),
        "--mode",
        "base",
        "--max-tokens",
        20,
        "--out",
        tmp_path / "out",
    ]
    arguments += ["--clamp", tmp_path / "clamp"]
    assert "tiny, clamp: all\n" in output_of("eval_gsm8k.py", *arguments)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["clamp"]["rule"] == "all"
    path = tmp_path / "out" / "results.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["id"] for r in records] == ["line 1", "line 2", "line 3"] and all(
        r["prompt_tokens"] > 500 for r in records
    )
    assert {r["prediction"] for r in records} == {
        "!" * 20
    }  # of logits that are no numbers the greedy token is 0
    texts = ["2 * 3. The answer is 6.\n\nQ: x\nA: The answer is 7.", "The answer is $1,250.", "I"]
    made = [{**r, "prediction": text, "score": float(text != "I")} for r, text in zip(records, texts)]
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    stdout = output_of("eval_gsm8k.py", *arguments)
    assert re.search(r"\| all +\| +66\.67 \[-\] \| +3 \|", stdout) and "[-]: too few samples" in stdout
    assert (tmp_path / "out" / "results.md").read_text() in stdout
    assert "1 of 3 completions give no readable number" in stdout and "Not GSM8K's score: 3" in stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["score"]["n"] == 3
