"""Helpers of the tests of the ops."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys

import torch

# Largest RMS ratio of an error, by dtype.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def rms_ratio(value, exact):
    """The norm of the error divided by the norm of the exact value, in float64."""
    return ((value.double() - exact).norm() / exact.norm()).item()


def capture(step):
    """Record the work of a function on a GPU; return the CUDA graph, and the function's result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def pairwise(**axes):
    """A small set of combinations with every pair of values, chosen greedily."""
    chosen = []
    cases = list(itertools.product(*axes.values()))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs.values())
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


PEAK_SCRIPT = """
import torch
from torch.profiler import ProfilerActivity, profile
{setup}
with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
    out = {call}
events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
live = peak = 0
for event in sorted(events, key=lambda e: e.start_ns()):
    live += event.nbytes()
    peak = max(peak, live)
print(peak / (out.numel() * out.element_size()))
"""


def peak_memory(setup, call):
    """Peak memory of tensors in a call without gradients, output included, in units of the output.

    The call runs in a process of its own, after some lines of code.
    """
    command = [sys.executable, '-c', PEAK_SCRIPT.format(setup=setup, call=call)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def other_process(context, *arguments):
    """Hold a context in a child process, which is killed at the end. Yields the id of the child."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with context(*arguments):
            os.write(write, b'x')
            signal.pause()
    try:
        os.read(read, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
