"""Files that a user names, opened with limits. A FIFO or a device would keep a program waiting, or never end.

Each function raises OSError, as open() does, for what is no regular file and for one that is too large.
"""

import errno
import os
import stat

LARGEST_TEXT = 2**28  # bytes of a file that is read as a whole; Qwen3's tokenizer.json has 11 million


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
