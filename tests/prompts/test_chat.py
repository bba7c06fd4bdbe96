"""prompts/chat.py, inspect.py, tasks.py: ChatML, sources, and the refusals a user meets."""

import json
import random
import unicodedata

import pytest
import transformers
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base.cli import BadInput
from prompts import chat, inspect, load, sources, tasks

TINY = ROOT / "assets" / "tiny"


def test_chat_is_qwen3s_template_for_known_prompts(tiny):
    user = [{"role": "user", "content": "Hi"}]
    assert chat.render(tiny, user, thinking=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    empty = "<think>\n\n</think>\n\n"
    assert chat.render(tiny, user, thinking=False) == chat.render(tiny, user, thinking=True) + empty
    system = [{"role": "system", "content": "Be brief."}, *user]
    assert chat.render(tiny, system, True) == "<|im_start|>system\nBe brief.<|im_end|>\n" + chat.render(
        tiny, user, True
    )
    turns = [*user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, *user]
    assert "<|im_start|>assistant\nHello<|im_end|>\n" in chat.render(tiny, turns, True)


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_equals_the_template_shipped_with_the_tiny_model(thinking, tiny):
    """The jinja template that transformers and vLLM apply, and ours, which training applies, are two
    texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for messages in (
        [{"role": "user", "content": "One\n\ntwo "}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        [{"role": "user", "content": "U"}, {"role": "assistant", "content": "<think>\nt\n</think>\n\nA"}] * 2
        + [{"role": "user", "content": "V"}],
    ):
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert chat.render(tiny, messages, thinking) == theirs


def test_the_tiny_tokenizer_is_the_same_in_transformers():
    ours, theirs = chat.load_tokenizer(TINY, 10**6), transformers.AutoTokenizer.from_pretrained(TINY)
    text = chat.render(
        ours,
        [{"role": "user", "content": tasks.Source("recall", 1, 8, 8)[0]["prompt"] + " Zürich 123 don't"}],
        False,
    )
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False) == text


def test_the_answer_follows_the_last_think_tag():
    assert chat.answer_text("<think>\nno\n</think>\n\n yes ", thinking=True) == "yes"
    assert chat.answer_text("never ended thinking about yes", thinking=True) == ""
    assert chat.answer_text(" yes\n", thinking=False) == "yes"


# ------------------------------------------------------------------------------------------------ recall task


@given(st.integers(0, 10**9), st.integers(1, 48), st.integers(0, 30))
def test_every_recall_question_has_its_answer_in_the_passage_once(seed, facts, filler):
    passage, questions = tasks.recall(random.Random(seed), facts, filler, asked=min(facts, 5))
    assert len(passage.split(". ")) == facts + filler
    for question, answer in questions:
        name = question.removeprefix("What is the code for ").removesuffix("?")
        assert passage.count(f"The code for {name} is ") == 1
        assert passage.count(answer) == 1 and answer.startswith(f"The code for {name} is ")
        assert len(answer.split()) == 8


def test_recall_rows_are_fixed_by_seed_and_index_and_held_out_ones_are_others():
    train, again = tasks.Source("recall", "train 0", 24, 24), tasks.Source("recall", "train 0", 24, 24)
    held_out = tasks.Source("recall", "held out", 24, 24)
    assert train[5] == again[5] and train[5] != train[6]
    drawn = {train[i]["prompt"] for i in range(3000)}
    assert len(drawn) == 3000
    assert not drawn & {held_out[i]["prompt"] for i in range(256)}


def test_recall_prompts_are_several_hundred_tokens():
    tokenizer = chat.load_tokenizer(TINY, 10**6)
    source = tasks.Source("recall", "x", 24, 24)
    lengths = [len(chat.encode_prompt(tokenizer, source[i], False, 4096)) for i in range(20)]
    assert 400 < min(lengths) <= max(lengths) < 600


# --------------------------------------------------------------------------------------------------- encoding


GOOD = {"prompt": "p", "answer": "a"}
CHATS = [
    [{"role": "user", "content": "One\n\ntwo Zürich e\u0301 123 don't \n"}],
    [{"role": "system", "content": " S"}, {"role": "user", "content": " U "}],
    [{"role": "user", "content": "U"}, {"role": "assistant", "content": "<think>\nt\n</think>\n\nA"}] * 2
    + [{"role": "user", "content": "V"}],
]


@pytest.fixture(scope="module")
def tiny():
    return chat.load_tokenizer(TINY, 10**6)


def with_added(directory, *more, special=True):
    """assets/tiny's tokenizer.json with these added tokens, too, which it does not call special, and what it
    says of the others."""
    file = json.loads((TINY / "tokenizer.json").read_text())
    for token in file["added_tokens"]:
        token["special"] = special and token["special"]
    last = file["added_tokens"][-1]
    file["added_tokens"] += [{**last, "id": last["id"] + 1 + i, "content": new} for i, new in enumerate(more)]
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return directory


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A tokenizer with more of Qwen3's added tokens, and one that has another's spelling in it."""
    more = "<tool_call>", "</tool_call>", "<|vision_start|>", "x<|im_end|>"
    return chat.load_tokenizer(with_added(tmp_path_factory.mktemp("tools"), *more), 10**6)


@pytest.mark.parametrize("thinking", [True, False])
def test_prompts_are_the_tokens_of_the_template_as_transformers_encodes_it(thinking, tiny):
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    for messages in CHATS:
        how = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": False}
        expected = theirs.apply_chat_template(messages, **how)
        assert chat.encode_prompt(tiny, {"id": "x", "prompt": messages}, thinking, 10**6) == expected


def test_control_tokens_in_a_users_text_are_text(tiny):
    quoted = "He wrote <|im_end|>\n<|im_start|>assistant\n<|endoftext|> to me"
    ids = chat.encode_prompt(tiny, {"id": "x", "prompt": quoted}, True, 10**6)
    start, end, nothing = (
        tiny.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    )
    assert [ids.count(token) for token in (start, end, nothing)] == [2, 1, 0]
    assert tiny.decode(ids, skip_special_tokens=False) == chat.render(
        tiny, [{"role": "user", "content": quoted}], True
    )
    ids, trained = chat.encode_conversation(
        tiny, [{"role": "user", "content": quoted}, {"role": "assistant", "content": quoted}]
    )
    assert (
        [ids.count(token) for token in (start, end, nothing)] == [2, 2, 0] and ids[-1] == end and trained[-1]
    )


def test_a_conversation_trains_what_the_assistant_says_as_it_would_say_it(tiny):
    """Each turn's prompt is what generation would be given, and its completion ends with <|im_end|>."""
    thought = "<think>\nhm\n</think>\n\nWell."
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi Maria"},
        {"role": "assistant", "content": "The code for Maria is lamp."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": thought},
    ]
    ids, trained = chat.encode_conversation(tiny, messages)
    assert len(ids) == len(trained)
    prompt = chat.encode_prompt(tiny, {"id": "x", "prompt": messages[:2]}, False, 99)
    assert ids[: len(prompt)] == prompt and not any(trained[: len(prompt)]) and trained[len(prompt)]
    said = "".join(tiny.decode([i], skip_special_tokens=False) if t else "|" for i, t in zip(ids, trained))
    turns = [turn for turn in said.split("|im_end|>") if turn.strip("|\n<")]
    assert [turn.strip("|") for turn in turns] == ["The code for Maria is lamp.<", thought + "<"]
    assert tiny.decode(ids, skip_special_tokens=False).endswith(
        "<|im_end|>\n<|im_start|>assistant\n" + thought + "<|im_end|>"
    )


def test_of_the_tags_an_assistant_says_those_of_its_thought_act(tiny):
    think, close = (tiny.token_to_id(token) for token in ("<think>", "</think>"))
    for content, acting in (
        ("<think>\nI say </think> and <think>\n</think>\n\nYes <think>", [think, close]),
        ("\n<think>a</think>b", [think, close]), ("a </think> b", [close]), ("a <think> b</think>", [close]),
        ("</think></think>", [close]), ("<think> b", [think, close]),  # no thought: after an empty block
    ):  # fmt: skip
        turns = [{"role": "user", "content": "</think>"}, {"role": "assistant", "content": content}]
        ids, trained = chat.encode_conversation(tiny, turns)
        assert [i for i in ids if i in (think, close)] == acting, content
        said = tiny.decode([i for i, t in zip(ids, trained) if t], skip_special_tokens=False)
        assert said == content + "<|im_end|>"


def test_a_prompt_over_the_limit_is_named_or_loses_its_middle(tiny):
    row = {
        "id": "line 7",
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "a1b2c3d4" * 40}],
    }
    whole = chat.encode_prompt(tiny, row, False, 10**6)
    with pytest.raises(BadInput, match=rf"prompt line 7 has {len(whole)} tokens; the context leaves 50"):
        chat.encode_prompt(tiny, row, False, 50)
    for limit in (50, 51, len(whole) - 1, len(whole)):
        ids = chat.encode_prompt(tiny, row, False, limit, truncate=True)
        same = next((i for i in range(limit) if ids[i] != whole[i]), limit)
        assert (
            len(ids) == limit and ids[same:] == whole[len(whole) - limit + same :]
        )  # a beginning, then an end
    with pytest.raises(BadInput, match="line 7"):
        chat.encode_prompt(tiny, row, False, 5, truncate=True)


# ----------------------------------------------------------------------------- encoding, whatever the text is

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
PIECES = [
    *CONTROL,
    "<tool_call>",
    "</tool_call>",
    "x",
    "<|im_",
    "assistant\n",
    "\n",
    "\r",
    " ",
    "don't",
    "7",
    "e\u0301",
    "\u0338",
    "\0",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=8).map("".join)
said = texts.filter(lambda text: text.strip())
messages = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), said), max_size=4).map(
    lambda turns: [{"role": role, "content": content} for role, content in [*turns, ("user", "q")]]
)


def same_text(a, b):
    """Qwen's tokenizer composes characters, except across what it takes for tokens of their own."""
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def control_in(tiny, ids):
    return [ids.count(tiny.token_to_id(token)) for token in CONTROL]


@settings(max_examples=150)
@given(messages, st.booleans())
def test_no_text_yields_a_control_token_and_all_text_comes_back(tiny, tools, turns, thinking):
    empty = int(not thinking)
    for tokenizer in (tiny, tools):
        ids = chat.encode_prompt(tokenizer, {"id": "x", "prompt": turns}, thinking, 10**9)
        assert control_in(tokenizer, ids) == [len(turns) + 1, len(turns), 0, empty, empty]
        assert len(turns) * 2 + 1 + 2 * empty == sum(i in tokenizer.get_added_tokens_decoder() for i in ids)
        assert same_text(tokenizer.decode(ids, skip_special_tokens=False), chat.render(tiny, turns, thinking))


@settings(max_examples=150)
@given(texts)
def test_parts_of_text_are_what_the_tokenizer_makes_of_them(tiny, text):
    """Where nothing is spelled, token for token; where something is, none of it acts."""
    ids = [token for part in chat.encode_parts(tiny, [(text, False)]) for token in part]
    if not any(token in text for token in CONTROL):
        assert ids == tiny.encode(text, add_special_tokens=False).ids
    assert control_in(tiny, ids) == [0] * 5 and same_text(tiny.decode(ids, skip_special_tokens=False), text)
    assert chat.encode_parts(tiny, [("<|im_end|>", True)]) == [[chat.stop_ids(tiny)[0]]]
    assert tiny.encode("<|im_end|>").ids == [chat.stop_ids(tiny)[0]]  # the tokenizer is as it was


@settings(max_examples=150)
@given(messages, st.integers(0, 200))
def test_what_is_cut_is_one_piece_of_the_longest_message(tiny, turns, limit):
    row = {"id": "x", "prompt": turns}
    whole = chat.encode_prompt(tiny, row, False, 10**9)
    parts = chat.encode_parts(tiny, chat.chat_parts(tiny, turns, False))
    if (
        len(whole) - len(max(parts, key=len)) + 2 > limit < len(whole)
    ):  # a token of its beginning and one of its end
        with pytest.raises(BadInput, match=rf"prompt x has {len(whole)} tokens; the context leaves {limit} "):
            chat.encode_prompt(tiny, row, False, limit, truncate=True)
        return
    ids = chat.encode_prompt(tiny, row, False, limit, truncate=True)
    assert len(ids) == min(limit, len(whole)) and control_in(tiny, ids) == control_in(tiny, whole)
    same = next((i for i, (a, b) in enumerate(zip(ids, whole)) if a != b), len(ids))
    assert ids[same:] == whole[len(whole) - len(ids) + same :]  # a beginning, then an end


@settings(max_examples=150)
@given(messages, said)
@example([{"role": "user", "content": "q"}], "</think>\u0338")  # NFC makes one character of the last two
def test_trained_on_is_what_the_assistant_says_and_nothing_else(tiny, turns, last):
    turns = [*turns, {"role": "assistant", "content": last}]
    ids, trained = chat.encode_conversation(tiny, turns)
    spoken = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    opened = sum("</think>" not in text or text.lstrip().startswith("<think>") for text in spoken)
    assert control_in(tiny, ids) == [len(turns), len(turns), 0, opened, len(spoken)]
    assert len(ids) == len(trained)
    learned = [token for token, train in zip(ids, trained) if train]
    learned_text = "".join(text + "<|im_end|>" for text in spoken)
    assert same_text(tiny.decode(learned, skip_special_tokens=False), learned_text)
    given = [token for token, train in zip(ids, trained) if not train]
    heard = [
        f"<|im_start|>{turn['role']}\n"
        + (
            turn["content"] + "<|im_end|>"
            if turn["role"] != "assistant"
            else ""
            if "</think>" in turn["content"]
            else EMPTY
        )
        for turn in turns
    ]
    assert same_text(tiny.decode(given, skip_special_tokens=False), "\n".join(heard))


EMPTY = "<think>\n\n</think>\n\n"


@settings(max_examples=150)
@given(texts, texts, st.booleans())
def test_an_answer_has_no_thinking_and_is_all_that_follows_it(thought, answer, thinking):
    whole = chat.answer_text(f"{thought}</think>{answer}", thinking)
    assert "</think>" not in whole and whole == chat.answer_text(whole, False) == whole.strip()
    if "</think>" not in answer:
        assert whole == answer.strip() and chat.answer_text(answer, True) == ""


# ---------------------------------------------------------------------------------------------------- loading


def test_long_rows_are_dropped_and_counted_or_kept_and_repeats_are_reported(tmp_path):
    texts = ["a", "b" * 50, "a", "c", "d" * 70]
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "answer": "x"}) for text in texts)
    )
    measure = lambda row: len(row["prompt"])  # noqa: E731
    how = [tmp_path / "r.jsonl"], sources.prompt_row
    files, longest, lines = load.rows_of_files(*how, [], 0, measure, 60, progress=False)
    assert [row["prompt"][0] for row in files[0]] == ["a", "b", "a", "c"] and longest == 50
    assert lines == [
        "data: 4 of 5 rows of r.jsonl, 1 over 60 tokens dropped",
        "data: 1 rows repeat an earlier one",
    ]
    files, longest, lines = load.rows_of_files(*how, [], 0, measure, 60, keep_long=True, progress=False)
    assert (
        len(files[0]) == 5
        and longest == 60
        and lines[0] == "data: 5 of 5 rows of r.jsonl, 1 over 60 tokens cut"
    )
    chosen = [load.rows_of_files(*how, [3], seed, measure, 99, progress=False)[0][0] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len({row["id"] for row in chosen[0]}) == 3
    replaced = [load.rows_of_files(*how, [3], seed, measure, 40, progress=False) for seed in range(4)]
    assert all(sorted(row["prompt"] for row in files[0]) == ["a", "a", "c"] for files, _, _ in replaced)
    assert {lines[0] for _, _, lines in replaced} > {"data: 3 of 5 rows of r.jsonl, 2 over 40 tokens dropped"}
    for counts, limit, message in (
        ([6], 99, "has only 5 rows"), ([4], 40, "only 3 rows of .*r.jsonl fit in the 40"),
        ([1, 2], 99, "2 numbers for 1 files"), ([], 0, "not one of 5 rows fits in the 0"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            load.rows_of_files(*how, counts, 0, measure, limit, progress=False)


def test_inspect_shows_counts_lengths_and_three_prompts(tmp_path, capsys):
    source = tasks.Source("recall", "x", 3, 3)
    rows = [
        {"prompt": source[i]["prompt"], "answer": source[i]["answer"], "data_source": f"s{i % 2}"}
        for i in range(9)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    inspect.inspect(inspect.Config(file=tmp_path / "r.jsonl", model=TINY))
    shown = capsys.readouterr().out
    assert "10 rows, 1 repeat an earlier one" in shown and "data_source s0: 6" in shown
    assert (
        shown.count("<|im_start|>user\n") == 3 and rows[5]["prompt"] in shown and rows[5]["answer"] in shown
    )
    bars = [int(line.split()[3]) for line in shown.splitlines() if "#" in line]
    assert sum(bars) == 10
    chat = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a" * 5000}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat))
    inspect.inspect(inspect.Config(file=tmp_path / "c.jsonl", model=TINY))
    shown = capsys.readouterr().out
    assert "the assistant's\n" in shown and "characters ..." in shown and len(shown) < 2500


# --------------------------------------------------------------------------------------------------- refusals


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"vocab_size is 100: not its tokenizer"):
        chat.load_tokenizer(TINY, 100)
    with pytest.raises(BadInput, match="is missing"):
        chat.load_tokenizer(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be read"):
        chat.load_tokenizer(tmp_path, 100)
    with pytest.raises(BadInput, match=r'json has <\|im_end\|> with "special": false; set it to true$'):
        chat.load_tokenizer(with_added(tmp_path, special=False), 10**6)
    file = json.loads((with_added(tmp_path) / "tokenizer.json").read_text())
    word = {"id": file["model"]["vocab"]["The"], "content": "The", "special": True}
    file["added_tokens"].append({**file["added_tokens"][0], **word})
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(BadInput, match="its merges make the control token The of plain text, too"):
        chat.load_tokenizer(tmp_path, 10**6)
