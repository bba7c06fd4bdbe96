"""Rows -> the checkpoint's chat format (prompts/template.py) -> token ids.

Rows come from prompts/sources.py or prompts/tasks.py; answers are scored by prompts/rewards.py. A message is
{"role": "system", "user" or "assistant", "content": text}.

Text of a row stays text, whatever it spells: a document that quotes <|im_end|> cannot end a turn, one that
quotes </think> cannot end a thought. A prompt is therefore made of parts, (text, whether it is the
template's), and the tokenizer's added tokens act in the template's parts only (`encode_parts`). While the
template is applied, each token that a text spells is hidden behind one character that no text has.
"""

import functools
import itertools
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from base import limits
from base.cli import BadInput
from prompts import template

# An assistant's content that has thinking: white space, <think>, thought, </think>, answer.
THOUGHT = re.compile(r"(\s*)(<think>)?(.*)(</think>)(.*)", re.DOTALL)

# --------------------------------------------------------------------------------------------- chat templates


@functools.cache
def chatml():
    return template.Template(template.CHATML, "ChatML")


def template_of(tokenizer):
    """The Template that load_tokenizer found for a tokenizer; ChatML for one that has another origin."""
    return getattr(tokenizer, "chat_template", None) or chatml()


def chat_parts(tokenizer, messages, thinking, generate=True, around=None):
    """Messages -> the text of the tokenizer's chat template, with `generate` up to and including the start of
    the assistant's turn, in parts: [(text, whether it is the template's), ...]. Tools are not supported.

    around: the index of a message; the result is then two lists, of the parts before its content and after
    it. Raises BadInput where the template refuses the messages.
    """
    contents = "".join(message["content"] for message in messages)
    unused = (character for character in map(chr, range(0xF0000, 0x10FFFE)) if character not in contents)
    hidden, place = {}, next(unused)  # {what a text spells: the character for it}

    def hide(text):
        before, head, middle, tail, after = split_ends(tokenizer, text)
        pieces = [before, head, *split_added_tokens(tokenizer, middle), tail, after]
        for token in filter(None, pieces[1::2]):
            if token not in hidden:
                hidden[token] = next(unused)
        return "".join(hidden.get(piece, "") if i % 2 else piece for i, piece in enumerate(pieces))

    shown = []
    for i, message in enumerate(messages):
        content = message["content"]
        thought = THOUGHT.fullmatch(content) if message["role"] == "assistant" else None
        if i == around:
            content = place
        elif thought:  # its tags act, for a template that leaves out the thoughts of turns before
            content = "".join(
                piece if i in (1, 3) else hide(piece) for i, piece in enumerate(thought.groups(""))
            )
        else:
            content = hide(content)
        shown.append({"role": message["role"], "content": content})
    text = template_of(tokenizer).render(shown, thinking, generate)
    spelled = {character: token for token, character in hidden.items()}

    def parts(text):
        pieces = re.split(f"([{''.join(spelled)}])", text) if spelled else [text]
        return [(spelled[piece], False) if i % 2 else (piece, True) for i, piece in enumerate(pieces)]

    if around is None:
        return parts(text)
    if text.count(place) != 1:
        where = template_of(tokenizer).where
        raise BadInput(f"{where}: the chat template shows what the assistant says {text.count(place)} times")
    return [parts(side) for side in text.split(place)]


def render(tokenizer, messages, thinking):
    """Messages -> the text of chat_parts, joined."""
    return "".join(text for text, _ in chat_parts(tokenizer, messages, thinking))


def described(tokenizer):
    """One line: which chat format a tokenizer has, what --thinking does in it, what ends a turn."""
    chat_template = template_of(tokenizer)
    where = chat_template.where if chat_template.where != "ChatML" else "ChatML, as the checkpoint has none"
    talk = [{"role": "user", "content": "Hi"}]
    switch = "turns thinking off unless --thinking is given"
    if render(tokenizer, talk, True) == render(tokenizer, talk, False):
        switch = "has no switch for thinking, so --thinking only says that the answer follows </think>"
    ends = " or ".join(map(tokenizer.id_to_token, stop_ids(tokenizer)))
    return f"chat template: {where}; it {switch}; {ends} ends a completion"


def answer_text(completion, thinking):
    """A completion's text -> the part that is scored: what follows the last </think>, or "" if thinking never
    ended."""
    if thinking and "</think>" not in completion:
        return ""
    return completion.split("</think>")[-1].strip()


# ----------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(directory, vocab_size):
    """-> the Tokenizer of `directory`/tokenizer.json with two attributes: chat_template, the directory's
    Template, and stops, see stop_ids. (Copies of a Tokenizer have no attributes.)

    Raises BadInput if the file is missing, has token ids beyond the model's `vocab_size`, does not know what
    ends a turn of the template, or makes control tokens of text; and as template.find.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path} is missing; a checkpoint needs its tokenizer beside it")
    try:
        limits.check(path, limits.LARGEST_TEXT)
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()  # settings of the file: long texts are ours to refuse
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        problem = f"has token id {largest}, but the model's vocab_size is {vocab_size}"
        raise BadInput(f"{path} {problem}: not its tokenizer")
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: token.special for token in added.values()}
    tokenizer.chat_template = template.find(directory)
    written = re.findall(r"<\|\w+\|>", render(tokenizer, [{"role": "user", "content": "Hi"}], False))
    for token in written:
        if token not in special:
            raise BadInput(f"{path} has no token {token}, which the chat template writes")
    end = end_of_turn(tokenizer)
    if not special[end]:  # then it would stay in every answer
        raise BadInput(f'{path} has {end} with "special": false; set it to true')
    for token in filter(special.get, special):
        if tokenizer.token_to_id(token) in text_ids(tokenizer, token):
            raise BadInput(f"{path}: its merges make the control token {token} of plain text, too")
    config = template.optional(Path(directory) / "generation_config.json")
    ids = config.get("eos_token_id")
    ends = [end, tokenizer.chat_template.special_tokens.get("eos_token"), "<|endoftext|>"]
    stops = [tokenizer.token_to_id(token) for token in ends if token in special]
    stops += [i for i in (ids if isinstance(ids, list) else [ids]) if i in added]
    tokenizer.stops = list(dict.fromkeys(stops))
    return tokenizer


@functools.lru_cache(maxsize=8)
def end_of_turn(tokenizer):
    """The added token that the chat template writes after what the assistant says. Raises BadInput for a
    template without one: a model could not learn of it when to stop."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    after = "".join(text for text, _ in chat_parts(tokenizer, talk, False, generate=False, around=1)[1])
    before, *token = split_added_tokens(tokenizer, after)[:2]
    if before.strip() or not token:
        where = template_of(tokenizer).where
        raise BadInput(
            f"{where}: no control token of tokenizer.json ends the assistant's turn, but {after!r:.40}"
        )
    return token[0]


def stop_ids(tokenizer):
    """-> the ids of the tokens that end a completion: first that which ends a turn of the chat template, then
    eos_token of tokenizer_config.json, <|endoftext|>, and those of generation_config.json."""
    return tokenizer.stops


@functools.lru_cache(maxsize=8)
def _without_added_tokens(tokenizer):
    """-> the same tokenizer, for which every text is only text. (Its setting encode_special_tokens is for
    those that the file calls special; Qwen3's <think> is not one.)"""
    file = json.loads(tokenizer.to_str())
    for token in file["added_tokens"]:
        token["special"] = True
    plain = Tokenizer.from_str(json.dumps(file))
    plain.encode_special_tokens = True  # the library's name for: encode them as ordinary text
    return plain


def text_ids(tokenizer, text):
    """A text of the user's -> token ids (list of int), none of them an added token's."""
    # A batch of one, since only batches let other threads run; the fast kind leaves out the tokens' places.
    return _without_added_tokens(tokenizer).encode_batch_fast([text], add_special_tokens=False)[0].ids


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer):
    """-> a pattern of any added token; of two that fit the longer one."""
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    either = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.compile(f"({either})" if tokens else "((?!))")


def split_added_tokens(tokenizer, text):
    """A text -> [text, added token, text, ..., added token, text]."""
    return _added_tokens(tokenizer).split(text)


@functools.lru_cache(maxsize=8)
def _parts_of_added_tokens(tokenizer):
    """-> what added tokens begin with and end with, and the length of the longest."""
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    starts = {token[:n] for token in tokens for n in range(1, len(token))}
    ends = {token[-n:] for token in tokens for n in range(1, len(token))}
    return starts, ends, max(map(len, tokens), default=0)


def split_ends(tokenizer, text):
    """A text -> white space, head, middle, tail, white space. With what a template writes before and after
    the text, its head and tail could be an added token; both are nearly always empty."""
    starts, ends, longest = _parts_of_added_tokens(tokenizer)
    left, right = len(text) - len(text.lstrip()), len(text.rstrip())
    sizes = range(min(longest, right - left), 0, -1)
    head = next((n for n in sizes if text[left : left + n] in ends), 0)
    tail = next((n for n in sizes if text[right - n : right] in starts), 0)
    if head + tail > right - left:
        head, tail = max(0, right - left), 0
    if right < left:  # white space only
        right = left
    left, end = left + head, right - tail
    return text[: left - head], text[left - head : left], text[left:end], text[end:right], text[right:]


def encode_parts(tokenizer, parts):
    """[(text, whether it is the template's), ...] -> list of lists of token ids: of each added token in the
    template's parts, and of each text between them."""
    acting = [token for text, ours in parts if ours for token in split_added_tokens(tokenizer, text)[1::2]]
    whole = "".join(text for text, _ in parts)
    if split_added_tokens(tokenizer, whole)[1::2] == acting:  # no text spells one: all as it is
        added = tokenizer.get_added_tokens_decoder()
        ids = tokenizer.encode_batch_fast([whole], add_special_tokens=False)[0].ids
        # A text may begin with a combining character, which Unicode's NFC joins to the token before it.
        if [token for token in ids if token in added] == list(map(tokenizer.token_to_id, acting)):
            groups = itertools.groupby(
                enumerate(ids), lambda place: (place[1] in added and place[0], place[1] in added)
            )
            return [[token for _, token in group] for _, group in groups]
    runs = [("", False)]  # of text, or an added token
    for text, of_template in parts:
        for i, piece in enumerate(split_added_tokens(tokenizer, text) if of_template else [text]):
            acts = i % 2 == 1
            if acts or runs[-1][1]:
                runs.append((piece, acts))
            else:  # tokens may cross the border of template and text, such as two line ends
                runs[-1] = (runs[-1][0] + piece, False)
    return [
        [tokenizer.token_to_id(text)] if acts else text_ids(tokenizer, text) for text, acts in runs if text
    ]


def encode_prompt(tokenizer, row, thinking, limit, truncate=False):
    """Row -> prompt token ids, a list of int. Raises BadInput if there are more than `limit`; with `truncate`
    the middle of the longest message is left out instead, as LongBench does (arXiv 2308.14508)."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        parts = encode_parts(tokenizer, chat_parts(tokenizer, messages, thinking))
    except BadInput as error:
        raise BadInput(f"prompt {row['id']}: {error}") from error
    tokens = sum(map(len, parts))
    if tokens > limit:
        longest = max(parts, key=len)
        kept = len(longest) - (tokens - limit)
        if not truncate or kept < 2:
            raise BadInput(f"prompt {row['id']} has {tokens} tokens; the context leaves {limit} for a prompt")
        del longest[(kept + 1) // 2 : len(longest) - kept // 2]
    return [token for part in parts for token in part]


def encode_conversation(tokenizer, messages):
    """Messages that end with the assistant's -> token ids (list of int), and for each whether it is trained
    on (list of bool): what the assistant says, its thinking, and the token that ends its turn.

    Every assistant turn stands as it would be generated: with its thinking if its content has </think>, else
    as the template begins an answer without thinking. (Qwen3's template would remove the thinking of all
    turns but the last.) Of the tags in a content act a <think> that it begins with and the last </think>, as
    in `answer_text`. Raises BadInput where the template refuses the messages.
    """
    ids, trained, last = [], [], None  # the index of the assistant's turn before
    end = end_of_turn(tokenizer)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thought = THOUGHT.fullmatch(message["content"])
        if last is None:
            read = chat_parts(tokenizer, messages[:i], bool(thought))
        else:
            read = chat_parts(tokenizer, messages[:i], bool(thought), around=last)[1]
            read[0] = (read[0][0].partition(end)[2], True)  # which the turn before has said
        said = [(message["content"], False)]
        if thought:
            said = [(text, i in (1, 3)) for i, text in enumerate(thought.groups(""))]
        if read[-1][0].rstrip().endswith("<think>"):  # the template has opened the thought
            if not thought:
                where = template_of(tokenizer).where
                raise BadInput(f"{where}: the chat template begins with <think>, an answer has no </think>")
            said[:3] = [(said[2][0].lstrip("\n"), False)]
        for parts, train in ((read, False), ([*said, (end, True)], True)):
            for piece in encode_parts(tokenizer, parts):
                ids += piece
                trained += [train] * len(piece)
        last = i
    return ids, trained
