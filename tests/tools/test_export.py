"""tools/export.py: its files, run on their own, compute what the models do; others are refused."""

import copy
import subprocess
import sys

import onnxruntime
import openvino
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn
from torch._inductor import config as inductor

from saga_mm.apis.export import TOLERANCE, largest_error

DIMS = [8, 16, 24, 32]
ARCH = dict(embed_dims=DIMS, num_heads=(2, 2, 3, 4), depths=(1, 1, 1, 1))
SAGA = dict(type='saga_mm.SAGA', arch=ARCH, drop_path_rate=0.5)
SOLA_VISION = dict(type='saga_mm.SoLAVision', arch=ARCH, pattern=('L', 'L', 'S', 'L'))
DECAY = dict(SOLA_VISION, linear='decay')
GATED = dict(SOLA_VISION, linear='gated')
RAVLT = dict(type='saga_mm.RAVLT', arch=ARCH, linear_stages=1)
# With more stages, the formulas of their sizes that torch.export handles get longer.
BACKBONES = [
    pytest.param(dict(SAGA, out_indices=(0, 1), patch_embed='plain', with_cp=True), id='SAGA'),
    pytest.param(dict(GATED, out_indices=(0, 2)), id='SoLA-Vision: softmax, bridge'),
    pytest.param(dict(SOLA_VISION, out_indices=(0,)), id='SoLA-Vision: WKV'),
    pytest.param(dict(DECAY, out_indices=(0,)), id='SoLA-Vision: decay'),
    pytest.param(dict(RAVLT, out_indices=(0, 1)), id='RAVLT'),
    *(
        pytest.param(backbone, id=f'{backbone["type"]}: all stages', marks=pytest.mark.long)
        for backbone in (SAGA, DECAY, RAVLT)
    ),
]
UPERNET = dict(type='UPerHead', in_channels=DIMS, in_index=(0, 1, 2, 3), pool_scales=(1, 2, 3, 6))
FCN = dict(type='FCNHead', in_channels=8, in_index=0, num_convs=1)
FPN = dict(type='FPN', in_channels=DIMS[:2], out_channels=8, num_outs=2)
FPN_HEAD = dict(type='FPNHead', in_channels=[8] * 2, in_index=(0, 1), feature_strides=(4, 8))
ALIKE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture
def export(tool):
    return tool('export')


@pytest.fixture
def segmentor(tmp_path):
    """Writes `config.py` and `weights.pth`; returns the model, none of whose weights is zero."""

    def make(backbone, head=FCN, **options):
        head = dict(head, channels=8, num_classes=3, norm_cfg=dict(type='SyncBN'))
        model = dict(type='EncoderDecoder', backbone=backbone, decode_head=head, **options)
        cfg = Config(
            dict(
                default_scope='mmseg',
                custom_imports=dict(imports=['saga_mm'], allow_failed_imports=False),
                model=dict(model, test_cfg=dict(mode='whole')),
            )
        )
        cfg.dump(tmp_path / 'config.py')
        init_default_scope('mmseg')
        cfg.model.decode_head.norm_cfg.type = 'BN'
        built = MODELS.build(cfg.model).eval()
        for parameter in built.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        torch.save(dict(state_dict=built.state_dict()), tmp_path / 'weights.pth')
        return built

    return make


@pytest.fixture
def arguments(tmp_path):
    """A call of the tool on what `segmentor` has written."""

    def make(out, *options):
        weights = ('--checkpoint', str(tmp_path / 'weights.pth'))
        options = map(str, options)
        return [str(tmp_path / 'config.py'), *weights, '--out', str(tmp_path / out), *options]

    return make


def run_onnx(path, images):
    """Outputs by name, computed without the tool."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(None, {'images': images.numpy()})
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True))


def run_openvino(path, images):
    settings = dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=1)
    program = openvino.Core().compile_model(path, 'CPU', settings)
    outputs = program({'images': images.numpy()})
    return {output.any_name: torch.from_numpy(array) for output, array in outputs.items()}


RUNTIMES = (run_onnx, run_openvino)


@pytest.mark.parametrize('backbone', BACKBONES)
@torch.no_grad()
def test_a_backbone_as_onnx_takes_images_of_any_number_and_size(
    backbone, export, segmentor, arguments, tmp_path, capsys
):
    backbone = segmentor(backbone).backbone
    export.main(arguments('new/out.onnx', '--size', 64, 96))
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['out.onnx']
    said = capsys.readouterr().out
    assert all(
        shape in said for shape in ('2 x 3 x 64 x 96', '1 x 3 x 49 x 51', '3 x 3 x 21 x 127')
    )
    for shape in [(1, 3, 75, 130), (4, 3, 101, 33), (1, 3, 1, 1)]:
        images = torch.randn(shape)
        for run in RUNTIMES:
            outputs = run(tmp_path / 'new/out.onnx', images)
            assert list(outputs) == [f'stage_{i}' for i in backbone.out_indices]
            for output, expected in zip(outputs.values(), backbone(images), strict=True):
                torch.testing.assert_close(output, expected, **ALIKE)


def predict(model, images):
    """The predictions of a model for whole images."""
    size = tuple(images.shape[2:])
    info = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    kind = BaseDataElement if hasattr(model, 'decode_head') else DetDataSample
    return model.predict(images, [kind(metainfo=info) for _ in images])


@pytest.mark.parametrize(
    ('head', 'neck', 'shapes'),
    [
        pytest.param(UPERNET, None, [(1, 3, 75, 90), (3, 3, 75, 90)], id='UperNet: one size'),
        pytest.param(FPN_HEAD, FPN, [(1, 3, 97, 66), (3, 3, 75, 90)], id='FPN: any size'),
    ],
)
@torch.no_grad()
def test_a_whole_segmentor_as_onnx_gives_the_logits_of_predict(
    head, neck, shapes, export, segmentor, arguments, tmp_path, capsys
):
    model = segmentor(dict(SAGA, out_indices=head['in_index']), head, neck=neck)
    export.main(arguments('out.onnx', '--part', 'model', '--size', 75, 90))
    said = capsys.readouterr().out
    assert ('images of any size' in said) == (head is FPN_HEAD)
    for shape in shapes:
        images = torch.randn(shape)
        truths = predict(copy.deepcopy(model).double(), images.double())
        for run in RUNTIMES:
            logits = run(tmp_path / 'out.onnx', images)['logits']
            assert logits.shape == (shape[0], 3, *shape[2:])
            for found, sample in zip(logits, truths, strict=True):
                truth = sample.seg_logits.data
                # Near zero, logits have the rounding of what they are sums of.
                bound = 3e-6 * truth.abs().max().item()
                torch.testing.assert_close(found.double(), truth, rtol=0, atol=bound)


@torch.no_grad()
def test_a_whole_retinanet_as_onnx_gives_the_boxes_of_predict(export, tiny_det, tmp_path):
    cfg = Config.fromfile(tiny_det)
    cfg.model.test_cfg.update(score_thr=0.0, nms_pre=10**6, max_per_img=10**6, min_bbox_size=-1)
    # no box overlaps another one by more than all of itself
    cfg.model.test_cfg.nms = dict(type='nms', iou_threshold=1.0)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    cfg.dump(tmp_path / 'det.py')
    options = ['--part', 'model', '--size', '64', '96', '--out', str(tmp_path / 'out.onnx')]
    export.main([str(tmp_path / 'det.py'), '--checkpoint', str(tmp_path / 'weights.pth'), *options])
    images = torch.randn(2, 3, 50, 70)
    samples = predict(model, images)
    for run in RUNTIMES:
        outputs = run(tmp_path / 'out.onnx', images)
        assert list(outputs) == ['boxes', 'scores']
        for boxes, scores, sample in zip(*outputs.values(), samples, strict=True):
            found = sample.pred_instances
            # mmdet has one box for each anchor and class, the best first.
            values, order = scores.flatten().sort(descending=True)
            torch.testing.assert_close(found.scores, values, **ALIKE)
            best = order[:50]
            torch.testing.assert_close(
                found.bboxes[:50], boxes[best // scores.shape[1]], rtol=1e-4, atol=1e-3
            )
            assert torch.equal(found.labels[:50], best % scores.shape[1])


def test_an_export_of_one_size(export, segmentor, arguments, tmp_path, capsys):
    segmentor(dict(SAGA, out_indices=(0,)))
    export.main(arguments('out.onnx', '--fixed-size', '--size', 32, 48))
    assert 'images of 32 x 48 pixels' in capsys.readouterr().out
    shape = onnxruntime.InferenceSession(tmp_path / 'out.onnx').get_inputs()[0].shape
    assert shape[1:] == [3, 32, 48]


ALONE = """
import sys, torch
from torch._inductor import aoti_load_package
assert not {'saga_mm', 'saga_kernels', 'mmengine', 'mmcv'} & sys.modules.keys()
kind, file, images, outputs = sys.argv[1:]
load = aoti_load_package if kind == 'aoti' else lambda file: torch.export.load(file).module()
torch.save(list(load(file)(torch.load(images))), outputs)
"""


@pytest.mark.parametrize(
    ('kind', 'backbone'),
    [
        ('aoti', dict(SAGA, out_indices=(0,))),
        ('pt2', dict(SAGA, out_indices=(0,))),
        *(
            pytest.param('aoti', backbone, marks=pytest.mark.long)
            for backbone in (SOLA_VISION, DECAY, RAVLT)
        ),
    ],
)
@torch.no_grad()
def test_torch_alone_runs_it(kind, backbone, export, segmentor, arguments, tmp_path):
    backbone = segmentor(backbone).backbone
    export.main(arguments('out.pt2', '--format', kind, '--size', 64, 96))
    # AOTInductor compiles for one size
    images = torch.randn(4, 3, 64, 96) if kind == 'aoti' else torch.randn(4, 3, 75, 130)
    torch.save(images, tmp_path / 'images')
    files = [tmp_path / name for name in ('out.pt2', 'images', 'outputs')]
    # -I removes the paths of the tests.
    subprocess.run([sys.executable, '-I', '-c', ALONE, kind, *files], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / 'outputs')
    for output, expected in zip(outputs, backbone(images), strict=True):
        torch.testing.assert_close(output, expected, **ALIKE)


def test_a_file_that_disagrees_is_not_written(export, segmentor, arguments, tmp_path, monkeypatch):
    segmentor(dict(SAGA, out_indices=(0,)))
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/out.pt2').write_bytes(b'former')
    write = export.write

    def write_and_change(kind, subject, file):
        write(kind, subject, file)
        subject.module.stages[0].blocks[0].ffn.fc2.weight.mul_(2)

    monkeypatch.setattr(export, 'write', write_and_change)
    with pytest.raises(SystemExit) as error:
        export.main(arguments('out/out.pt2', '--format', 'pt2', '--size', 64, 64))
    message = str(error.value)
    assert 'out.pt2 is not written: for images of 2 x 3 x 64 x 64, it is off by ' in message
    assert '\n' not in message
    assert (tmp_path / 'out/out.pt2').read_bytes() == b'former'
    assert len(list((tmp_path / 'out').iterdir())) == 1


@pytest.mark.parametrize(
    ('output', 'message'),
    [
        (torch.tensor([1.0, 4.0]), None),
        (torch.tensor([1.0, float('nan')]), None),
        (torch.ones(2, 1), 'an output has shape'),
    ],
)
def test_the_error_is_relative_and_sees_nan_and_shapes(output, message):
    truth = [torch.ones(2), torch.tensor([1.0, 4.001])]
    if message:
        with pytest.raises(ValueError, match=message):
            largest_error([torch.ones(2), output], truth)
    else:
        error = largest_error([torch.ones(2), output], truth)
        assert not error <= TOLERANCE
        assert error == pytest.approx(0.001 / 4.001, rel=1e-3) or error != error


def refuse(export, options, expected):
    with pytest.raises(SystemExit) as error:
        export.main(options)
    assert expected in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('out', 'options', 'expected'),
    [
        ('a.pt2', (), 'error: --out must end in .onnx for --format onnx, got '),
        ('a.onnx', ('--format', 'pt2'), '--out must end in .pt2 for --format pt2, got '),
        ('folder.pt2', ('--format', 'pt2'), '--out must be a file, got the folder '),
        ('a.onnx', (), "the format onnx needs no_such_package: pip install 'saga_mm[export]'"),
        ('a.pt2', ('--format', 'aoti'), 'needs a C++ compiler, and there is no no-such-compiler'),
        ('a.onnx', ('--size', 0, 64), '--size must be two positive numbers, got (0, 64)'),
        ('a.onnx', ('--check-size', 0, 64), '--check-size must be two positive numbers, got [[0'),
    ],
)
def test_wrong_options_are_one_line(
    out, options, expected, export, arguments, tmp_path, monkeypatch
):
    (tmp_path / 'folder.pt2').mkdir()
    monkeypatch.setattr('saga_mm.apis.export.ONNX', ('torch', 'no_such_package'))
    with inductor.patch({'cpp.cxx': (None, 'no-such-compiler')}):
        refuse(export, arguments(out, *options), expected)


def test_other_models_are_one_line(export, segmentor, arguments, tiny_det, tmp_path):
    out = ['--format', 'pt2', '--out', str(tmp_path / 'a.pt2')]
    expected = 'a score for each class, got a ATSS: of other models, the backbone can be exported'
    head = ('model.type=ATSS', 'model.bbox_head.type=ATSSHead', 'model.bbox_head.feat_channels=32')
    refuse(export, [str(tiny_det), '--part', 'model', *out, '--cfg-options', *head], expected)
    segmentor(SAGA)
    options = ('--format', 'pt2', '--size', 32, 64)
    refuse(export, arguments('a.pt2', *options), '--size must be at least 64 pixels a side')
    options = ('--fixed-size', '--check-size', 9, 9)
    refuse(export, arguments('a.onnx', *options), '--check-size must not be given, because')
    segmentor(dict(type='ResNet', depth=18, base_channels=8))
    expected = 'the backbone of the config must be one of saga_mm, got ResNet'
    refuse(export, arguments('a.pt2', '--format', 'pt2'), expected)
    assert not (tmp_path / 'a.pt2').exists()
