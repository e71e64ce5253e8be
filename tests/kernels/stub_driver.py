"""A GPU that does nothing: Triton compiles for it and launches on it, and tensors stay on the CPU.

It shows what the host does: which kernels are compiled and launched, with which grids and
arguments, and how long that takes the CPU. What the kernels would have written is not there.
"""

import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

# What Triton's launchers call. A pointer to the host's memory passes for one to the GPU's.
SOURCE = """
#include <string.h>
typedef struct { unsigned x, y, z; } Config;
int launches = 0;
unsigned grid[3];
int cuLaunchKernelEx(const Config *config, void *function, void **arguments, void **extra) {
    launches += 1;
    memcpy(grid, config, sizeof(grid));
    return 0;
}
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
    *(unsigned long long *)value = pointer;
    return 0;
}
int cuPointerGetAttributes(unsigned n, int *attributes, void **values, unsigned long long pointer) {
    *(unsigned long long *)values[0] = pointer;
    return 0;
}
"""
SHARED_MEMORY = 232448


def _others():
    """Functions for all else that Triton's module needs to be loaded."""
    root = Path(importlib.util.find_spec('triton').origin).parent
    text = (root / 'backends/nvidia/driver.c').read_text()
    names = set(re.findall(r'\b(cu[A-Z]\w*)\(', text))
    return [f'int {name}() {{ return 0; }}\n' for name in names if f'{name}(' not in SOURCE]


def install(target: int = 90) -> ctypes.CDLL:
    """Give Triton a driver of a GPU of that compute capability, and the kernels CPU tensors.

    Must come before anything else imports Triton. Returns the library that counts launches.
    """
    folder = Path(tempfile.mkdtemp())
    source, library = folder / 'cuda.c', folder / 'libcuda.so.1'
    source.write_text(SOURCE + ''.join(_others()))
    command = ['cc', '-shared', '-fPIC', f'-Wl,-soname,{library.name}', '-o', library, source]
    subprocess.run(command, check=True)
    library.with_suffix('').symlink_to(library)
    os.environ.update(TRITON_LIBCUDA_PATH=str(folder), LD_LIBRARY_PATH=str(folder))
    os.environ.pop('TRITON_INTERPRET', None)
    counter = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    class Utils:
        """Those functions of the driver that launch nothing; the others are Triton's own."""

        def load_binary(self, name, kernel, shared, device):
            return 1, 1, 0, 0, 1024

        def unload_module(self, module):
            pass

        def get_device_properties(self, device):
            return dict(
                max_shared_mem=SHARED_MEMORY, multiprocessor_count=132, max_num_regs=65536,
                warpSize=32,
            )  # fmt: skip

        def __getattr__(self, name):
            return getattr(driver.CudaUtils(), name)

    class Driver:
        utils = Utils()
        launcher_cls = driver.CudaLauncher

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget('cuda', target, 32)

        def get_device_capability(self, device):
            return divmod(target, 10)

        def map_python_to_cpp_type(self, kind):
            return driver.ty_to_cpp(kind)

        def get_active_torch_device(self):
            return torch.device('cpu')

        def allocate_default_profile_scratch(self, size, align, stream):
            return None

    triton.runtime.driver.set_active(Driver())
    for op in importlib.import_module('saga_kernels.launch').KERNELS:
        importlib.import_module(f'saga_kernels.{op}.kernel')
    starter = importlib.import_module('saga_kernels.starter')
    starter._on_device = lambda device: contextlib.nullcontext()
    # The kernels are compiled, as Triton asks for this on import; the ops take CPU tensors.
    os.environ['TRITON_INTERPRET'] = '1'
    return counter
