"""`fastbert run`: one graph of jobs from text to a table of results."""
