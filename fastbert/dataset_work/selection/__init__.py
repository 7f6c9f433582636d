"""`fastbert select`: the texts of a pool to label next."""
