"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Something that was typed, configured or handed in cannot be right.

    The message is a single line: what is wrong (the knob or the file), its value, and the way out.
    Scripts print it without a traceback and exit with code 2 (`cli.doorway`); any other exception
    is a fault of ours and keeps its traceback.
    """
