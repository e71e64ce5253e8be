"""Whether PyTorch records what runs, to run it later, elsewhere or on inputs of other sizes."""

import torch


def is_tracing_or_compiling() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` records the running code.

    What is recorded must hold for other sizes and without Python: code that is only faster or
    stricter in eager mode (chunks, writes into preallocated memory, custom autograd functions,
    checks of integers) must not run then. FLOP counters and the TorchScript exporter to ONNX trace
    too.
    """
    return torch.compiler.is_compiling() or is_tracing_or_exporting()


def is_tracing_or_exporting() -> bool:
    """Whether the recorded code will run without Python: `torch.export` or `torch.jit.trace`."""
    return is_exporting() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """What `torch.compiler.is_exporting` returns.

    In PyTorch 2.11, Dynamo takes a call of that function for true in all code that it compiles.
    """
    return torch.compiler._is_exporting_flag
