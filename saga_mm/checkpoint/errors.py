"""The error of this package, and text that is safe to print."""


def printable(text: str) -> str:
    """Text with control characters written as escape sequences, so that no terminal obeys them."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


class CheckpointError(ValueError):
    """A checkpoint can't be used. The message is one printable line that names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
