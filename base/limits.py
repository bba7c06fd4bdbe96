"""Files that a user names, opened with limits. A FIFO or a device would keep a program waiting, or never end.

What opens a file raises OSError, as open() does, for what is no regular file and for one that is too large.
"""

import errno
import json
import os
import stat

LARGEST_TEXT = 2**28  # bytes of a file that is read as a whole; Qwen3's tokenizer.json has 11 million
LONGEST_LINE = 2**24  # bytes of a row, some 4 million tokens; LongBench v2's longest text has 8 million
DEEPEST = 100  # lists and objects within each other


def opened(path, most=None):
    """-> a regular file of at most `most` bytes (None: any number), open for reading bytes."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    status = os.fstat(file.fileno())
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = errno.EINVAL, "It is a FIFO or a device, not a regular file"
    elif most is not None and status.st_size > most:
        problem = errno.EFBIG, f"It has {status.st_size:,} bytes, and may have {most:,}"
    if problem:
        file.close()
        raise OSError(*problem, str(path))
    return file


def check(path, most=None):
    """Raises OSError as `opened`. For files that a library opens by their path."""
    opened(path, most).close()


def read_text(path, most=LARGEST_TEXT):
    """-> the text of a UTF-8 file. Raises UnicodeDecodeError, a ValueError, for other bytes."""
    with opened(path, most) as file:
        return file.read().decode("utf-8")


def parse_json(text):
    """-> the value of a JSON text. Raises ValueError for another text, and for values nested too deep, which
    cannot be copied or written again; RecursionError for some of these."""
    value = json.loads(text)
    level = [value]
    for _ in range(DEEPEST):
        level = [item for each in level if isinstance(each, (dict, list)) for item in _items(each)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _items(value):
    return value.values() if isinstance(value, dict) else value
