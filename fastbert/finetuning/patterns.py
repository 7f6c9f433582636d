"""Regular expressions in the user's files."""

import re
import warnings

from fastbert.errors import UserError, brief


def compile_pattern(pattern: str, flags: int = 0) -> re.Pattern:
    """The compiled pattern.

    Raises:
        UserError: it is not a regular expression of Python's re.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of sets such as [[a], which may have another meaning one day
            return re.compile(pattern, flags)
    except re.error as error:
        reason = error.msg + ("" if error.pos is None else f" at character {error.pos + 1}")
    except (OverflowError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"the pattern {brief(pattern)} is not a regular expression: {reason}; fix it")
