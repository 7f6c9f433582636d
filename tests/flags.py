"""Command lines for tests, in which flags of a test's own stand behind common ones and replace them."""

from fastbert import cli


def last_given(arguments: list[str]) -> list[str]:
    """Of each flag that stands there twice, the last with its value; fastbert itself refuses such a line."""
    out: list[str] = []
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            dropped = index > 0 and arguments[index - 1].startswith("--") and arguments[index - 1] in arguments[index:]
            out += [] if dropped else [argument]
        elif argument not in arguments[index + 1 :]:
            out.append(argument)
    return out


def main(arguments: list[str]) -> int:
    """As `fastbert.cli.main`."""
    return cli.main(last_given(arguments))
