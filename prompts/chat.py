"""Rows -> Qwen3's chat format (ChatML) -> token ids.

Rows come from prompts/sources.py or prompts/tasks.py; answers are scored by prompts/rewards.py. A message is
{"role": "system", "user" or "assistant", "content": text}.

Text of a row stays text, whatever it spells: a document that quotes <|im_end|> cannot end a turn, one that
quotes </think> cannot end a thought. A prompt is therefore made of parts, (text, whether it is the
template's), and the tokenizer's added tokens act in the template's parts only (`encode_parts`).
"""

import functools
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from base import limits
from base.cli import BadInput

NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 begins an answer without thinking
# An assistant's content that has thinking: white space, <think>, thought, </think>, answer.
THOUGHT = re.compile(r"(\s*)(<think>)?(.*)(</think>)(.*)", re.DOTALL)

# ----------------------------------------------------------------------------------------------------- ChatML


def chat_parts(messages, thinking):
    """Messages -> the text of Qwen3's chat template up to and including the start of the assistant's turn, in
    parts: [(text, whether it is the template's), ...].

    With thinking the model opens <think> itself; without, the text ends with an empty thinking block. Earlier
    assistant turns lose their thinking. Tools are not supported.
    """
    parts = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = content.split("</think>")[-1].lstrip("\n")
        parts += [(f"<|im_start|>{role}\n", True), (content, False), ("<|im_end|>\n", True)]
    return [*parts, ("<|im_start|>assistant\n" + ("" if thinking else NO_THOUGHT), True)]


def render(messages, thinking):
    """Messages -> the text of chat_parts, joined."""
    return "".join(text for text, _ in chat_parts(messages, thinking))


def answer_text(completion, thinking):
    """A completion's text -> the part that is scored: what follows the last </think>, or "" if thinking never
    ended."""
    if thinking and "</think>" not in completion:
        return ""
    return completion.split("</think>")[-1].strip()


# ----------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(directory, vocab_size):
    """-> the Tokenizer of `directory`/tokenizer.json. Raises BadInput if it is missing, is not a Qwen
    tokenizer, has token ids beyond the model's `vocab_size`, or makes control tokens of text."""
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
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if token not in special:
            raise BadInput(f"{path} has no token {token}: not a Qwen tokenizer")
        if not special[token]:  # then it would stay in every answer
            raise BadInput(f'{path} has {token} with "special": false; set it to true')
    for token in filter(special.get, special):
        if tokenizer.token_to_id(token) in text_ids(tokenizer, token):
            raise BadInput(f"{path}: its merges make the control token {token} of plain text, too")
    return tokenizer


def stop_ids(tokenizer):
    """-> the ids of the two tokens that end a Qwen model's completion."""
    return [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]


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


def split_added_tokens(tokenizer, text):
    """A text -> [text, added token, text, ..., added token, text]; of two that fit the longer one."""
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    either = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.split(f"({either})", text) if tokens else [text]


def encode_parts(tokenizer, parts):
    """[(text, whether it is the template's), ...] -> list of lists of token ids: of each added token in the
    template's parts, and of each text between them."""
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
    parts = encode_parts(tokenizer, chat_parts(messages, thinking))
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
    on (list of bool): what the assistant says, its thinking, and <|im_end|>.

    Every assistant turn stands as it would be generated: with its thinking if its content has </think>, else
    after an empty thinking block. (Qwen3's template would remove the thinking of all turns but the last.) Of
    the tags in a content act a <think> that it begins with and the last </think>, as in `answer_text`.
    """
    ids, trained = [], []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        thought = THOUGHT.fullmatch(content)
        read, said = [("\n" * (i > 0) + f"<|im_start|>{role}\n", True)], [("<|im_end|>", True)]
        if role != "assistant":
            read.append((content, False))
        elif thought:
            said = [(text, i in (1, 3)) for i, text in enumerate(thought.groups(""))] + said
        else:
            read.append((NO_THOUGHT, True))
            said.insert(0, (content, False))
        for parts, train in ((read, False), (said, role == "assistant")):
            for piece in encode_parts(tokenizer, parts):
                ids += piece
                trained += [train] * len(piece)
    return ids, trained
