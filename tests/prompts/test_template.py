"""prompts/template.py and what chat.py does with it, against transformers' apply_chat_template."""

import json

import pytest
import transformers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from base.cli import BadInput
from prompts import chat, inspect, template

TINY = ROOT / "assets" / "tiny"
# Templates of our own that do what published ones do, each with what a conversation must become: what is
# trained on stands in brackets.
HEADERS = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set text = '<|header|>'
+ message['role'] + '<|end_header|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end_header|>\n\n' }}{% endif %}"""  # as Llama 3's
OWN_SYSTEM = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- generation %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""  # as Qwen2.5's and SmolLM2's
LAST_THOUGHT = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not message.content.startswith('<tool>') %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set thought = '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('' if enable_thinking | default(true) else '<think>\n\n</think>\n\n') }}
{%- endif %}"""  # as Qwen3's
OPENS_THOUGHT = OWN_SYSTEM.replace("assistant\n'", "assistant\n<think>\n'")  # as a distilled R1's
CONVERSATION = [
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
    {"role": "assistant", "content": "<think>\nh\n</think>\n\nB"},
]
EMPTY, SYSTEM = "<think>\n\n</think>\n\n", "<|im_start|>system\nYou help.<|im_end|>\n"
TURNS = (
    "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{}[A<|im_end|>]\n<|im_start|>user\nV<|im_end|>\n"
)
TURNS += "<|im_start|>assistant\n[<think>\nh\n</think>\n\nB<|im_end|>]"
HEADED = (
    "<|bos|><|header|>user<|end_header|>\n\nU<|eot_id|><|header|>assistant<|end_header|>\n\n[A<|eot_id|>]"
)
HEADED += "<|header|>user<|end_header|>\n\nV<|eot_id|><|header|>assistant<|end_header|>\n\n"
HEADED += "[<think>\nh\n</think>\n\nB<|eot_id|>]"
TEMPLATES = {
    "headers": (HEADERS, HEADED),
    "own system": (OWN_SYSTEM, SYSTEM + TURNS.format("")),
    "last thought": (LAST_THOUGHT, TURNS.format(EMPTY)),
    "chatml": (template.CHATML, TURNS.format(EMPTY)),
}
MORE = "<|bos|>", "<|header|>", "<|end_header|>", "<|eot_id|>", "<tool>"


def checkpoint(directory, text, in_config=False, **config):
    """A directory with assets/tiny's tokenizer, MORE tokens, and a chat template."""
    file = json.loads((TINY / "tokenizer.json").read_text())
    last = file["added_tokens"][-1]
    for i, token in enumerate(MORE):
        file["added_tokens"].append({**last, "id": last["id"] + 1 + i, "content": token, "special": True})
    (directory / "tokenizer.json").write_text(json.dumps(file))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", **config}
    if in_config:
        settings["chat_template"] = text
    else:
        (directory / "chat_template.jinja").write_text(text)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (ours, transformers')}; half of the templates stand in tokenizer_config.json."""
    made = {}
    for i, (name, (text, _)) in enumerate(TEMPLATES.items()):
        directory = checkpoint(tmp_path_factory.mktemp("c"), text, in_config=i % 2 == 1)
        made[name] = (
            chat.load_tokenizer(directory, 10**6),
            transformers.AutoTokenizer.from_pretrained(directory),
        )
    return made


# Awkward, but no added token: for these transformers makes control tokens.
plain = st.text(max_size=8) | st.sampled_from(
    [
        " x ",
        "\n\n",
        "{{ 7 * 7 }}",
        "{% for",
        "e\u0301",
        "<|not|>",
        "<",
        "|>",
        "'\"\\n",
        "\U000f0000",
        "\0\u0338",
    ]
)
ADDED = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", *MORE
said = st.tuples(plain, plain).map("".join).filter(lambda text: not any(token in text for token in ADDED))
thoughts = st.sampled_from(["", "<think>\nhm\n</think>\n\n", "x</think>"])


@settings(max_examples=60)
@given(st.lists(said, min_size=1, max_size=3), said, thoughts, st.booleans(), st.booleans())
def test_prompts_are_the_tokens_that_transformers_makes(tokenizers, users, answer, thought, system, thinking):
    messages = [{"role": "system", "content": users[0]}] if system else []
    for user in users:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": thought + answer}]
    del messages[-1]
    for name, (ours, theirs) in tokenizers.items():
        how = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": False}
        expected = theirs.apply_chat_template(messages, **how)
        assert chat.encode_prompt(ours, {"id": "x", "prompt": messages}, thinking, 10**9) == expected, name


SPELLED = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|header|>",
    "<tool>",
    "<think>",
    "</think>",
    "<|im_",
    "end|>",
    "|>",
    "<",
    "x",
]


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(SPELLED), min_size=1, max_size=3).map("".join), min_size=2, max_size=2)
)
def test_what_a_user_spells_never_acts_in_any_template(tokenizers, texts):
    for name, (ours, _) in tokenizers.items():
        added = ours.get_added_tokens_decoder()

        def acting(contents, ours=ours, added=added):
            messages = [{"role": role, "content": text} for role, text in zip(("system", "user"), contents)]
            ids = chat.encode_prompt(ours, {"id": "x", "prompt": messages}, True, 10**9)
            return [i for i in ids if i in added], ours.decode(ids, skip_special_tokens=False)

        tokens, text = acting(texts)
        assert tokens == acting(["plain", "plain"])[0], name
        assert all(spelled in text for spelled in texts), name


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_trains_what_the_assistant_says_and_the_end_of_its_turn(tokenizers, name):
    ours, _ = tokenizers[name]
    ids, trained = chat.encode_conversation(ours, CONVERSATION)
    text, before = "", False
    for token, now in zip([*ids, None], [*trained, False]):
        text += "]" if before and not now else "[" if now and not before else ""
        text += ours.decode([token], skip_special_tokens=False) if token is not None else ""
        before = now
    assert text == TEMPLATES[name][1]


def test_a_template_that_opens_the_thought_trains_what_follows(tmp_path):
    ours = chat.load_tokenizer(checkpoint(tmp_path, OPENS_THOUGHT), 10**6)
    ids, trained = chat.encode_conversation(ours, [CONVERSATION[0], CONVERSATION[3]])
    learned = ours.decode([i for i, t in zip(ids, trained) if t], skip_special_tokens=False)
    assert learned == "h\n</think>\n\nB<|im_end|>"
    assert ours.decode(ids, skip_special_tokens=False).count("<think>\n") == 1
    with pytest.raises(BadInput, match="begins with <think>, an answer has no </think>"):
        chat.encode_conversation(ours, CONVERSATION)


def test_what_ends_a_completion_and_what_is_said_of_the_format(tmp_path, tokenizers, capsys):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [881, 888]}')
    directory = checkpoint(tmp_path, HEADERS, eos_token={"content": "<|im_end|>"})
    ours = chat.load_tokenizer(directory, 10**6)
    assert [ours.id_to_token(i) for i in chat.stop_ids(ours)] == [
        "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_header|>",
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "answer": "a"}')
    inspect.inspect(inspect.Config(file=tmp_path / "rows.jsonl", model=directory))
    shown = capsys.readouterr().out
    assert f"chat template: {directory}/chat_template.jinja; it has no switch for thinking" in shown
    assert "<|bos|><|header|>user<|end_header|>\n\nWhy?<|eot_id|>" in shown
    assert "turns thinking off unless --thinking" in chat.described(tokenizers["last thought"][0])
    (directory / "chat_template.jinja").unlink()
    assert "ChatML, as the checkpoint has none" in chat.described(chat.load_tokenizer(directory, 10**6))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{% for", "chat template is no Jinja: "),
        ("{% include 'https://example.com/x' %}", "fails: no loader for this environment"),
        ("{{ raise_exception('only\nusers') }}", "fails: only users"),
        ("{{ ''.__class__.__mro__ }}", "fails: .*unsafe"),
        ("{{ messages[0].nothing.at_all }}", "fails: .*has no attribute"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: "),
        ("{{ strftime_now('%d') }}", "fails: 'strftime_now' is undefined"),
        ("{% set n = messages|length + 8 %}{{ (n ** (n ** n)) % 3 }}", "fails: .*small values"),
        ("{{ 'x' * 9999999999 }}", "fails: .*small values"),
        ("{% set n = namespace(x=9) %}{% for i in range(9) %}{% set n.x = n.x * n.x %}{% endfor %}", "small"),
        ("{% for i in range(9999) %}" * 2 + "{% set x = i %}" + "{% endfor %}" * 2, "did not end in"),
        ("{{ messages[0].content }} <|other|>", r"has no token <\|other\|>, which the chat template writes"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no control token of tokenizer.json ends"),
        ("{% for m in messages %}{{ m.content * 2 }}<|eot_id|>{% endfor %}", "shows what .* says 2 times"),
        ("x" * 2**18 + "y", "262,144 are the most"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_refused_in_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    with pytest.raises(BadInput, match=message) as caught:
        chat.load_tokenizer(checkpoint(tmp_path, text), 10**6)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_that_hold_no_template_are_refused_and_a_prompt_is_named(tmp_path):
    for value, message in ((3, "must be a text"), ([{"name": "tools", "template": "x"}], "ChatML")):
        directory = checkpoint(tmp_path, value, in_config=True)
        if message == "ChatML":
            assert message in chat.described(chat.load_tokenizer(directory, 10**6))
            continue
        with pytest.raises(BadInput, match=message):
            chat.load_tokenizer(directory, 10**6)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + HEADERS
    ours = chat.load_tokenizer(checkpoint(tmp_path, strict), 10**6)
    with pytest.raises(BadInput, match="prompt line 3: .*fails: no system"):
        chat.encode_prompt(ours, {"id": "line 3", "prompt": [{"role": "system", "content": "S"}]}, True, 99)
