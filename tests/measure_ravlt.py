"""Compare peak memory and time of RAVLT with those of its plain formulas, in inference on a CPU.

python tests/measure_ravlt.py --arch tiny --size 1280 1280

Each repetition of each model runs in a process of its own, and the two models take turns. Memory is
the peak of the resident set of the process (`getrusage`) minus its size before the image, at which
libraries and weights are loaded and a warm-up on 64 x 64 pixels has run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from published_ravlt import Published

from saga_mm.backbones import RAVLT

SIDES = {
    'saga_mm.RAVLT': RAVLT,
    'formulas': lambda name: Published(
        **{key: getattr(RAVLT.arch_settings[name], key) for key in Published.FIELDS}
    ),
}


def peak():
    """Peak of the resident set, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side, arch, size):
    torch.manual_seed(0)
    model = SIDES[side](arch).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        x = torch.randn(1, 3, *size)
        before, start = peak(), time.perf_counter()
        model(x)
        return peak() - before, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', default='tiny', choices=RAVLT.arch_settings)
    parser.add_argument('--size', type=int, nargs=2, default=(1280, 1280), metavar=('H', 'W'))
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.arch, args.size)))
        return
    results = {side: [] for side in SIDES}
    for _ in range(args.repeat):
        for side, runs in results.items():
            command = [sys.executable, '-W', 'ignore', *sys.argv, '--side', side]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(out.splitlines()[-1]))
    height, width = args.size
    print(
        f'RAVLT, {args.arch}, one image of {height} x {width}, fp32, {torch.get_num_threads()} '
        f'threads, torch {torch.__version__}, medians of {args.repeat}'
    )
    print('| | peak memory (MiB) | time (s) |\n|---|---|---|')
    medians = {
        side: [statistics.median(column) for column in zip(*runs, strict=True)]
        for side, runs in results.items()
    }
    for side, (memory, seconds) in medians.items():
        print(f'| {side} | {memory:.0f} | {seconds:.2f} |')
    ratios = [b / a for a, b in zip(*medians.values(), strict=True)]
    print('| formulas / saga_mm.RAVLT | {:.2f} | {:.2f} |'.format(*ratios))


if __name__ == '__main__':
    main()
