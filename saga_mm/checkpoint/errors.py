"""The error of this package, and text from a file that is safe to show."""


def printable(text: str) -> str:
    """Text with an escape sequence in the place of each character that a terminal would obey."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


class CheckpointError(ValueError):
    """A checkpoint can't be used. The message is one printable line that names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
