"""RULER's data files: what they are called, where people get them, and what must be in them.

They are read from --data-dir, under the names that RULER's repository (scripts/data/synthetic/json) or their
publishers give them:
    PaulGrahamEssays.json   {"text": ...}; essay haystacks. Without it a generated substitute is used, and the
                            report says so
    squad.json              SQuAD 2.0's dev-v2.0.json; qa_1, no substitute
    hotpotqa.json           HotpotQA's hotpot_dev_distractor_v1.json; qa_2, no substitute
    english_words.json      a JSON object whose values are words; cwe beyond 8,166 different words
A missing file blocks its tasks; a damaged one is an error that says where the damage is.

The readers take what json.loads returns, and raise ValueError, which says what is wrong and where.
"""

import json

from base.cli import BadInput, brief


class MissingFile(BadInput):
    """A data file that is not there."""


RULER_JSON = "https://github.com/NVIDIA/RULER/blob/main/scripts/data/synthetic/json"
# official name -> (names accepted, where people get it)
FILES = {
    "PaulGrahamEssays.json": (
        ("PaulGrahamEssays.json",),
        f"made by {RULER_JSON}/download_paulgraham_essay.py",
    ),
    "squad.json": (
        ("squad.json", "dev-v2.0.json"),
        "it is https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    ),
    "hotpotqa.json": (
        ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
        "it is http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json of "
        "https://hotpotqa.github.io; where that does not answer, "
        "https://huggingface.co/datasets/namlh2004/hotpotqa has a copy",
    ),
    "english_words.json": (
        ("english_words.json",),
        f"it is {RULER_JSON}/english_words.json, by git lfs pull",
    ),
}


def _of(kind, record, key, place, empty=False):
    """record[key], which must be of the type `kind`, and not an empty list unless `empty`. place: where
    `record` is in the file, for the message."""
    container, name = (list, "a list") if isinstance(key, int) else (dict, "an object")
    if not isinstance(record, container):
        raise ValueError(f"{place} is {_brief(record)}, not {name}")
    try:
        value = record[key]
    except LookupError:
        raise ValueError(f"{place} has no {json.dumps(key)}") from None
    if not isinstance(value, kind) or (value == [] and not empty):
        a_list = "a list" if empty else "a list with something in it"
        name = {str: "a text", list: a_list, bool: "true or false"}[kind]
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
        where = f"{place}[{json.dumps(key)}]"
        raise ValueError(f"{where} has an unpaired surrogate at {error.start}") from None
    return value


def _brief(value):
    return brief(value, longest=60)


def english_words(content):
    """The JSON of english_words.json -> its words."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"the file is {_brief(content)}, not an object whose values are words")
    words = [text_of(content, key, "the file") for key in content]
    if control := [word for word in words if "<|" in word]:  # it would act in cwe's prompt
        raise ValueError(f"{_brief(control[0])} is no word")
    return words


def squad(content):
    """The JSON of squad.json -> (questions, documents). documents: the different texts, sorted. questions: of
    each answerable one (query, answers, its own documents, documents preferred as distractors), documents by
    index."""
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
                    query, answers = text_of(qa, "question", where), []
                    for i, answer in enumerate(_of(list, qa, "answers", where)):
                        answers.append(text_of(answer, "text", f"{where}.answers[{i}]"))
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
    """The JSON of hotpotqa.json -> (questions, documents), as `squad` has them."""
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
    questions = [(query, answers, [number[text] for text in texts], []) for query, answers, texts in rows]
    return questions, documents
