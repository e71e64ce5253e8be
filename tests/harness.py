"""What the tests of the ops share."""

import itertools

import torch

# Largest RMS ratio of an error, by dtype.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def rms_ratio(value, exact):
    """Size of the error against the size of the exact value, in float64."""
    return ((value.double() - exact).norm() / exact.norm()).item()


def pairwise(**axes):
    """Few combinations that hold every pair of values, greedily chosen."""
    chosen = []
    cases = list(itertools.product(*axes.values()))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs.values())
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen
