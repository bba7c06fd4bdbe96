"""Files and directories that no crash can tear: a path has the old contents or the new, whole and on disk."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import stat

from base import limits
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
        partial.unlink(missing_ok=True)  # it may be a link, whose target is not ours
        yield partial
        set_usual_mode(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def set_usual_mode(path):
    """Give a file the mode of any new file; safetensors makes its files readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write(path, text):
    """Make or replace a small file. Raises BadInput as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_json(path, value):
    """Make or replace a JSON file. Raises BadInput as `replacing`."""
    write(path, json.dumps(value, indent=2) + "\n")


def remove(path):
    """Remove a file, a link or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def new_directory(path):
    """Make an empty directory in place of what a killed process left there -> path."""
    remove(path)
    path.mkdir(parents=True)
    return path


def publish(partial, directory):
    """Rename a complete directory `partial` to `directory`. An older one of that name is removed; for a
    moment in between there is none."""
    for path in partial.iterdir():
        set_usual_mode(path)
        sync(path)
    sync(partial)
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        remove(old)
        os.replace(directory, old)
    os.replace(partial, directory)
    sync(directory.parent)
    remove(old)


def put_back(directory):
    """After a crash in `publish`: if it was just then that there was no `directory`, the old one again."""
    old = directory.with_name(directory.name + ".old")
    if old.exists() and not directory.exists():
        os.replace(old, directory)
        sync(directory.parent)


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


def claim(directory, kind, marks, flag="--out"):
    """Make a directory, or enter one of the same kind, and lock it for this process -> the open file `lock`,
    in which the kind stands. The system releases the lock when the process ends, however it ends.

    kind: what this program writes, such as "evaluation". marks: files of which one tells the kind where
    `lock` does not (older than 2026-11-26, or removed). flag: what the message says to change. Raises
    BadInput, with nothing written, if the directory is of another kind or somebody's, if another process has
    the lock, or if the disk cannot be written or has no locks.
    """
    not_ours = f"{directory} is not empty and holds no {kind} ({' or '.join(marks)}); choose another {flag}"
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists() and is_foreign(directory, marks):
            raise BadInput(not_ours)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        problem = f"{directory} cannot be written: {error.strerror}"
        raise BadInput(f"{problem}; choose another {flag}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise BadInput(f"{path} is no file; remove it")
    file = open(descriptor, "r+", encoding="utf-8", errors="replace")
    if not try_lock(file, directory):
        raise BadInput(f"{directory}: another process is running there; wait for it, or stop it")
    there = file.read(100).strip()
    if set(os.listdir(directory)) != {"lock"}:  # else whatever it was to be, nothing came of it
        if there not in ("", kind):
            raise BadInput(f"{directory} holds another kind: {there}, not {kind}; choose another {flag}")
        if not there and is_foreign(directory, marks):
            raise BadInput(not_ours)
    if there != kind:
        file.seek(0)
        file.truncate()
        file.write(kind + "\n")
        file.flush()
        os.fsync(descriptor)  # not `sync`: a second descriptor would release the lock when it is closed
    return file


def is_foreign(directory, marks):
    """Whether a directory has something in it, and none of the files `marks`."""
    names = set(os.listdir(directory)) - {"lock"}
    return bool(names) and names.isdisjoint(marks)


def try_lock(file, directory):
    """Lock an open file in `directory` for this process -> False if another has it locked. Raises BadInput on
    a disk without locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child process inherits it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        problem = (
            f"{directory} is on a disk without locks ({error.strerror}): two processes could write there"
        )
        fix = "choose a directory on another disk, or mount it with locks (NFS: lockd, Lustre: -o flock)"
        raise BadInput(f"{problem}; {fix}") from error
    return True


def sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with limits.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(paths):
    """One SHA-256 of the bytes of several files, in this order, in hexadecimal."""
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(path)) for path in paths)).hexdigest()


def digest(content):
    """The first 16 hexadecimal digits of the SHA-256 of a text or bytes: an identity for what was hashed."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def json_lines(path):
    """A JSONL file -> [("line 3", "PATH, line 3", value), ...] of its lines that are not empty.

    Raises BadInput for a file that cannot be read or has no rows, for a line that is too long or not JSON,
    and for text with an unpaired surrogate, which UTF-8 cannot hold.
    """
    rows = []
    try:
        with limits.opened(path) as file:
            for number in itertools.count(1):
                line = file.readline(limits.LONGEST_LINE + 1)
                if not line:
                    break
                where = f"{path}, line {number}"
                if len(line) > limits.LONGEST_LINE:
                    raise BadInput(f"{where} has more than {limits.LONGEST_LINE:,} bytes")
                if line.strip():
                    rows.append((f"line {number}", where, json_line(line, where)))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not rows:
        raise BadInput(f"{path} has no rows")
    return rows


def json_line(line, where):
    """A line's bytes -> its value. Raises BadInput as json_lines; `where` names the line."""
    try:
        value = limits.parse_json(line.decode())
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadInput(f"{where} is not valid text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not JSON: {error}") from error
    return value


def read_object(path):
    """A file with one JSON object -> dict. Raises BadInput for a file that is missing or holds something
    else."""
    try:
        value = limits.parse_json(limits.read_text(path))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} cannot be used: it is not a JSON object")
    return value
