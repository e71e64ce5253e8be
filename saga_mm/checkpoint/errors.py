"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint can't be used. The message is one line that names the file."""
