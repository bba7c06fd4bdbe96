"""Rows -> ChatML -> token ids. Where rows come from: sources.py; how answers are judged: rewards.py; tasks
made on the fly: tasks.py."""

from pathlib import Path

from tokenizers import Tokenizer

from base.cli import BadInput

NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 begins an answer without thinking

# ------------------------------------------------------------------------------------------------------------- ChatML


def chat_parts(messages, thinking):
    """Messages -> the text Qwen3's chat template gives, up to and including the start of the assistant's
    turn, in parts: [(text, whether it is a control token), ...].

    With thinking the model opens <think> itself; without, an empty thinking block is already there. Earlier
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
    """Messages -> the text of chat_parts."""
    return "".join(text for text, _ in chat_parts(messages, thinking))


def answer_text(completion, thinking):
    """What is scored of a completion: the text after the last </think>; nothing if thinking never ended."""
    if thinking and "</think>" not in completion:
        return ""
    return completion.split("</think>")[-1].strip()


# ------------------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(directory, vocab_size):
    """`directory`/tokenizer.json; refuses one whose ids the model's embedding does not have. Raises
    BadInput."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path} is missing; a checkpoint needs its tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadInput(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()  # what is too long is for us to refuse, not for the file to cut
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise BadInput(
            f"{path} has token id {largest}, but the model's vocab_size is {vocab_size}: not its tokenizer"
        )
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if tokenizer.token_to_id(token) is None:
            raise BadInput(f"{path} has no token {token}: not a Qwen tokenizer")
    return tokenizer


def stop_ids(tokenizer):
    """The two tokens after which a Qwen model has nothing more to say."""
    return [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]


def encode_parts(tokenizer, parts):
    """[(text, whether it is a control token), ...] -> token ids of each part. What looks like a control token
    within a text, such as <|im_end|> in a document about chats, becomes letters: nobody ends a turn by
    quoting how turns end."""
    tokenizer.encode_special_tokens = True  # tokenizers' name for: as any other text
    ids = [
        [tokenizer.token_to_id(text)] if control else tokenizer.encode(text, add_special_tokens=False).ids
        for text, control in parts
    ]
    tokenizer.encode_special_tokens = False
    return ids


def encode_prompt(tokenizer, row, thinking, limit, truncate=False):
    """Row -> prompt token ids (list of int). Raises BadInput when they are more than `limit`; with
    `truncate`, the middle of the longest message is left out instead, as LongBench does."""
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
    """Messages that end with the assistant's -> token ids, and which of them are trained on: what the
    assistant says, its thinking and <|im_end|>.

    Every assistant turn stands as it is generated: it thinks if its content has </think>, else it follows an
    empty thinking block. (Where several turns think, Qwen3's template would hide the earlier thoughts from
    the later turns.)
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
