"""Compile the kernels for GPUs that need not be here, and print what they take from one.

    python tools/compile_kernels.py > docs/benchmarks/kernels.md    the table of that page
    python tools/compile_kernels.py --quick --json                  what `make test` compiles
    python tools/compile_kernels.py --all                           all of them; takes long

Nothing is run, and nothing here says how fast a kernel is. Triton caches what it has compiled.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor

# Both are read when Triton is imported. The default of the second changes with Triton 3.10.
os.environ.pop('TRITON_INTERPRET', None)
os.environ['TRITON_DEFAULT_FP_FUSION'] = '1'

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saga_kernels.launch import (
    ATTENTION_CHANNELS,
    ATTENTION_HEAD_DIM,
    DEPTHWISE_CHANNELS,
    DEPTHWISE_COLUMNS,
    FFN_CHANNELS,
    FFN_HIDDEN,
    KERNELS,
    MERGED,
    WKV_CHANNELS,
    WKV_STEPS,
    alignment,
    compile_options,
    decay_chunk,
    padded_dim,
    product_precision,
    tile_config,
)

TARGETS = {
    'sm_80': GPUTarget('cuda', 80, 32),
    'sm_90': GPUTarget('cuda', 90, 32),
    'sm_100': GPUTarget('cuda', 100, 32),
    'gfx942': GPUTarget('hip', 'gfx942', 64),
}
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
KEY = ('op', 'dtype', 'D', 'kernel', 'block', 'warps')
CASES = [(op, kernel) for op, kernels in KERNELS.items() for kernel in kernels]
FP32_POINTERS = (
    'p_partial', 'p_state', 'p_dstate', 'p_frequencies', 'p_query', 'p_dquery', 'p_weight',
    'p_total', 'p_decay', 'p_other', 'p_r', 'p_delta', 'p_w', 'p_u', 'p_enter', 'p_denter',
    'p_count', 'p_earlier', 'p_later', 'p_dlater', 'p_bias', 'p_b1', 'p_b2', 'p_gamma', 'p_in_bias',
    'p_taps', 'p_taps_bias', 'p_gate_bias', 'p_proj_bias', 'p_z', 'p_table',
)  # fmt: skip

HEADER = """# Registers and shared memory of the kernels

The table was printed by `python tools/compile_kernels.py --op {ops}` with Triton
{triton}. The kernels were compiled and not run, so the table does not say how fast a kernel is.

Each cell lists the registers per thread, the bytes of stack per thread if there are any, and the
shared memory of a program. Stack nearly always means spilled registers: the kernel is correct, but
slower than it could be. The tile is the number of tokens that a program processes at a time; for
`merge` it is the number of partial states, and for `scan` that of chunks. `wkv` has no head dim: it
takes any number of channels, as it takes 32. So does `depthwise`, whose tile is a number of rows,
here with filters of 3 x 3. For `ffn`, `layer_norm` and `gated_attention`, D is the number of
channels, and a head of the latter has up to 64. `gated` and `gated_attention` are compiled with
gates and ELU. No kernel is compiled with a mask.
"""


def kernel(op, phase):
    return getattr(importlib.import_module(f'saga_kernels.{op}.kernel'), phase)


def compile_case(target, op, phase, dtype, dim, *, gated=True, elu=True, masked=False, side=3):
    """Compile one kernel as a launch would, and return a row of the table."""
    function = kernel(op, phase)
    block, num_warps = tile_config(op, phase, DTYPES[dtype], dim)
    constants = dict(
        D=dim, BD=padded_dim(dim), BN=block, BE=MERGED, L=decay_chunk(DTYPES[dtype], dim),
        ALIGN=alignment(dim),
        GATED=gated, PARTS=5 if gated else 3, ELU=elu,
        PRECISION=product_precision(dim, nvidia=target.startswith('sm')),
    )  # fmt: skip
    if op == 'wkv':
        constants |= dict(BC=WKV_CHANNELS[phase], G=block // WKV_STEPS, L=WKV_STEPS)
    if op == 'depthwise':
        constants |= dict(K=side, BW=DEPTHWISE_COLUMNS[side], BC=DEPTHWISE_CHANNELS)
        constants |= dict(RESIDUAL=gated)
    if op in ('layer_norm', 'ffn'):
        constants['BD'] = max(32, padded_dim(dim))
    if op == 'gated_attention':
        heads = min(dim, ATTENTION_HEAD_DIM)
        constants |= dict(
            HEADS=dim // heads, D=heads, BD=padded_dim(heads), BC=max(32, padded_dim(dim)), K=side
        )
        if not gated:
            constants |= dict.fromkeys(('p_gate', 'p_gate_bias', 'p_gamma'))
    if op == 'ffn':
        constants['BF'] = FFN_HIDDEN[DTYPES[dtype].itemsize, constants['BD']]
        if not gated:
            constants['p_gamma'] = None
    if not masked:
        constants['p_mask'] = None
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = 'constexpr'
        elif name.startswith('p_'):
            special = {'p_mask': 'i1'} | dict.fromkeys(FP32_POINTERS, 'fp32')
            signature[name] = '*' + special.get(name, dtype)
        else:
            signature[name] = 'fp32' if name.endswith('eps') else 'i32'
    attributes = {
        (index,): [['tt.divisibility', 16]]
        for index, name in enumerate(function.arg_names)
        if name.startswith('p_') and name not in constants
    }
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=TARGETS[target],
        options=compile_options(num_warps, amd=target.startswith('gfx')),
    )
    return dict(
        target=target, op=op, kernel=phase, dtype=dtype, D=dim, gated=gated, elu=elu,
        masked=masked, block=block, warps=num_warps, **resources(compiled, target),
        **loop_counts(compiled, target, block, num_warps, dim),
        shared=compiled.metadata.shared, specialized=specialized(function),
    )  # fmt: skip


def specialized(function):
    """Numbers for whose values Triton compiles a kernel anew."""
    return [
        param.name
        for param in function.params
        if not param.is_constexpr and not param.do_not_specialize
        if not param.name.startswith('p_') and not param.name.endswith('eps')
    ]


def resources(compiled, target):
    if target.startswith('sm'):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compiled.asm['cubin'])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = r'REG:(\d+)', r'STACK:(\d+)'
    else:
        text = compiled.asm['amdgcn']
        registers, stack = r'\.vgpr_count:\s+(\d+)', r'\.private_segment_fixed_size:\s+(\d+)'
    return dict(registers=int(re.search(registers, text)[1]), stack=int(re.search(stack, text)[1]))


def loop_counts(compiled, target, block, num_warps, dim):
    """What the longest loop of a kernel takes, for NVIDIA GPUs: instructions of a warp per token,
    results of the special-function unit (exp2, rsqrt, reciprocals) per token and channel, whether
    the loop touches local memory, where spilled registers are, and the bytes of its loads from
    global memory, by thread."""
    if not target.startswith('sm'):
        return {}
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, '-c', file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels, instructions, loop = {}, [], []
    for line in text.splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r'\s*/\*[0-9a-f]+\*/\s+(.*?);', line):
            instructions.append(instruction[1])
            # A branch back to a label ends a loop.
            target_label = re.search(r'BRA.*(\.L_x_\d+)', instruction[1])
            start = labels.get(target_label[1]) if target_label else None
            if start is not None and len(instructions) - start > len(loop):
                loop = instructions[start:]
    special = sum('MUFU' in instruction for instruction in loop)
    return dict(
        instructions=round(len(loop) * num_warps / block, 1),
        special=round(special * 32 * num_warps / (block * dim), 2),
        loads=sorted(
            {width(load[1]) for line in loop if (load := re.search(r'\bLDG(?:STS)?(\.\S*)', line))}
        ),
        local=any(re.search(r'\b(LDL|STL)\b', instruction) for instruction in loop),
    )


def width(suffixes):
    """Bytes that a load with these suffixes moves to one thread."""
    sizes = dict(U8=1, S8=1, U16=2, S16=2) | {'64': 8, '128': 16}
    return next((sizes[suffix] for suffix in suffixes.split('.') if suffix in sizes), 4)


def quick_cases():
    """At most 108: every kernel in half precision at D = 64 for the GPUs that must not spill, the
    gated ones with a mask, two with a head dim that 16 does not divide, the one that takes most
    shared memory, the largest filter, the widest norm, `ffn` for all GPUs, the cases of
    `gated_attention` that come closest to spilling, and all once more with everything else
    different, for one GPU after the other."""
    for (op, phase), target in itertools.product(CASES, ('sm_80', 'sm_90')):
        yield dict(target=target, op=op, phase=phase, dtype='bf16', dim=64)
    for phase in KERNELS['gated']:
        yield dict(
            target='sm_80', op='gated', phase=phase, dtype='bf16', dim=48, elu=False, masked=True
        )
    for phase in ('kv_forward', 'out_forward'):
        yield dict(target='sm_80', op='gated', phase=phase, dtype='bf16', dim=24)
    yield dict(target='sm_80', op='gated', phase='kv_backward', dtype='fp32', dim=128)
    yield dict(
        target='sm_80',
        op='depthwise',
        phase='conv_backward',
        dtype='bf16',
        dim=64,
        side=5,
        masked=True,
    )
    yield dict(target='sm_90', op='layer_norm', phase='norm_backward', dtype='bf16', dim=1000)
    for target, dim in itertools.product(TARGETS, (64, 128)):
        if dim == 128 or target in ('sm_100', 'gfx942'):
            yield dict(target=target, op='ffn', phase='ffn_forward', dtype='bf16', dim=dim)
    for target, phase, dtype, dim in (
        ('sm_80', 'kv_forward', 'bf16', 128), ('sm_80', 'out_forward', 'bf16', 128),
        ('sm_90', 'kv_forward', 'bf16', 128), ('sm_90', 'out_forward', 'bf16', 128),
        ('gfx942', 'kv_forward', 'bf16', 64), ('gfx942', 'kv_forward', 'fp16', 128),
    ):  # fmt: skip
        yield dict(target=target, op='gated_attention', phase=phase, dtype=dtype, dim=dim)
    for index, (op, phase) in enumerate(CASES):
        yield dict(
            target=list(TARGETS)[index % 4], op=op, phase=phase,
            dtype=('fp16', 'fp32')[index // 2 % 2], dim=(16, 24, 32, 48, 80)[index % 5],
            gated=index % 3 > 0, elu=index % 2 > 0, masked=index % 3 < 2,
        )  # fmt: skip


def table_cases(dtypes=('bf16', 'fp32'), dims=(32, 64, 128)):
    for (op, phase), dtype, dim, target in itertools.product(CASES, dtypes, dims, TARGETS):
        # Of the number of channels, these only know whether 16 divides it.
        if op in ('wkv', 'depthwise') and dim not in (20, 32):
            continue
        most = dict(ffn=FFN_CHANNELS, gated_attention=ATTENTION_CHANNELS).get(op)
        if most and dim > most[DTYPES[dtype].itemsize]:
            continue
        # Norms are as wide as all heads together.
        dim *= 8 if op == 'layer_norm' else 1
        yield dict(target=target, op=op, phase=phase, dtype=dtype, dim=dim)


def all_cases():
    """Every kernel for every dtype, D and target; for each dtype and target with all its options,
    one combination for each D."""
    constants = dict(gated={'GATED', 'PARTS', 'RESIDUAL'}, elu={'ELU'}, masked={'p_mask'})
    dims = 8, 20, 24, 32, 48, 64, 80, 128
    for case in table_cases(DTYPES, dims):
        names = set(kernel(case['op'], case['phase']).arg_names)
        options = [option for option, triggers in constants.items() if triggers & names]
        combinations = list(itertools.product((False, True), repeat=len(options)))
        turn = sum(
            list(values).index(case[name])
            for name, values in dict(dim=dims, dtype=DTYPES, target=TARGETS).items()
        )
        values = combinations[turn % len(combinations)]
        sides = (3, 5) if case['op'] == 'depthwise' else (3,)
        for side in sides:
            yield case | dict(zip(options, values, strict=True), side=side)


def compile_all(cases):
    """Compile on all cores, print each row or error, and return the number of errors."""
    errors = 0
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn')) as pool:
        for case, future in [(case, pool.submit(compile_case, **case)) for case in cases]:
            error = future.exception()
            errors += error is not None
            row = case | dict(error=repr(error)) if error else future.result()
            print(json.dumps(row), flush=True)
    return errors


def cell(row):
    stack = f', **{row["stack"]} B**' if row['stack'] else ''
    return f'{row["registers"]}{stack}, {row["shared"] / 1024:.0f} KiB'


def print_table(rows, ops):
    print(HEADER.format(triton=triton.__version__, ops=' '.join(ops)))
    print('| op | dtype | D | kernel | tile, warps |', *(f'{name} |' for name in TARGETS))
    print('|---|---|---|---|---|' + '---|' * len(TARGETS))
    for key, group in itertools.groupby(rows, lambda row: [row[name] for name in KEY]):
        op, dtype, dim, phase, *options = key
        cells = {row['target']: cell(row) for row in group}
        options = '/'.join(map(str, options))
        print(
            f'| {op} | {dtype} | {dim} | {phase} | {options} |', *(f'{c} |' for c in cells.values())
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='the few cases of `make test`')
    parser.add_argument('--all', action='store_true', help='every variant, as JSON lines')
    parser.add_argument('--json', action='store_true', help='JSON lines instead of a table')
    parser.add_argument(
        '--op', nargs='+', choices=list(KERNELS), default=list(KERNELS), help='Defaults to all'
    )
    args = parser.parse_args()
    cases = quick_cases() if args.quick else all_cases() if args.all else table_cases()
    cases = (case for case in cases if case['op'] in args.op)
    if args.all:
        errors = compile_all(cases)
        parser.exit(errors > 0, f'{errors} variants failed\n')
    rows = (compile_case(**case) for case in cases)
    if not args.json:
        return print_table(rows, args.op)
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
