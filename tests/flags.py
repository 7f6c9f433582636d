"""Command lines for tests, in which flags of a test's own stand behind common ones and replace them."""

from fastbert import cli


def last_given(arguments: list[str]) -> list[str]:
    """Of each flag that stands there twice, the last with its value; fastbert itself refuses such a line."""
    out: list[str] = []
    for place, argument in enumerate(arguments):
        if not argument.startswith("--"):
            dropped = place > 0 and arguments[place - 1].startswith("--") and arguments[place - 1] in arguments[place:]
            out += [] if dropped else [argument]
        elif argument not in arguments[place + 1 :]:
            out.append(argument)
    return out


def main(arguments: list[str]) -> int:
    """As `fastbert.cli.main`."""
    return cli.main(last_given(arguments))
