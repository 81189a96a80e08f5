"""What an exception of another library says, in one line, for a message of ours."""


def reason(error: BaseException) -> str:
    """Returns the first line of the message of `error`, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
