"""evals/ruler/texts.py and files.py: words, essays, and what is said of files that are missing or damaged."""

import hashlib
import json
import random
import re

import pytest
from wonderwords.random_word import _get_words_from_text_file

from base.cli import BadInput
from evals.ruler import files, texts
from evals.ruler import sets as ruler

ESSAY_TASKS = [name for name, task in ruler.TASKS.items() if task.parameters.get("haystack") == "essay"]


def test_keys():
    """The lazy sequence is RULER's sorted list of all keys, position by position."""
    nouns, adjectives = (set(_get_words_from_text_file(f"{kind}list.txt")) for kind in ("noun", "adjective"))
    keys = sorted(f"{adjective}-{noun}" for adjective in sorted(adjectives) for noun in sorted(nouns))
    assert len(texts.keys()) == len(keys) == 6_171_620
    starts = texts.keys().starts  # where it may go wrong; and anywhere else
    places = [
        *starts,
        *(start - 1 for start in starts[1:]),
        *random.Random(0).sample(range(len(keys)), 300_000),
    ]
    assert all(texts.keys()[i] == keys[i] for i in places)


def test_missing_files_block_their_tasks_by_name(tmp_path):
    for corpora in (ruler.Corpora(), ruler.Corpora(tmp_path)):
        assert corpora.essay_source == "generated substitute"
        assert set(corpora.blocked(ruler.TASKS.values(), [4096, 131072])) == {"qa_1", "qa_2"}
        reasons = corpora.blocked(ruler.TASKS.values(), [262144])
        assert set(reasons) == {"qa_1", "qa_2", "cwe"}
        assert "squad.json or dev-v2.0.json" in reasons["qa_1"] and "hotpotqa.github.io" in reasons["qa_2"]
        assert all("\n" not in reason for reason in reasons.values())
        with pytest.raises(BadInput, match=r"hotpotqa.json or hotpot_dev_distractor_v1.json is .*qa_2"):
            ruler.generate("qa_2", 4096, 1, 42, None, "{task_template}", corpora)


def squad(*path, value=None):
    """Two paragraphs with a question each in the published format, in which the value at `path` is
    another."""
    qa = [
        {"question": "Q?", "id": "1", "answers": [{"text": "A", "answer_start": 0}], "is_impossible": False}
    ]
    paragraphs = [{"context": f"{i} A", "qas": json.loads(json.dumps(qa))} for i in range(2)]
    return changed({"version": "v2.0", "data": [{"title": "T", "paragraphs": paragraphs}]}, path, value)


def hotpotqa(*path, value=None):
    context = [[f"T{i}", ["One. ", "Two."]] for i in range(3)]
    return changed(
        [{"_id": str(i), "question": "Q?", "answer": "A", "context": context} for i in range(2)], path, value
    )


def changed(content, path, value):
    if path:
        place = content = json.loads(json.dumps(content))
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    return json.dumps(content).encode()


QA = ("data", 0, "paragraphs", 1, "qas", 0)
DEEP = b"[" * 100_000 + b"]" * 100_000
DAMAGED = [
    *(
        (name, content, message)
        for name in files.FILES
        for content, message in (
            (b'{"text": "\xff"}', "can't decode byte 0xff"),
            (b"{", "line 1 column 2"),
            (b"", "line 1 column 1"),
            (DEEP, "recursion"),
            (b"version https://git-lfs.github.com/spec/v1", "git-LFS pointer"),
            (b"null", "is null, not"),
            (b"[3]", "[3]"),
        )
        if (name, content) != ("hotpotqa.json", b"[3]")
    ),
    ("PaulGrahamEssays.json", b"{}", 'the file has no "text"'),
    ("PaulGrahamEssays.json", b'{"text": " "}', 'the file["text"] is " ", not a text'),
    ("PaulGrahamEssays.json", b'{"text": ["a"]}', 'the file["text"] is ["a"], not a text'),
    ("PaulGrahamEssays.json", b'{"text": "ab \\ud800"}', "an unpaired surrogate at 3"),
    ("english_words.json", b'{"1": "a", "2": null}', 'the file["2"] is null, not a text'),
    ("english_words.json", b'{"1": "\\ud800"}', 'the file["1"] has an unpaired surrogate'),
    ("squad.json", squad("data", value=[]), 'the file["data"] is [], not a list with something in it'),
    ("squad.json", squad("data", 0, value=3), "data[0] is 3, not an object"),
    (
        "squad.json",
        squad("data", 0, "paragraphs", 1, "context", value=None),
        'data[0].paragraphs[1]["context"] is null',
    ),
    (
        "squad.json",
        squad(*QA, "question", value=None),
        'data[0].paragraphs[1].qas[0]["question"] is null, not a text',
    ),
    ("squad.json", squad(*QA, "question", value=7), 'qas[0]["question"] is 7, not a text'),
    ("squad.json", squad(*QA, "question", value="\ud800"), 'qas[0]["question"] has an unpaired surrogate'),
    (
        "squad.json",
        squad(*QA, "is_impossible", value="no"),
        'qas[0]["is_impossible"] is "no", not true or false',
    ),
    (
        "squad.json",
        squad(*QA, "answers", value=[]),
        'qas[0]["answers"] is [], not a list with something in it',
    ),
    ("squad.json", squad(*QA, "answers", value=["A"]), 'qas[0].answers[0] is "A", not an object'),
    ("squad.json", squad(*QA, "answers", 0, "text", value=""), 'qas[0].answers[0]["text"] is "", not a text'),
    (
        "squad.json",
        squad("data", 0, "paragraphs", value=[{"context": "c", "qas": []}]),
        "no answerable question",
    ),
    ("hotpotqa.json", b"[]", "the file is [], not a list of questions"),
    ("hotpotqa.json", b"[3]", "[0] is 3, not an object"),
    ("hotpotqa.json", hotpotqa(1, "question", value=None), '[1]["question"] is null, not a text'),
    ("hotpotqa.json", hotpotqa(1, "answer", value=["A"]), '[1]["answer"] is ["A"], not a text'),
    ("hotpotqa.json", hotpotqa(1, "answer", value=None), '[1]["answer"] is null, not a text'),
    (
        "hotpotqa.json",
        hotpotqa(1, "context", value=[]),
        '[1]["context"] is [], not a list with something in it',
    ),
    ("hotpotqa.json", hotpotqa(1, "context", 2, value="T"), '[1].context[2] is "T", not a list'),
    ("hotpotqa.json", hotpotqa(1, "context", 2, value=["T"]), "[1].context[2] has no 1"),
    ("hotpotqa.json", hotpotqa(1, "context", 2, 1, value="One."), '[1].context[2][1] is "One.", not a list'),
    (
        "hotpotqa.json",
        hotpotqa(1, "context", 2, 1, 0, value=3),
        '[1].context[2][1] is [3, "Two."], not a list of sentences',
    ),
    (
        "hotpotqa.json",
        hotpotqa(1, "context", 2, 1, 0, value="\udfff"),
        "[1].context[2][0] has an unpaired surrogate",
    ),
]


def test_a_damaged_file_is_an_error_that_says_where(tmp_path):
    for name, content, message in DAMAGED:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput) as error:
            ruler.Corpora(tmp_path).blocked(
                [task for task in ruler.TASKS.values() if name in task.needs], [4096]
            )
        text = str(error.value)
        assert text.startswith(f"{tmp_path / name} cannot be used: ") and message in text, (
            content[:200],
            text,
        )
        assert "\n" not in text and len(text) < 600 and text.endswith(files.FILES[name][1])
        (tmp_path / name).unlink()
    for name, content in (("squad.json", squad()), ("hotpotqa.json", hotpotqa(1, "context", 2, 1, value=[]))):
        (tmp_path / name).write_bytes(content)
        assert len(ruler.Corpora(tmp_path).questions(name)[0]) == 2
    (tmp_path / "english_words.json").mkdir()  # no file, so it is missing
    assert set(ruler.Corpora(tmp_path).blocked(ruler.TASKS.values(), [262144])) == {"cwe"}


# ----------------------------------------------------------------------------------------------------- essays


def test_essays(tmp_path):
    text = (
        'One is here. "Two," said Mr. Smith (of Ohio.) Three? Yes!  \n Is 4 p.m. late? A. B. Cee wrote e.g. '
    )
    text += "This. End"
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    corpora = ruler.Corpora(tmp_path)
    assert corpora.essay_source == "PaulGrahamEssays.json"
    if corpora.sentence_splitter == "own rule":
        assert corpora.sentences(21) == [
            "One is here.",
            '"Two," said Mr. Smith (of Ohio.)',
            "Three?",
            "Yes!",
            "Is 4 p.m. late?",
            "A. B. Cee wrote e.g. This.",
        ]
    for size in (1, 3, 20, 21, 22, 47, 500):
        words = (text.split() * 30)[:size]
        assert " ".join(corpora.sentences(size)) == " ".join(words)


def test_the_substitute_is_long_varied_and_always_the_same():
    text = texts.substitute_essay()
    words = text.split()
    assert len(words) >= 250_000 and len(set(words)) > 8000 and not re.search(r"\d", text)
    sentences = ruler.Corpora().sentences(100_000)
    assert len(set(sentences)) > 0.95 * len(sentences) and 8 < 100_000 / len(sentences) < 25
    assert all(re.fullmatch(r'["A-Z].*[.?!]', sentence) for sentence in sentences[:-1])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "b1e88dc3881b"
