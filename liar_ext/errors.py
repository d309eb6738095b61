"""The one exception for input that cannot be used."""


class InputError(ValueError):
    """Input that breaks a rule: operation, rule, what came, what to do.

    The command line turns it into one line and exit code 2; any other exception is a defect of
    ours and keeps its traceback.
    """
