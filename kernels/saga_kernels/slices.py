"""Work on tokens in slices, so that its temporaries fit a cache and need hardly any memory."""

import torch

# Bytes of one temporary: what a CPU's cache holds; enough to keep a GPU busy.
BUDGET = {'cpu': 2**21}
BUDGET_ELSEWHERE = 2**26


def token_slices(
    tokens: int, bytes_per_token: int, device: torch.device, least: int = 1
) -> list[slice]:
    """Slices over an axis of tokens.

    One slice holds all of them where autograd or a graph is recorded: those keep what they see.

    Args:
        tokens: Length of the axis.
        bytes_per_token: Of the largest temporary.
        device: Where it lies.
        least: Tokens of the smallest slice but the last.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [slice(0, tokens)]
    step = max(1, least, BUDGET.get(device.type, BUDGET_ELSEWHERE) // max(1, bytes_per_token))
    return [slice(start, start + step) for start in range(0, max(1, tokens), step)]
