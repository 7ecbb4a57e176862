"""How the program ends when it does not end by itself: in one line, with a documented exit code."""


class InputError(ValueError):
    """Something that was typed, configured or handed in cannot be right, or the machine gives no more.

    The message is a single line: what is wrong (the knob or the file), its value, and the way out.
    Scripts print it without a traceback and exit with code 2 (`cli.doorway`); any other exception
    is a fault of ours and keeps its traceback.
    """


class Stopped(Exception):
    """A run that was asked to stop: it finished its step and saved, and the same command goes on.

    Scripts print the message and exit with code 75 (EX_TEMPFAIL of sysexits.h: try again).
    """
