"""Verdicts and the comparisons they rest on, for studies and reports alike; free of torch."""
