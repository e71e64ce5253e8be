"""Write the weights of a published checkpoint under the names of this project, as a plain file.

python -m saga_mm convert_checkpoint saga_mm::detection/mask_rcnn_ravlt_t.py RAVLT_T.pth ravlt_t.pth
python -m saga_mm convert_checkpoint saga_mm::segmentation/upernet_saga_t.py pvt_tiny.pth start.pth

- RAVLT, a classifier, or a detector or segmentor that the config describes: complete. Such files
  also load without a conversion.
- PVT, of its authors (https://github.com/whai362/PVT) or trained with mmdet's, for a SAGA of the
  same size: a warm start, of what has a counterpart: projections, FFN, norms, and with
  `--cfg-options model.backbone.patch_embed=plain` patch embeddings. The gates on keys and
  values start constant.

The result names what `model.backbone.init_cfg` or, for a whole model, `load_from` takes.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor

from saga_mm.apis import build_model
from saga_mm.backbones import SAGA
from saga_mm.checkpoint import (
    CheckpointError,
    LoadReport,
    extract_state_dict,
    import_safetensors,
    is_safetensors,
    load_file,
    load_matching,
    make_folder,
    printable,
    to_safetensors,
    write_atomically,
)
from saga_mm.cli import add_options, load_config, run_tool

# What is replaced in the names of PVT, by what: first in those of its authors, whose stages count
# from 1, then in those of mmdet, whose names of blocks see `from_pvt`.
PVT_TRANSLATION = (
    (r'^patch_embed(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.embed.'),
    (r'^block(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.'),
    (r'\.mlp\.', '.ffn.'),
    (r'^layers\.(\d)\.0\.', r'stages.\1.embed.'),
    (r'\.projection\.', '.proj.'),
    (r'\.attn\.attn\.in_proj_', '.attn.in_proj.'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.ffn\.layers\.0\.', '.ffn.fc1.'),
    (r'\.ffn\.layers\.3\.', '.ffn.fc2.'),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model that is to have the weights')
    parser.add_argument('checkpoint', help='published weights, a file or a URL')
    parser.add_argument(
        'out',
        type=Path,
        help='file to write; a name that ends in .safetensors gives a file of that format',
    )
    add_options(parser)
    return parser.parse_args(argv)


def convert(cfg: Config, checkpoint: str) -> tuple[dict[str, Tensor], LoadReport]:
    """The weights that fit the config's backbone, or, from a whole model, its model.

    Raises:
        CheckpointError: The file can't be read, or none of its weights fits.
    """
    weights: Mapping[str, Tensor] = extract_state_dict(load_file(checkpoint))
    whole = any(name.startswith('backbone.') for name in weights)
    built = build_model(cfg)
    backbone = built.backbone
    model = built if whole else backbone
    if isinstance(backbone, SAGA):
        weights = from_pvt(weights, model.state_dict(), 'backbone.' if whole else '')
    match = load_matching(model, weights)
    if not match.loaded:
        raise CheckpointError(
            f'{checkpoint} has no weight that fits {type(model).__name__} of the config: {match}'
        )
    own = model.state_dict()
    return {name: own[name] for name in match.loaded}, match


def from_pvt(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Weights of PVT under the names of SAGA, whose weights are `own`; others as they are."""
    weights = dict(weights)
    for name in [name for name in weights if '.attn.q.' in name]:
        # both order rows as (head, channel), and kv as k, then v
        kv = weights.pop(name.replace('.q.', '.kv.'), None)
        if kv is not None:
            weights[name.replace('.q.', '.in_proj.')] = torch.cat([weights.pop(name), kv])
    # mmdet's PVT has the embedding of positions in place of the first block
    first = int(any(name.endswith('.1.0.pos_embed') for name in weights))
    mmdet_block = (
        r'^layers\.(\d)\.1\.(\d+)\.',
        lambda m: f'stages.{m[1]}.blocks.{int(m[2]) - first}.',
    )
    translated = {}
    for name, weight in weights.items():
        new = name.removeprefix(prefix)
        for pattern, replacement in (*PVT_TRANSLATION, mmdet_block):
            new = re.sub(pattern, replacement, new)
        new = prefix + new
        if new not in own:
            new = name
        elif '.in_proj.' in new:
            weight = with_gates(weight, own[new])
        elif weight.shape == (*own[new].shape, 1, 1):
            # a linear layer as a convolution
            weight = weight.flatten(1)
        translated[new] = weight
    return translated


def with_gates(qkv: Tensor, own: Tensor) -> Tensor:
    """Rows for q, k and v, followed by those of gates, if any, that do not depend on the token."""
    if own.shape[1:] != qkv.shape[1:]:
        return qkv
    gates = own[len(qkv) :]
    return torch.cat([qkv, gates if own.ndim == 1 else torch.zeros_like(gates)])


def serialize(weights: dict[str, Tensor], out: Path) -> bytes:
    """The content of the file `out`, in the format that its name asks for."""
    if is_safetensors(out):
        return to_safetensors(weights, out)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def table(match: LoadReport) -> str:
    """How many weights there are of each kind, and which, but for those that are converted."""
    kinds = dict(
        loaded='converted',
        missing='missing in the file',
        unexpected='left out',
        mismatched='of another shape',
    )
    lines = ['| weights | number | names |', '|---|---|---|']
    for kind, names in match._asdict().items():
        shown = '' if kind == 'loaded' else ', '.join(map(printable, names))
        lines.append(f'| {kinds[kind]} | {len(names)} | {shown} |')
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> None:
    if args.out.resolve() == Path(args.checkpoint).resolve():
        raise ValueError(f'out must not be the checkpoint itself, got {args.out}')
    if args.out.is_dir():
        raise ValueError(f'out must be a file, got the folder {args.out}')
    if is_safetensors(args.out):
        # a package that is missing is an error before the work
        import_safetensors(args.out)
    cfg = load_config(args.config, args.cfg_options, ('model',))
    weights, match = convert(cfg, args.checkpoint)
    content = serialize(weights, args.out)
    make_folder(args.out.parent)
    write_atomically(args.out, content)
    print(table(match))
    print(f'{args.out}: {sum(weight.numel() for weight in weights.values()) / 1e6:.2f}M values')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
