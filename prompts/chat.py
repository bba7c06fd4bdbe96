"""Rows -> Qwen3's chat format (ChatML) -> token ids.

Rows come from prompts/sources.py or prompts/tasks.py; answers are scored by prompts/rewards.py. A message is
{"role": "system", "user" or "assistant", "content": text}.
"""

from pathlib import Path

from tokenizers import Tokenizer

from base.cli import BadInput

NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 begins an answer without thinking

# ----------------------------------------------------------------------------------------------------- ChatML


def chat_parts(messages, thinking):
    """Messages -> the text of Qwen3's chat template up to and including the start of the assistant's turn, in
    parts: [(text, whether it is a control token), ...].

    With thinking the model opens <think> itself; without, the text ends with an empty thinking block. Earlier
    assistant turns lose their thinking. Tools are not supported.
    """
    parts = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = content.split("</think>")[-1].lstrip("\n")
        parts += [("<|im_start|>", True), (f"{role}\n{content}", False), ("<|im_end|>", True), ("\n", False)]
    return [*parts, ("<|im_start|>", True), ("assistant\n" + ("" if thinking else NO_THOUGHT), False)]


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
    tokenizer, or has token ids beyond the model's `vocab_size`."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path} is missing; a checkpoint needs its tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()  # settings of the file: long texts are ours to refuse
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        problem = f"has token id {largest}, but the model's vocab_size is {vocab_size}"
        raise BadInput(f"{path} {problem}: not its tokenizer")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if tokenizer.token_to_id(token) is None:
            raise BadInput(f"{path} has no token {token}: not a Qwen tokenizer")
    return tokenizer


def stop_ids(tokenizer):
    """-> the ids of the two tokens that end a Qwen model's completion."""
    return [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]


def encode_parts(tokenizer, parts):
    """[(text, whether it is a control token), ...] -> list of token ids of each part.

    What looks like a control token within a text, such as <|im_end|> in a document about chats, is encoded
    as ordinary text: a document cannot end a turn.
    """
    tokenizer.encode_special_tokens = True  # the library's name for: encode them as ordinary text
    ids = [
        [tokenizer.token_to_id(text)] if control else tokenizer.encode(text, add_special_tokens=False).ids
        for text, control in parts
    ]
    tokenizer.encode_special_tokens = False
    return ids


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
    after an empty thinking block. (Qwen3's template would remove the thinking of all turns but the last.)
    """
    ids, trained = [], []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        speaks = role == "assistant"
        given = role + "\n" + (content if not speaks else "" if "</think>" in content else NO_THOUGHT)
        read = [("\n", False)] * (i > 0) + [("<|im_start|>", True), (given, False)]
        said = [(content, False)] * speaks + [("<|im_end|>", True)]
        for parts, train in ((read, False), (said, speaks)):
            for piece in encode_parts(tokenizer, parts):
                ids += piece
                trained += [train] * len(piece)
    return ids, trained
