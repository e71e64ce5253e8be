"""The kernels compile for GPUs that need not be here, within what those GPUs have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')

TOOL = Path(__file__).parents[2] / 'tools' / 'compile_kernels.py'
# Bytes of shared memory per program: a consumer GPU has less than those compiled for.
SHARED = {'sm_80': 99 * 1024, 'sm_90': 99 * 1024, 'sm_100': 99 * 1024, 'gfx942': 64 * 1024}
# Registers per thread in half precision, D = 64: a few more than Triton 3.6, 3.7 and 3.9 take.
CEILINGS = {
    ('sm_80', 'gated', 'kv_forward'): 144,
    ('sm_80', 'gated', 'out_forward'): 112,
    ('sm_80', 'gated', 'q_backward'): 255,
    ('sm_80', 'gated', 'kv_backward'): 144,
    ('sm_90', 'gated', 'kv_forward'): 144,
    ('sm_90', 'gated', 'out_forward'): 128,
    ('sm_90', 'gated', 'q_backward'): 176,
    ('sm_90', 'gated', 'kv_backward'): 152,
    ('sm_80', 'rank_augmented', 'mean_forward'): 64,
    ('sm_80', 'rank_augmented', 'kv_forward'): 144,
    ('sm_80', 'rank_augmented', 'merge'): 64,
    ('sm_80', 'rank_augmented', 'out_forward'): 128,
    ('sm_80', 'rank_augmented', 'state_backward'): 255,
    ('sm_80', 'rank_augmented', 'kv_backward'): 168,
    ('sm_80', 'rank_augmented', 'q_backward'): 144,
    ('sm_90', 'rank_augmented', 'mean_forward'): 64,
    ('sm_90', 'rank_augmented', 'kv_forward'): 144,
    ('sm_90', 'rank_augmented', 'merge'): 64,
    ('sm_90', 'rank_augmented', 'out_forward'): 112,
    ('sm_90', 'rank_augmented', 'state_backward'): 176,
    ('sm_90', 'rank_augmented', 'kv_backward'): 184,
    ('sm_90', 'rank_augmented', 'q_backward'): 144,
    ('sm_80', 'decay', 'state_forward'): 216,
    ('sm_80', 'decay', 'scan'): 184,
    ('sm_80', 'decay', 'out_forward'): 255,
    ('sm_80', 'decay', 'state_backward'): 224,
    ('sm_80', 'decay', 'token_backward'): 248,
    ('sm_90', 'decay', 'state_forward'): 168,
    ('sm_90', 'decay', 'scan'): 184,
    ('sm_90', 'decay', 'out_forward'): 216,
    ('sm_90', 'decay', 'state_backward'): 176,
    ('sm_90', 'decay', 'token_backward'): 248,
}


@pytest.fixture(scope='module')
def rows():
    # Compiled in a process of its own, for this one may interpret kernels.
    command = [sys.executable, str(TOOL), '--quick', '--json']
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_every_kernel_and_every_target(rows):
    assert len(rows) <= 64
    compiled = {(row['target'], row['op'], row['kernel']) for row in rows}
    assert compiled >= set(CEILINGS)
    assert {target for target, *_ in compiled} == set(SHARED)


def test_shared_memory_fits(rows):
    too_large = [row for row in rows if row['shared'] > SHARED[row['target']]]
    assert not too_large


def test_half_precision_spills_nothing_up_to_64_channels(rows):
    half = [
        row
        for row in rows
        if row['dtype'] != 'fp32' and row['D'] <= 64 and row['target'] in ('sm_80', 'sm_90')
    ]
    assert len(half) >= 16
    assert not [row for row in half if row['stack']]


def test_register_ceilings(rows):
    for row in rows:
        ceiling = CEILINGS.get((row['target'], row['op'], row['kernel']))
        if ceiling and row['dtype'] == 'bf16':
            assert row['registers'] <= ceiling, row
