"""Files and directories that no crash can tear: what is at a path is the old or the new, as a whole, and it
is on disk."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

from base.cli import BadInput


def sync(path):
    """Have what is in a file, or which names are in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path):
    """Make or replace a file: what is written to the path this gives is at `path` when the block ends. Raises
    BadInput when the disk does not take it; then `path` is as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def write(path, text):
    """Make or replace a small file. Raises BadInput as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_json(path, value):
    """Make or replace a JSON file. Raises BadInput as `replacing`."""
    write(path, json.dumps(value, indent=2) + "\n")


def publish(partial, directory):
    """Give a directory, which is whole, its name. One that has the name is removed; nobody has it for the
    moment between."""
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(directory, old)
    os.replace(partial, directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def append(file, row):
    """One more line of a JSONL file, open for appending bytes without a buffer, which would try again at the
    process's end. JSON has no NaN and no infinity: null instead. Raises BadInput when the disk does not take
    it."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    line = (json.dumps(finite, allow_nan=False) + "\n").encode()
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{file.name} cannot be written: {error.strerror}") from error


def lock(directory):
    """-> an open file. The system drops its lock when this process ends, however it does. Raises BadInput if
    another process has it."""
    file = open(directory / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child process inherits it
    except BlockingIOError:
        raise BadInput(f"{directory}: another process is running there; wait for it, or stop it") from None
    return file


def digest(content):
    """The first 16 hexadecimal digits of the SHA-256 of a text or bytes: tells whether something is the same."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def digest_of_files(paths):
    """The SHA-256, in hexadecimal, of the SHA-256s of the files' bytes, in the order given."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def json_lines(path):
    """[("line 3", "PATH, line 3", value), ...] of a JSONL file's lines that are not empty. Raises BadInput
    for a file that cannot be read or has no rows, a line that is not JSON and text that is not valid."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON strings may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not JSON: {error}") from error
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{where} is not valid text: {error}") from error
        rows.append((f"line {number}", where, value))
    if not rows:
        raise BadInput(f"{path} has no rows")
    return rows
