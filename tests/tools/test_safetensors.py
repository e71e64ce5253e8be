"""Each tool that reads or writes weights takes files of safetensors as it takes those of torch."""

import json
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from saga_mm.checkpoint import extract_state_dict, load_file, to_safetensors

pytest.importorskip('safetensors')

SMALL = ['--size', '64', '64']


class Uses:
    """Runs a tool with weights, and returns what shows which weights it used."""

    def __init__(self, tool, config, data, out):
        self.tool, self.config, self.data, self.out = tool, str(config), data, out

    def main(self, name, *arguments):
        return self.tool(name).main([str(argument) for argument in arguments])

    def train(self, *options):
        """The weights of a backbone after one step at a learning rate of zero."""
        options = 'train_cfg.max_iters=1', 'optim_wrapper.optimizer.lr=0', *options
        self.main('train', self.config, '--work-dir', self.out, '--cfg-options', *options)
        weights = load_file(self.out / 'iter_1.pth')['state_dict']
        return {name: w.tolist() for name, w in weights.items() if name.startswith('backbone.')}

    def load_from(self, path):
        return self.train(f'load_from={path}')

    def init_cfg(self, path):
        cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
        return self.train(*(f'model.backbone.init_cfg.{key}={cfg[key]}' for key in cfg))

    def resume(self, path):
        with pytest.raises(SystemExit) as stop:
            self.main('train', self.config, '--work-dir', self.out, '--resume', path)
        return re.search('can not be resumed: it holds weights, but no .*', stop.value.code)[0]

    def test(self, path):
        return self.main('test', self.config, path, '--work-dir', self.out)['mIoU']

    def infer(self, path):
        where = f'--out-dir={self.out}', f'--predictions-dir={self.out}/maps'
        image = self.data / 'images/val/0.png'
        self.main('infer', image, '--config', self.config, '--checkpoint', path, *where)
        return (self.out / 'maps/0.png').read_bytes()

    def export(self, path):
        out = self.out / 'backbone.onnx'
        self.main('export', self.config, '--checkpoint', path, '--out', out, *SMALL)
        import onnxruntime

        session = onnxruntime.InferenceSession(out)
        name = session.get_inputs()[0].name
        return [x.tolist() for x in session.run(None, {name: torch.ones(1, 3, 64, 64).numpy()})]

    def convert(self, path):
        self.main('convert_checkpoint', self.config, path, self.out / 'out.pth')
        return {name: weight.tolist() for name, weight in load_file(self.out / 'out.pth').items()}

    def analyze_attention(self, path):
        models = '--models', f'a={self.config}:{path}', '--images', self.data / 'images/val/0.png'
        self.main('analyze_attention', 'rank', '--device=cpu', *models, '--out-dir', self.out)
        return json.loads((self.out / 'rank.json').read_text())

    def compare_windows(self, path):
        options = f'--out-dir={self.out}', '--device=cpu', '--windows', '16/16'
        self.main('compare_windows', self.config, path, *options)
        return re.findall(r'^\| mean IoU .*', (self.out / 'windows.md').read_text(), re.M)

    def benchmark_runtimes(self, path):
        options = '--runtimes', 'pytorch', '--part', 'model', '--out-dir', self.out, '--test'
        self.main('benchmark_runtimes', self.config, '--checkpoint', path, *options, *SMALL)
        rows = (self.out / 'runtimes.md').read_text().splitlines()[4:]
        return [row.split(' | ')[-1] for row in rows]


READ = [
    # an export takes long
    pytest.param(name, marks=[pytest.mark.long] * (name == 'export'))
    for name in vars(Uses)
    if name[0] != '_' and name not in ('main', 'train')
]


@pytest.fixture
def weights(tiny_seg):
    """Weights of the whole model, which predicts both classes."""
    cfg = Config.fromfile(tiny_seg)
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    return model.state_dict()


@pytest.mark.parametrize('name', READ)
def test_weights_are_read(name, tool, tiny_seg, tiny_data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr('saga_mm.analysis.measure.SECONDS', 0)
    results = []
    for suffix in ('pth', 'safetensors'):
        path = tmp_path / f'weights.{suffix}'
        if suffix == 'pth':
            torch.save(weights, path)
        else:
            path.write_bytes(to_safetensors(weights, path))
        use = Uses(tool, tiny_seg, tiny_data, tmp_path / suffix)
        results.append(getattr(use, name)(path))
    assert results[0] == results[1]
    if name in ('load_from', 'init_cfg'):
        expected = {f: w.tolist() for f, w in weights.items() if f.startswith('backbone.')}
        assert results[0] == expected


def test_weights_of_a_training_are_written(tool, tiny_seg, tiny_data, tmp_path):
    Uses(tool, tiny_seg, tiny_data, tmp_path).train()
    trained, out = tmp_path / 'iter_1.pth', tmp_path / 'weights.safetensors'
    tool('convert_checkpoint').main([str(tiny_seg), str(trained), str(out)])
    expected, written = extract_state_dict(load_file(trained)), load_file(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
