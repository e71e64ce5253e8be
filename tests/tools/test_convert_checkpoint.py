"""tools/convert_checkpoint.py: the files that it accepts, what it writes, and its messages."""

import sys

import pytest
import torch
from mmdet.models.backbones import PyramidVisionTransformer
from published_ravlt import published

from saga_mm.backbones import RAVLT, SAGA
from saga_mm.checkpoint import load_file, load_weights

ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 2))


@pytest.fixture
def convert(tool, tmp_path):
    """Run the tool with a backbone in a config, and return the weights that it wrote."""
    converter = tool('convert_checkpoint')

    def run(backbone, weights, *options, name='out.pth'):
        config = tmp_path / 'config.py'
        config.write_text(
            "default_scope = 'mmseg'\n"
            "custom_imports = dict(imports=['saga_mm'], allow_failed_imports=False)\n"
            "head = dict(type='FCNHead', in_channels=8, in_index=0, channels=4, num_classes=2)\n"
            f'model = dict(type="EncoderDecoder", backbone={backbone!r}, decode_head=head)\n'
        )
        torch.save(weights, tmp_path / 'published.pth')
        out = tmp_path / 'new' / name
        converter.main([str(config), str(tmp_path / 'published.pth'), str(out), *options])
        assert [path.name for path in out.parent.iterdir()] == [name]
        return out

    return run


def pvt(arch=ARCH):
    """Names and shapes of PVT's checkpoints."""
    weights = {'cls_token': torch.randn(1, 1, 32), 'head.weight': torch.randn(10, 32)}
    channels = 3
    for s, (dim, depth) in enumerate(zip(arch['embed_dims'], arch['depths'], strict=True), 1):
        patch = 2 if channels > 3 else 4
        weights[f'pos_embed{s}'] = torch.randn(1, 49, dim)
        weights[f'patch_embed{s}.proj.weight'] = torch.randn(dim, channels, patch, patch)
        weights[f'patch_embed{s}.proj.bias'] = torch.randn(dim)
        weights[f'patch_embed{s}.norm.weight'] = torch.randn(dim)
        weights[f'patch_embed{s}.norm.bias'] = torch.randn(dim)
        for i in range(depth):
            for name, shape in {
                'norm1.weight': (dim,), 'norm1.bias': (dim,),
                'norm2.weight': (dim,), 'norm2.bias': (dim,),
                'attn.q.weight': (dim, dim), 'attn.q.bias': (dim,),
                'attn.kv.weight': (2 * dim, dim), 'attn.kv.bias': (2 * dim,),
                'attn.sr.weight': (dim, dim, 2, 2), 'attn.norm.weight': (dim,),
                'attn.proj.weight': (dim, dim), 'attn.proj.bias': (dim,),
                'mlp.fc1.weight': (4 * dim, dim), 'mlp.fc1.bias': (4 * dim,),
                'mlp.fc2.weight': (dim, 4 * dim), 'mlp.fc2.bias': (dim,),
            }.items():  # fmt: skip
                weights[f'block{s}.{i}.{name}'] = torch.randn(shape)
        channels = dim
    return weights


def test_classifier_of_ravlt(convert, capsys):
    truth = published(ARCH, dense=False)
    out = convert(dict(type='saga_mm.RAVLT', arch=ARCH), {'model': truth.state_dict()})
    expected = RAVLT(ARCH)
    expected.load_state_dict(truth.state_dict())
    weights = load_file(out)
    own = {name: w for name, w in expected.state_dict().items() if not name.startswith('norms.')}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    text = capsys.readouterr().out
    assert f'| converted | {len(own)} |' in text
    assert '| missing in the file | 8 | norms.0.bias, ' in text
    assert '| left out | 9 | head.bias, head.weight, norm.bias, ' in text


def test_whole_model_of_ravlt(convert):
    truth = published(ARCH)
    weights = {f'backbone.{name}': weight for name, weight in truth.state_dict().items()}
    weights['decode_head.conv_seg.bias'] = torch.ones(2)
    out = load_file(convert(dict(type='saga_mm.RAVLT', arch=ARCH), {'state_dict': weights}))
    assert out['decode_head.conv_seg.bias'].tolist() == [1, 1]
    assert torch.equal(out['backbone.norms.3.bias'], weights['backbone.extra_norms.3.norm.bias'])


# in names of parameters of SAGA that PVT has none for
LACKING = ('output_gate', 'lepe', 'cpe', 'norms.')


@pytest.mark.parametrize('patch_embed', ['conv', 'plain'])
def test_pvt_for_saga(convert, capsys, patch_embed):
    weights = pvt()
    backbone = dict(type='saga_mm.SAGA', arch=ARCH, patch_embed='conv')
    options = ('--cfg-options', f'model.backbone.patch_embed={patch_embed}')
    out = convert(backbone, weights, *options)
    text = capsys.readouterr().out
    # The first patch embedding differs from the stem.
    number = 16 + 4 * (patch_embed == 'conv')
    assert f'| left out | {number} | block1.0.attn.norm.weight, block1.0.attn.sr.weight, ' in text

    model = SAGA(ARCH, patch_embed=patch_embed)
    match = load_weights(model, out)
    assert match.unexpected == match.mismatched == []
    # PVT lacks the others: output gate, LePE, positions, output norms, and some embeddings with
    # 'conv'.
    lacking = (*LACKING, *(['embed.'] if patch_embed == 'conv' else []))
    assert all(any(part in name for part in lacking) for name in match.missing), match.missing
    attention = model.stages[1].blocks[1].attn
    expected = torch.cat([weights['block2.1.attn.q.weight'], weights['block2.1.attn.kv.weight']])
    assert torch.equal(attention.in_proj.weight[:48], expected)
    assert not attention.in_proj.weight[48:].any()
    assert (attention.in_proj.bias[48:] == 2).all()
    fc2 = model.stages[3].blocks[0].ffn.fc2.weight
    assert torch.equal(fc2, weights['block4.0.mlp.fc2.weight'])
    if patch_embed == 'plain':
        proj = model.stages[0].embed.proj.weight
        assert torch.equal(proj, weights['patch_embed1.proj.weight'])


@pytest.mark.parametrize('positions', [True, False])
def test_pvt_of_mmdet_for_saga(convert, positions):
    truth = PyramidVisionTransformer(
        pretrain_img_size=64,
        embed_dims=8,
        num_layers=ARCH['depths'],
        num_heads=ARCH['num_heads'],
        mlp_ratios=(4, 4, 4, 4),
        use_abs_pos_embed=positions,
    )
    arch = dict(ARCH, embed_dims=[8 * heads for heads in ARCH['num_heads']])
    weights = {f'backbone.{name}': weight for name, weight in truth.state_dict().items()}
    backbone = dict(type='saga_mm.SAGA', arch=arch, patch_embed='plain')
    out = convert(backbone, dict(state_dict=weights))
    model = SAGA(arch, patch_embed='plain')
    match = load_weights(model, out, prefix='backbone.')
    assert match.unexpected == match.mismatched == []
    assert all(any(part in name for part in LACKING) for name in match.missing), match.missing
    block, former = model.stages[1].blocks[1], truth.layers[1][1][1 + positions]
    assert torch.equal(block.attn.in_proj.weight[:48], former.attn.attn.in_proj_weight)
    assert torch.equal(block.ffn.fc2.weight, former.ffn.layers[3].weight.flatten(1))
    assert torch.equal(block.norm2.bias, former.norm2.bias)
    assert torch.equal(model.stages[2].embed.norm.weight, truth.layers[2][0].norm.weight)


def test_a_file_of_safetensors_holds_the_same_weights(convert):
    pytest.importorskip('safetensors')
    backbone = dict(type='saga_mm.SAGA', arch=ARCH)
    weights = SAGA(ARCH).state_dict()
    # memory that two weights share, and strides of a transposed one, are no obstacles
    weights['norms.1.bias'] = weights['norms.1.weight']
    weights['stages.0.blocks.0.attn.proj.weight'] = torch.randn(8, 8).T
    out = load_file(convert(backbone, weights, name='out.safetensors'))
    assert out.keys() == weights.keys()
    assert all(torch.equal(out[name], weights[name]) for name in weights)
    model = SAGA(
        ARCH,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(convert(backbone, weights, name='out.safetensors'))
        ),
    )
    model.init_weights()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def test_without_safetensors_its_files_are_an_error_before_the_work(convert, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(SystemExit, match='the package is missing: pip install safetensors'):
        convert(dict(type='saga_mm.SAGA', arch=ARCH), {}, name='out.safetensors')
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('kind', ['foreign', 'absent', 'itself'])
def test_errors_are_one_line_and_leave_no_file(kind, convert, tool, tmp_path):
    main = tool('convert_checkpoint').main
    if kind == 'foreign':
        with pytest.raises(SystemExit, match=r'has no weight that fits RAVLT') as error:
            convert(dict(type='saga_mm.RAVLT', arch=ARCH), {'some.weight': torch.ones(3)})
    elif kind == 'absent':
        with pytest.raises(SystemExit, match='does not exist') as error:
            config = tmp_path / 'c.py'
            config.write_text("default_scope = 'mmseg'\nmodel = dict(backbone=dict())\n")
            main([str(config), str(tmp_path / 'no.pth'), str(tmp_path / 'out.pth')])
    else:
        with pytest.raises(SystemExit, match='out must not be the checkpoint itself') as error:
            main(['c.py', str(tmp_path / 'a.pth'), str(tmp_path / 'a.pth')])
    assert '\n' not in str(error.value)
    assert not list(tmp_path.rglob('*out.pth*'))
