"""A language model as judge of what the rules give 0: --reward judge:by_source.

QwenLong-L1's reward is the larger of rule and judge. Any OpenAI-compatible endpoint will do, such as a second
vLLM:

    vllm serve Qwen2.5-1.5B-Instruct --port 8001
    LONGACT_JUDGE_URL=http://localhost:8001/v1 LONGACT_JUDGE_MODEL=Qwen2.5-1.5B-Instruct torchrun train.py \\
        --reward judge:by_source ...

Settings come from the environment: a reward is given an answer and a row, and torchrun hands the environment
to all ranks.

    LONGACT_JUDGE_URL      where it is, up to and with /v1
    LONGACT_JUDGE_MODEL    its name there
    LONGACT_JUDGE_AWAY     what to do when it does not answer: "stop" ends the run (default); "rule" goes on with the rule's
                           score and asks again a minute later. Then answers of one group may be scored in two
                           ways.
    LONGACT_JUDGE_TIMEOUT  seconds a request may take (60); it is tried four times, 1, 2 and 4 seconds apart
    LONGACT_JUDGE_CACHE    SQLite file that keeps every reply, on a local disk (runs/judge.sqlite); ranks and runs may share
                           it, and it survives a kill
    LONGACT_JUDGE_KEY      sent as bearer token, if set

Only text and numbers are judged, and of an answer only what follows "the answer is". Published code counts a
"YES" anywhere in the reply, so that an answer may bring its own; here the reply must end with [[YES]], and an
answer that is long, or has "[[" or "<|" in it, is not asked about: the endpoint reads <|im_end|> as the end
of what we say.
"""

import functools
import hashlib
import http.client
import json
import os
import re
import sqlite3
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from base.cli import BadInput
from prompts import rewards

# QwenLong-L1's.
SYSTEM = """You are an expert in verifying if two answers are the same.
Your input is a problem and two answers, Answer 1 and Answer 2. You need to check if they are equivalent.
Your task is to determine if two answers are equivalent, without attempting to solve the original problem.
Compare the answers to verify they represent identical values or meaning, even when written in different forms or notations.

Your output must follow the following format:
1) Provide an explanation for why the answers are equivalent or not.
2) Then provide your final answer in the form of: [[YES]] or [[NO]]
"""
USER = "\nProblem: {}\nAnswer 1: {}\nAnswer 2: {}\n"
JUDGED = (rewards.contains, rewards.numeric)
LONGEST = 300  # characters of an answer that is asked about: what is longer argues with the judge
VERDICT = re.compile(r"\[\[(YES|NO)\]\][\s.*]*$")
REST = 60  # seconds to leave a judge alone that did not answer


def by_source(answer, row):
    """rewards.by_source, or the judge's verdict on what it gives 0 (1.0 if any of row["answer"] is judged the
    same)."""
    rule = rewards.by_source(answer, row)
    if rewards.SOURCES[rewards.source(row)] not in JUDGED:
        return rule
    problem, said = question(row), " ".join(rewards.claim(answer).split())
    if rule == 1 or not said or len(said) > LONGEST or "[[" in said or "<|" in said:
        return rule
    same = (judge().same(problem, said, rewards.claim(gold) or gold) for gold in rewards.golds(row))
    return float(any(same))


def question(row):
    """row["question"], or what stands between </text> and the request for a format in DocQA's prompts."""
    if "question" in row:
        return row["question"]
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    _, marker, rest = prompt.rpartition("</text>")
    problem, end, _ = rest.partition("Format your response as follows:")
    if not marker or not end:
        raise BadInput(
            'the judge needs "question", or a prompt with "</text>" and "Format your response as follows:"'
        )
    return problem.strip()


def check_reward():
    judge().check()


@functools.cache
def judge():
    """The Judge that the environment describes. Raises BadInput for what is missing there."""
    settings = {"away": "stop", "timeout": "60", "cache": "runs/judge.sqlite", "key": ""}
    for name in ("url", "model", *settings):
        settings[name] = os.environ.get(f"LONGACT_JUDGE_{name.upper()}", settings.get(name))
        if settings[name] is None:
            raise BadInput(f"LONGACT_JUDGE_{name.upper()} is not set; judge.py says what the judge needs")
    if settings["away"] not in ("stop", "rule"):
        raise BadInput(f"LONGACT_JUDGE_AWAY must be stop or rule, not {settings['away']!r}")
    try:
        settings["timeout"] = float(settings["timeout"])
    except ValueError as error:
        raise BadInput(
            f"LONGACT_JUDGE_TIMEOUT must be a number of seconds, not {settings['timeout']!r}"
        ) from error
    if not 0 < settings["timeout"] <= 86400:
        raise BadInput(
            f"LONGACT_JUDGE_TIMEOUT must be more than 0 and at most a day, not {settings['timeout']:g}"
        )
    if not settings["url"].startswith(("http://", "https://")):
        raise BadInput(f"LONGACT_JUDGE_URL must begin with http:// or https://, not {settings['url']!r}")
    if not _is_address(settings["url"]):
        raise BadInput(f"LONGACT_JUDGE_URL must be http://HOST:PORT/v1 or the like, not {settings['url']!r}")
    if not (settings["key"].isascii() and settings["key"].isprintable()):
        raise BadInput("LONGACT_JUDGE_KEY has characters that a header cannot hold, such as a line end")
    return Judge(**settings)


def _is_address(url):
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname and parts.port != 0 and url.isprintable() and " " not in url)
    except ValueError:  # brackets that do not close, a port that is no number
        return False


def text(value):
    """A text of the endpoint's, without half characters, which no file holds. Raises TypeError for anything
    else."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return value.encode(errors="replace").decode()


@dataclass
class Judge:
    """One endpoint with its cache. pauses: seconds to wait before each further try."""

    url: str
    model: str
    cache: str
    away: str = "stop"
    timeout: float = 60.0
    key: str = ""
    pauses: tuple = (1, 2, 4)
    resting_until: float = 0.0  # time.monotonic()

    def __post_init__(self):
        try:
            Path(self.cache).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"LONGACT_JUDGE_CACHE {self.cache} cannot be used: {error.strerror}") from error
        self._sql("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT, reply TEXT)")

    def _sql(self, statement, *values):
        """Runs and commits a statement -> its first row, or None. Raises BadInput when the file cannot be
        used."""
        try:
            with (
                closing(sqlite3.connect(self.cache, timeout=60)) as file,
                file,
            ):  # seconds to wait for another rank's write
                return file.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise BadInput(f"LONGACT_JUDGE_CACHE {self.cache} cannot be used: {error}") from error

    def check(self):
        """Raises BadInput when the endpoint does not serve the model; when it is away, unless that is
        allowed."""
        listed = self._ask("/models", None)
        served = (
            [self.model]
            if listed is None
            else self._take(listed, lambda r: [text(model["id"]) for model in r["data"]])
        )
        if self.model not in served:
            raise BadInput(f"LONGACT_JUDGE_MODEL {self.model}: {self.url} serves {', '.join(served)}")

    def same(self, problem, answer, gold):
        """Are the two answers the same? False also when the reply has no verdict, or the judge is away and
        may be."""
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": USER.format(problem, answer, gold)},
        ]
        request = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 512}
        body = json.dumps(request)
        key = hashlib.sha256(body.encode()).hexdigest()
        kept = self._sql("SELECT reply FROM replies WHERE key = ?", key)
        if not kept:
            response = self._ask("/chat/completions", body)
            if response is None:
                return False
            kept = (self._take(response, lambda r: text(r["choices"][0]["message"]["content"] or "")),)
            self._sql("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", key, body, *kept)
        verdict = VERDICT.search(str(kept[0]))
        return bool(verdict) and verdict[1] == "YES"

    def _take(self, response, part):
        try:
            return part(response)
        except (KeyError, IndexError, TypeError) as error:
            raise BadInput(
                f"the judge at {self.url} answers in another form: {str(response)[:200]}"
            ) from error

    def _ask(self, path, body):
        """-> the endpoint's answer, decoded; None when it is away and may be. Raises BadInput when it refuses
        a request."""
        if time.monotonic() < self.resting_until:
            return None
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self.key}"} if self.key else {}),
        }
        request = urllib.request.Request(self.url.rstrip("/") + path, body and body.encode(), headers)
        for pause in (0, *self.pauses):
            time.sleep(pause)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise BadInput(f"the judge at {self.url} refuses: {problem}") from error
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                problem = error  # no connection, cut off, no JSON
        if self.away == "stop":
            raise BadInput(
                f"the judge at {self.url} does not answer: {problem}; LONGACT_JUDGE_AWAY=rule goes on without it"
            )
        print(
            f"the judge at {self.url} does not answer: {problem}; the rule alone scores for {REST} s",
            file=sys.stderr,
        )
        self.resting_until = time.monotonic() + REST
        return None
