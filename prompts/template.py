"""A checkpoint's chat template: Jinja text, rendered in a sandbox as transformers renders it.

It is chat_template.jinja beside the weights, or the key chat_template of tokenizer_config.json; a checkpoint
without either gets CHATML, Qwen3's format. A template comes from a stranger: it can call nothing but Jinja's
own functions, read no file, and must end in SECONDS. It is not told the date (transformers tells it today's),
so that a prompt is the same tomorrow: a template that has a date of its own for this case uses it.
"""

import json
import re
import sys
import time
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from base import durable, limits
from base.cli import BadInput

CHARACTERS = 2**18  # of a template; Llama 3.1's has 4,000
SECONDS = 5  # of this thread's CPU time, for one prompt
# Qwen3's format for messages whose thinking is over. assets/tiny has this text in its chat_template.jinja.
CHATML = r"""{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
# What marks the assistant's words for transformers; it changes no text.
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without the two operators by which one line can take for ever, or all memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context, operator, left, right):
        sizes = [abs(side) if isinstance(side, (int, float)) else len(side) for side in (left, right)]
        if operator == "**" or max(sizes) > CHARACTERS or sizes[0] * sizes[1] > CHARACTERS:
            raise SecurityError(f"{operator} is for small values here")
        return left * right


def raise_exception(message):
    """What templates call to refuse messages."""
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own would write < and > of a text as escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Template:
    """text: the template; where: the file it is from, for messages; special_tokens: {"bos_token": text, ...}
    of the tokenizer. Raises BadInput for a text that is no template."""

    def __init__(self, text, where, special_tokens=()):
        self.text, self.where, self.special_tokens = text, where, dict(special_tokens)
        if len(text) > CHARACTERS:
            raise BadInput(
                f"{where}: a chat template of {len(text):,} characters; {CHARACTERS:,} are the most"
            )
        jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        jinja.filters["tojson"] = tojson
        jinja.globals["raise_exception"] = raise_exception
        plain = GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", text)
        try:
            self.template = jinja.from_string(plain)
        except (TemplateError, RecursionError, MemoryError) as error:
            raise BadInput(f"{where}: the chat template is no Jinja: {reason(error)}") from error

    def render(self, messages, thinking, generate=True):
        """[{"role", "content"}, ...] -> text; generate: up to and including the start of the assistant's
        turn. thinking: whether the model may think, by the name that Qwen3's template has for it.

        Raises BadInput where the template refuses the messages, fails, or does not end."""
        how = {"tools": None, "documents": None, "add_generation_prompt": generate}
        how |= {**self.special_tokens, "enable_thinking": thinking}
        end, before = time.thread_time() + SECONDS, sys.gettrace()

        def watch(frame, event, argument):
            if time.thread_time() > end:
                raise TimeoutError(f"it did not end in {SECONDS} s")
            return watch if frame.f_code.co_filename == "<template>" else None

        sys.settrace(watch)  # called on every line of the template
        try:
            return self.template.render(messages=messages, **how)
        # Whatever a stranger's template raises is an error of its own: a TypeError, a RecursionError.
        except Exception as error:
            raise BadInput(f"{self.where}: the chat template fails: {reason(error)}") from error
        finally:
            sys.settrace(before)


def reason(error):
    return " ".join(f"{error}".split())[:200] or type(error).__name__


def find(directory):
    """The chat template of a checkpoint directory -> Template; CHATML's where it has none. Raises BadInput
    for files that cannot be read, and as Template."""
    file, config = (
        Path(directory) / "chat_template.jinja",
        optional(Path(directory) / "tokenizer_config.json"),
    )
    special_tokens = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token  # an AddedToken, written out
        if isinstance(token, str):
            special_tokens[key] = token
    text, where = config.get("chat_template"), f"{directory}/tokenizer_config.json"
    if isinstance(text, list):  # several by name
        named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
        text = named.get("default")
    if file.exists():
        where = str(file)
        try:
            text = limits.read_text(file)
        except (OSError, ValueError) as error:
            raise BadInput(f"{file} cannot be read: {error}") from error
    if text is None:
        return Template(CHATML, "ChatML")
    if not isinstance(text, str):
        raise BadInput(f"{where}: chat_template must be a text, or a list with one named default")
    return Template(text, where, special_tokens)


def optional(path):
    """A file of one JSON object -> dict, {} if there is none. Raises BadInput."""
    return durable.read_object(path) if path.exists() else {}
