"""RULER's data files: what they are called, where people get them, and what must be in them.

They are read from --data-dir, under the names RULER's repository gives the files
(scripts/data/synthetic/json) or the names their publishers give them:
    PaulGrahamEssays.json   {"text": ...}; essay haystacks. Without it a generated substitute is used and said
    squad.json              SQuAD 2.0's dev-v2.0.json; qa_1, no substitute
    hotpotqa.json           HotpotQA's hotpot_dev_distractor_v1.json; qa_2, no substitute
    english_words.json      a JSON object whose values are words; cwe beyond 8,166 different words
A file that is not there blocks its tasks; one that is there and damaged is an error that says where.

The readers take what json.loads gives and raise ValueError with what is wrong where.
"""

import json

from base.cli import BadInput


class MissingFile(BadInput):
    """A data file that is not there."""


# official name -> (names accepted, where people get it)
FILES = {
    "PaulGrahamEssays.json": (
        ("PaulGrahamEssays.json",),
        "made by https://github.com/NVIDIA/RULER/blob/main/scripts/data/synthetic/json/download_paulgraham_essay.py",
    ),
    "squad.json": (
        ("squad.json", "dev-v2.0.json"),
        "it is https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    ),
    "hotpotqa.json": (
        ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
        "it is http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json of https://hotpotqa.github.io; where "
        "that does not answer, https://huggingface.co/datasets/namlh2004/hotpotqa has a copy",
    ),
    "english_words.json": (
        ("english_words.json",),
        "it is https://github.com/NVIDIA/RULER/blob/main/scripts/data/synthetic/json/english_words.json, by git lfs pull",
    ),
}


def _of(kind, record, key, place, empty=False):
    """record[key], which must be of the type `kind`, and no list without items unless `empty`; place: of
    `record` in the file, for the message."""
    if not isinstance(record, (list if isinstance(key, int) else dict)):
        raise ValueError(
            f"{place} is {_brief(record)}, not {'a list' if isinstance(key, int) else 'an object'}"
        )
    try:
        value = record[key]
    except LookupError:
        raise ValueError(f"{place} has no {key if isinstance(key, int) else json.dumps(key)}") from None
    if not isinstance(value, kind) or (value == [] and not empty):
        name = {
            str: "a text",
            list: "a list" if empty else "a list with something in it",
            bool: "true or false",
        }[kind]
        raise ValueError(f"{place}[{json.dumps(key)}] is {_brief(value)}, not {name}")
    return value


def text_of(record, key, place):
    """record[key], which must be a text that is not blank and can be encoded."""
    value = _of(str, record, key, place)
    if not value.strip():
        raise ValueError(f"{place}[{json.dumps(key)}] is {_brief(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}[{json.dumps(key)}] has half a character (a lone surrogate) at {error.start}"
        ) from None
    return value


def _brief(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def english_words(content):
    """The JSON of english_words.json -> its words."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"the file is {_brief(content)}, not an object whose values are words")
    words = [text_of(content, key, "the file") for key in content]
    if control := [word for word in words if "<|" in word]:  # it would act in cwe's prompt
        raise ValueError(f"{_brief(control[0])} is no word")
    return words


def squad(content):
    """The JSON of squad.json -> (questions, documents): sorted different texts, and for each answerable
    question (query, answers, its own documents, documents preferred as distractors), documents by index."""
    paragraphs, questions, asked = [], [], []  # asked: (query, answers, paragraph)
    for a, article in enumerate(_of(list, content, "data", "the file")):
        first = len(paragraphs)
        own = _of(list, article, "paragraphs", f"data[{a}]")
        for p, paragraph in enumerate(own):
            place = f"data[{a}].paragraphs[{p}]"
            paragraphs.append((text_of(paragraph, "context", place), range(first, first + len(own))))
            for q, qa in enumerate(_of(list, paragraph, "qas", place, empty=True)):
                where = f"{place}.qas[{q}]"
                if not _of(bool, qa, "is_impossible", where):
                    query = text_of(qa, "question", where)
                    answers = [
                        text_of(answer, "text", f"{where}.answers[{i}]")
                        for i, answer in enumerate(_of(list, qa, "answers", where))
                    ]
                    asked.append((query, answers, len(paragraphs) - 1))
    if not asked:
        raise ValueError("it has no answerable question")
    documents = sorted({context for context, _ in paragraphs})
    number = {text: i for i, text in enumerate(documents)}
    for query, answers, place in asked:
        context, article = paragraphs[place]
        more = [number[paragraphs[i][0]] for i in article if paragraphs[i][0] != context]
        questions.append((query, answers, [number[context]], more))
    return questions, documents


def hotpotqa(content):
    """The JSON of hotpotqa.json -> (questions, documents), as `squad`."""
    rows = []
    if not isinstance(content, list) or not content:
        raise ValueError(f"the file is {_brief(content)}, not a list of questions")
    for r, row in enumerate(content):
        query, answer = text_of(row, "question", f"[{r}]"), text_of(row, "answer", f"[{r}]")
        texts = []
        for c, paragraph in enumerate(_of(list, row, "context", f"[{r}]")):
            place = f"[{r}].context[{c}]"
            title, sentences = text_of(paragraph, 0, place), _of(list, paragraph, 1, place, empty=True)
            if not all(isinstance(sentence, str) for sentence in sentences):
                raise ValueError(f"{place}[1] is {_brief(sentences)}, not a list of sentences")
            texts.append(text_of([f"{title}\n{''.join(sentences)}"], 0, place))
        rows.append((query, [answer], texts))
    documents = sorted({text for _, _, texts in rows for text in texts})
    number = {text: i for i, text in enumerate(documents)}
    return [
        (query, answers, [number[text] for text in texts], []) for query, answers, texts in rows
    ], documents
