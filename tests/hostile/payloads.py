"""Shared by the tests of damaged and hostile files: what a refusal looks like, and random damage."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import strategies as st

from utils import UserError


def assert_in_words(message, *words, most=600):
    """One or two lines that fit a terminal and do nothing to it."""
    lines = message.split("\n")
    assert 1 <= len(lines) <= 2, message
    assert all(line.isprintable() for line in lines), message
    assert len(message) <= most, len(message)
    assert all(word in message for word in words), message


def refusal(read, *arguments):
    """The message with which a reader refuses a file, or None if it accepts it; other errors are failures."""
    try:
        read(*arguments)
    except UserError as error:
        assert_in_words(str(error))
        return str(error)
    return None


def names(folder):
    """Everything below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


NO_FILE = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.fixture
def no_endless_read():
    """Ends a read that never returns, with an exception that no reader catches."""

    def give_up(*_):
        raise SystemExit("read for a minute")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "repeat"]),
        st.integers(0, 10**6),
        st.integers(1, 60),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)


def edited(content, edits):
    """Bytes after edits (kind, position, length, byte): overwritten, inserted, deleted or repeated."""
    content = bytearray(content)
    for kind, position, length, byte in edits:
        start = position % (len(content) + 1)
        part = content[start : start + length]
        new = {"flip": bytes(b ^ byte for b in part[:1]), "insert": part + bytes([byte]), "delete": b""}
        content[start : start + (1 if kind == "flip" else length)] = new.get(kind, part + part)
    return bytes(content)
