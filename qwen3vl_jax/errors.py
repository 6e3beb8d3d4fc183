"""The one exception for what a user gave: a file, an argument, a checkpoint."""


class InputError(ValueError):
    """A one-line message that names the thing, what was expected, what was found, what to do."""
