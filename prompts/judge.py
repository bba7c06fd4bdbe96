"""A language model that judges answers to which the rules give 0: --reward judge:by_source.

QwenLong-L1's reward is the larger of rule and judge (arXiv 2505.17667). Any OpenAI-compatible
endpoint will do, such as a second vLLM:

    vllm serve Qwen2.5-1.5B-Instruct --port 8001
    export LONGACT_JUDGE_URL=http://localhost:8001/v1 LONGACT_JUDGE_MODEL=Qwen2.5-1.5B-Instruct
    torchrun train.py --reward judge:by_source ...

Settings come from the environment, since a reward function is given only an answer and a row. torchrun passes
the environment on to all ranks.

    LONGACT_JUDGE_URL      address of the endpoint, up to and including /v1
    LONGACT_JUDGE_MODEL    the model's name there
    LONGACT_JUDGE_AWAY     what to do when the judge does not answer. "stop" (default) ends the run. "rule"
                           uses the rule's score and asks again a minute later; then answers of one group may
                           be scored in two ways
    LONGACT_JUDGE_TIMEOUT  seconds a request may take in all (60); it is tried four times, 1, 2 and 4 seconds
                           apart
    LONGACT_JUDGE_CACHE    SQLite file that keeps every verdict, on a local disk (runs/judge.sqlite). Ranks
                           and runs may share it, and it survives a kill
    LONGACT_JUDGE_KEY      sent as bearer token, if set. No redirect is followed, and no message shows it

Only text and numbers are judged, and of an answer only what follows "the answer is". Published code accepts a
"YES" anywhere in the reply, so an answer can bring its own. Here the reply must end with [[YES]]. An answer
that is long, or contains "[[" or "<|", is not sent. What else may be a control token for the endpoint, such
as </think>, also in question and right answer, is sent with a space in it, so that it is text.

A reply without a verdict counts as NO, but is not kept. An empty one is none: it is asked for again, as when
the judge does not answer.
"""

import functools
import hashlib
import http.client
import json
import os
import queue
import re
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from base.cli import BadInput
from prompts import rewards

# QwenLong-L1's.
SYSTEM = """You are an expert in verifying if two answers are the same.
Your input is a problem and two answers, Answer 1 and Answer 2. You need to check if they are equivalent.
Your task is to determine if two answers are equivalent, without attempting to solve the original problem.
Compare the answers to verify they represent identical values or meaning, \
even when written in different forms or notations.

Your output must follow the following format:
1) Provide an explanation for why the answers are equivalent or not.
2) Then provide your final answer in the form of: [[YES]] or [[NO]]
"""
USER = "\nProblem: {}\nAnswer 1: {}\nAnswer 2: {}\n"
JUDGED = (rewards.contains, rewards.numeric)
LONGEST = 300  # characters of an answer that is sent: a longer one argues with the judge
VERDICT = re.compile(r"\[\[(YES|NO)\]\][\s.*]*$")
LARGEST = 2**22  # bytes of a reply; a verdict is some hundred
REST = 60  # seconds until a judge that did not answer is asked again


def by_source(answer, row):
    """Answer text, row -> rewards.by_source's 1.0; where that gives 0.0, the judge's verdict: 1.0 if it finds
    the answer equivalent to any of row["answer"], else 0.0. Raises BadInput."""
    rule = rewards.by_source(answer, row)
    if rewards.SOURCES[rewards.source(row)] not in JUDGED:
        return rule
    problem, said = question(row), " ".join(rewards.stated_answer(answer).split())
    if rule == 1 or not said or len(said) > LONGEST or "[[" in said or "<|" in said:
        return rule
    golds = (rewards.stated_answer(gold) or gold for gold in rewards.golds(row))
    return float(any(judge().same(*map(as_text, (problem, said, gold))) for gold in golds))


def as_text(said):
    """A text in which no control token is spelled: a space follows each "<" that may begin one."""
    return re.sub(r"<(?=[|\uff5c/!\w])", "< ", said)


def question(row):
    """row["question"], or in DocQA's prompts the text between </text> and the request for a format. Raises
    BadInput if there is neither."""
    if "question" in row:
        return row["question"]
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    _, marker, rest = prompt.rpartition("</text>")
    problem, end, _ = rest.partition("Format your response as follows:")
    if not marker or not end:
        wanted = 'a prompt with "</text>" and "Format your response as follows:"'
        raise BadInput(f'the judge needs "question", or {wanted}')
    return problem.strip()


def check_reward():
    """Called by rewards.load_reward. Raises BadInput for wrong settings, and as Judge.check."""
    judge().check()


@functools.cache
def judge():
    """-> the Judge that the environment describes. Raises BadInput for a setting that is missing or wrong."""
    settings = {"away": "stop", "timeout": "60", "cache": "runs/judge.sqlite", "key": ""}
    for name in ("url", "model", *settings):
        settings[name] = os.environ.get(f"LONGACT_JUDGE_{name.upper()}", settings.get(name))
        if settings[name] is None:
            variable = f"LONGACT_JUDGE_{name.upper()}"
            raise BadInput(f"{variable} is not set; prompts/judge.py says what the judge needs")
    if settings["away"] not in ("stop", "rule"):
        raise BadInput(f"LONGACT_JUDGE_AWAY must be stop or rule, not {settings['away']!r}")
    timeout, url = settings["timeout"], settings["url"]
    try:
        settings["timeout"] = float(timeout)
    except ValueError as error:
        raise BadInput(f"LONGACT_JUDGE_TIMEOUT must be a number of seconds, not {timeout!r}") from error
    if not 0 < settings["timeout"] <= 86400:
        raise BadInput(f"LONGACT_JUDGE_TIMEOUT must be more than 0 and at most a day, not {timeout}")
    if "@" in url or "?" in url:  # it may be a secret, which is not shown
        raise BadInput("LONGACT_JUDGE_URL has a user or a query; a key goes into LONGACT_JUDGE_KEY")
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"LONGACT_JUDGE_URL must begin with http:// or https://, not {url!r}")
    if not _is_address(url):
        raise BadInput(f"LONGACT_JUDGE_URL must be http://HOST:PORT/v1 or the like, not {url!r}")
    if not (settings["key"].isascii() and settings["key"].isprintable()):
        raise BadInput("LONGACT_JUDGE_KEY has characters that a header cannot have, such as a line end")
    return Judge(**settings)


def _is_address(url):
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname and parts.port != 0 and url.isprintable() and " " not in url)
    except ValueError:  # brackets that do not close, a port that is not a number
        return False


def text(value):
    """A string of the endpoint's reply -> the same with "?" for unpaired surrogates, which UTF-8 cannot hold.
    Raises TypeError for anything but a string."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a string")
    return value.encode(errors="replace").decode()


class EmptyReply(Exception):
    """The endpoint has answered, but said nothing."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it could lead our key to another host."""

    def redirect_request(self, *_):
        return None


def within(seconds, function):
    """function() -> what it returns. Raises what it raises, and TimeoutError after `seconds`: limits of
    sockets are for each piece, so an answer that drips, or a slow name server, would take for ever. The
    thread that is left behind ends with its connection."""
    done = queue.SimpleQueue()

    def call():
        try:
            done.put((function(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("timed out") from None
    if error:
        raise error
    return result


@dataclass
class Judge:
    """One endpoint and its cache of verdicts. pauses: seconds to wait before each further try."""

    url: str
    model: str
    cache: str
    away: str = "stop"
    timeout: float = 60.0
    key: str = field(default="", repr=False)
    pauses: tuple = (1, 2, 4)
    resting_until: float = 0.0  # time.monotonic()

    def __post_init__(self):
        try:
            Path(self.cache).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"LONGACT_JUDGE_CACHE {self.cache} cannot be used: {error.strerror}") from error
        self._sql("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT, reply TEXT)")

    def _sql(self, statement, *values):
        """Run and commit a statement -> its first row, or None. Raises BadInput for an unusable file."""
        try:
            file = sqlite3.connect(self.cache, timeout=60)  # seconds to wait for another rank's write
            with closing(file), file:  # close it; commit
                return file.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise BadInput(f"LONGACT_JUDGE_CACHE {self.cache} cannot be used: {error}") from error

    def check(self):
        """Raises BadInput if the endpoint does not serve the model, or does not answer though away is
        "stop"."""
        served = self._ask("/models", None, lambda reply: [text(model["id"]) for model in reply["data"]])
        if served is not None and self.model not in served:
            raise BadInput(f"LONGACT_JUDGE_MODEL {self.model}: {self.url} serves {', '.join(served)}")

    def same(self, problem, answer, gold):
        """Whether the judge finds `answer` and `gold` equivalent. False also if its reply has no verdict, or
        if it does not answer and away is "rule". Raises BadInput."""
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": USER.format(problem, answer, gold)},
        ]
        request = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 512}
        body = json.dumps(request)
        key = hashlib.sha256(body.encode()).hexdigest()
        kept = self._sql("SELECT reply FROM replies WHERE key = ?", key)
        verdict = kept and VERDICT.search(str(kept[0]))
        if not verdict:
            reply = self._ask("/chat/completions", body, self._content)
            verdict = reply and VERDICT.search(reply)
            if verdict:
                self._sql("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", key, body, self._hide(reply))
        return bool(verdict) and verdict[1] == "YES"

    @staticmethod
    def _content(reply):
        content = reply["choices"][0]["message"]["content"]
        if not content:
            raise EmptyReply("its reply is empty")
        return text(content)

    def _ask(self, path, body, part):
        """-> part(the endpoint's reply, decoded from JSON); None if it does not answer and away is "rule".
        Raises BadInput if it refuses the request, answers in another form, or does not answer and away is
        "stop"."""
        if time.monotonic() < self.resting_until:
            return None
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url.rstrip("/") + path, body and body.encode(), headers)
        for pause in (0, *self.pauses):
            time.sleep(pause)
            try:
                status, reply = within(self.timeout, functools.partial(self._fetch, request))
                if status < 300:
                    return self._take(json.loads(reply), part)
                problem = f"HTTP {status}: {self._hide(reply.decode(errors='replace'))[:200]}"
                if 300 <= status < 400:
                    problem = f"HTTP {status}, a redirect: give LONGACT_JUDGE_URL the address it leads to"
                if status != 429 and status < 500:
                    raise BadInput(f"the judge at {self.url} refuses: {problem}")
            except BadInput:
                raise
            except (OSError, http.client.HTTPException, ValueError, RecursionError, EmptyReply) as error:
                problem = self._hide(str(error))  # no connection, cut off, too late, not JSON
        what = f"the judge at {self.url} does not answer: {problem}"
        if self.away == "stop":
            raise BadInput(f"{what}; LONGACT_JUDGE_AWAY=rule goes on without it")
        print(f"{what}; the rule alone scores for {REST} s", file=sys.stderr)
        self.resting_until = time.monotonic() + REST
        return None

    def _fetch(self, request):
        """-> HTTP status, body in bytes. Raises BadInput for one of more than LARGEST bytes."""
        until, body = time.monotonic() + self.timeout, b""
        try:
            response = urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error  # a response as well
        with response:
            while piece := response.read1(2**16):
                body += piece
                if len(body) > LARGEST:
                    raise BadInput(f"the judge at {self.url} answers with more than {LARGEST:,} bytes")
                if time.monotonic() > until:
                    raise TimeoutError("timed out")
        return response.status, body

    def _take(self, response, part):
        try:
            return part(response)
        except (KeyError, IndexError, TypeError) as error:
            shown = self._hide(str(response))[:200]
            raise BadInput(f"the judge at {self.url} answers in another form: {shown}") from error

    def _hide(self, said):
        """What the endpoint says, without our key, which it may repeat."""
        return said.replace(self.key, "[key]") if self.key else said
