"""The formula that kappas of agreement have in common."""


def kappa(observed: float, expected: float) -> float | None:
    """(p_o - p_e) / (1 - p_e), with the observed agreement p_o and the agreement by chance p_e; None, undefined, if
    that is 1."""
    return None if expected >= 1.0 else (observed - expected) / (1.0 - expected)
