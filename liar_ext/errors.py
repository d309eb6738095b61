"""The one exception for input that cannot be used, and how errors of others are quoted."""


class InputError(ValueError):
    """Input that breaks a rule: operation, rule, what came, what to do.

    The command line turns it into one line and exit code 2; any other exception is a defect of
    ours and keeps its traceback.
    """


def one_line(error: BaseException, length: int = 300) -> str:
    """Return what an error says as one line, cut after ``length`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."
