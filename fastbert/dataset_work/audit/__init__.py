"""`fastbert audit`: labels that are likely wrong, duplicates, agreement of annotators, and the worth of more labels."""
