"""Traced models, and files of the TorchScript exporter, are right for images of other sizes."""

import io

import pytest
import torch

from saga_mm.backbones import RAVLT, SAGA, SoLAVision
from saga_mm.inference import chunked

ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
PATTERN = ('L', 'L', 'S', 'L')
MODELS = {
    'SAGA': lambda: SAGA(ARCH),
    'SAGA, plain patches': lambda: SAGA(ARCH, patch_embed='plain'),
    'SAGA, options': lambda: SAGA(ARCH, qk_norm=(2, -4), ffn_kernel_size=3, layer_scale=0.5),
    'SAGA, batch norm': lambda: SAGA(ARCH, embed_norm_cfg=dict(type='BN')),
    'SAGA, padded': lambda: SAGA(ARCH, pad_mask=True),
    'SoLA-Vision': lambda: SoLAVision(ARCH, PATTERN),
    'SoLA-Vision, gated': lambda: SoLAVision(ARCH, PATTERN, linear='gated'),
    'SoLA-Vision, decay, padded': lambda: SoLAVision(ARCH, PATTERN, linear='decay', pad_mask=True),
    'RAVLT': lambda: RAVLT(ARCH),
    'RAVLT, padded': lambda: RAVLT(ARCH, pad_mask=True),
}
SIZES = [(96, 128), (75, 130), (200, 61)]


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    # The budget is small enough for chunks, which a trace must not contain.
    monkeypatch.setattr(chunked, 'BUDGET', 2**12)
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_images(model, batch, size):
    images = torch.randn(batch, model.input_channels, *size)
    if model.pad_mask:
        images[:, -1], images[0, -1, size[0] // 2 :] = 1, 0
    return images


@torch.no_grad()
def test_traces_hold_for_other_sizes(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, make_images(model, 1, SIZES[0]), check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for size in SIZES:
        images = make_images(model, 2, size)
        for out, expected in zip(traced(images), model(images), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings('ignore')
def test_the_torchscript_exporter_writes_what_reads_the_image(model, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    file = tmp_path / 'model.onnx'
    outputs = [f'stage_{i}' for i in range(4)]
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(
        model,
        (make_images(model, 1, SIZES[0]),),
        file,
        dynamo=False,
        opset_version=17,
        input_names=['images'],
        output_names=outputs,
        dynamic_axes=dict.fromkeys(['images', *outputs], axes),
    )
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for size in SIZES:
        images = make_images(model, 2, size)
        found = session.run(None, {'images': images.numpy()})
        for out, expected in zip(found, model(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-4)
