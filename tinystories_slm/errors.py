"""Exceptions that end a script with a one-line message and a documented exit code."""


class UserError(ValueError):
    """An invalid option, configuration or input file, or a resource that the machine lacks.

    The message is a single line: the option or file, its value, and a fix. Scripts print it without a
    traceback and exit with code 2 (`cli.run_command`). Any other exception is a bug and keeps its traceback.
    """


PROCESS_LOST_EXIT_CODE = 69
"""EX_UNAVAILABLE of sysexits.h."""


class ProcessLost(Exception):
    """Another process of the launch died or does not answer; saved files are intact.

    Scripts print the message and exit with code 69. Started again, the run resumes its newest checkpoint.
    """


class TrainingInterrupted(Exception):
    """A run stopped on request: it finished its step and saved; the same command resumes it.

    Scripts print the message and exit with code 75 (EX_TEMPFAIL of sysexits.h: try again).
    """
