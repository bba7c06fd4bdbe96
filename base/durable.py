"""Files and directories that no crash can tear: a path has the old contents or the new, whole and on disk."""

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
    """Wait until a file's contents, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path):
    """Context manager that makes or replaces a file: write to the path that it gives; when the block ends,
    the contents are at `path`. Raises BadInput when the disk cannot be written; then `path` is unchanged."""
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
    """Rename a complete directory `partial` to `directory`. An older one of that name is removed; for a
    moment in between there is none."""
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


def append(file, *rows):
    """Append dictionaries, one line each, to a JSONL file, and wait until they are on disk.

    file: opened for appending bytes, without a buffer, which would try to write again when the process ends.
    NaN and infinity, which JSON cannot represent, become null. Raises BadInput when the disk cannot be
    written.
    """
    lines = b""
    for row in rows:
        infinite = [
            key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)
        ]
        lines += (json.dumps(row | dict.fromkeys(infinite), allow_nan=False) + "\n").encode()
    try:
        while lines:
            lines = lines[file.write(lines) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{file.name} cannot be written: {error.strerror}") from error


def lock(directory):
    """Lock a directory for this process -> an open file that holds the lock. The system releases it when the
    process ends, however it ends. Raises BadInput if another process has the lock."""
    file = open(directory / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child process inherits it
    except BlockingIOError:
        raise BadInput(f"{directory}: another process is running there; wait for it, or stop it") from None
    return file


def sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(paths):
    """One SHA-256 of the bytes of several files, in this order, in hexadecimal."""
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(path)) for path in paths)).hexdigest()


def digest(content):
    """The first 16 hexadecimal digits of the SHA-256 of a text or bytes: an identity for what was hashed."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def json_lines(path):
    """A JSONL file -> [("line 3", "PATH, line 3", value), ...] of its lines that are not empty.

    Raises BadInput for a file that cannot be read or has no rows, for a line that is not JSON, and for text
    with an unpaired surrogate, which UTF-8 cannot hold.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold \u2028
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
