"""Learning rates that fall from the head of a model to the stem of its backbone.

Source: arXiv 2106.08254 (BEiT), which fine-tunes so; the layers of a pyramid are chosen by us.
"""

from __future__ import annotations

from numbers import Real

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .joined_groups import join_groups

MULTIPLIERS = {
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
}
OPTIONS = {'decay_rate', 'custom_keys', 'bypass_duplicate', *MULTIPLIERS}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay for every backbone that numbers its layers, in any model.

    A backbone tells the layer of a parameter, and the number of layers, by `get_layer_depth`, as in
    mmpretrain; see `saga_mm.backbones.pyramid.PyramidBackbone.get_layer_depth`. Layers train at
    `lr * decay_rate ** (layers - 1 - layer)`, the last one at the full rate, as do heads and necks.
    Frozen parameters are left out.

    One-dimensional parameters (norms, biases, layer scales) have no weight decay, unless
    `flat_decay_mult` says otherwise. The table of groups is logged.

    Args:
        optim_wrapper_cfg (dict): As in mmengine's `DefaultOptimWrapperConstructor`; the optimizer
            must have an `lr`.
        paramwise_cfg (dict): `decay_rate` in (0, 1], and any of mmengine's options, which apply
            as well: `custom_keys`, `flat_decay_mult` (0 by default), `dwconv_decay_mult` (0 keeps
            depthwise convolutions, as of positional encodings, from decaying) and so on. An
            `lr_mult` multiplies the rate of the layer.

    Raises:
        ValueError: An option is unknown or wrong, a custom key fits no parameter, or the model has
            no backbone with `get_layer_depth`.
    """

    paramwise_cfg: dict

    def _validate_cfg(self) -> None:
        """Check the options, and set what is not given; called by mmengine."""
        options = self.paramwise_cfg
        if not isinstance(options, dict) or 'decay_rate' not in options:
            raise ValueError(f'paramwise_cfg must be a dict with decay_rate, got {options!r}')
        if unknown := sorted(options.keys() - OPTIONS):
            raise ValueError(f'paramwise_cfg must have keys of {sorted(OPTIONS)}, got {unknown}')
        rate = options['decay_rate']
        if not _is_number(rate) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate must be in (0, 1], got {rate!r}')
        if not _is_number(self.base_lr):
            raise ValueError(f'optimizer.lr must be a number, got {self.base_lr!r}')
        _check_multipliers('paramwise_cfg', {k: options[k] for k in options.keys() & MULTIPLIERS})
        for key, settings in options.get('custom_keys', {}).items():
            name = f'paramwise_cfg.custom_keys[{key!r}]'
            if not isinstance(settings, dict) or not settings.keys() <= {'lr_mult', 'decay_mult'}:
                raise ValueError(
                    f'{name} must be a dict with lr_mult or decay_mult, got {settings!r}'
                )
            _check_multipliers(name, settings)
        self.decay_rate = rate
        self.paramwise_cfg = {'flat_decay_mult': 0.0, **options}
        super()._validate_cfg()

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Append the groups of a module and of its children; mmengine calls it for each of them."""
        start = len(params)
        # one group per parameter
        super().add_params(params, module, prefix, is_dcn_module)
        get_layer_depth = getattr(module, 'get_layer_depth', None)
        if get_layer_depth is not None:
            names = {parameter: name for name, parameter in module.named_parameters()}
            for group in params[start:]:
                layer, layers = get_layer_depth(names[group['params'][0]])
                # A classifier of mmpretrain has the method too, and asks its backbone.
                if layer < layers - 1 and 'layer' not in group:
                    factor = self.decay_rate ** (layers - 1 - layer)
                    group.update(layer=layer, lr=group.get('lr', self.base_lr) * factor)
        if not prefix:
            self._check_model(params, module)
            params[:] = sorted(join_groups(map(self._settings, params)), key=_order)
            print_log(self._table(params), 'current')

    def _check_model(self, params: list[dict], model: nn.Module) -> None:
        if not any(hasattr(module, 'get_layer_depth') for module in model.modules()):
            raise ValueError(
                'the model must have a backbone with get_layer_depth, as those of saga_mm have, '
                f'got {type(model).__name__}'
            )
        names = [name for name, _ in model.named_parameters()]
        for key in self.paramwise_cfg.get('custom_keys', {}):
            if not any(key in name for name in names):
                raise ValueError(
                    'paramwise_cfg.custom_keys must be parts of names of parameters such as '
                    f'{names[0]!r}, got {key!r}'
                )

    def _settings(self, group: dict) -> dict:
        """A group with its layer, learning rate and weight decay, and no other settings."""
        settings = {
            'params': group['params'],
            'layer': group.get('layer'),
            'lr': group.get('lr', self.base_lr),
        }
        if self.base_wd is not None:
            settings['weight_decay'] = group.get('weight_decay', self.base_wd)
        return settings

    def _table(self, groups: list[dict]) -> str:
        rows = [f'{"layer":>5}  {"lr factor":>9}  {"weight decay":>12}  {"parameters":>10}']
        for group in groups:
            layer = 'rest' if group['layer'] is None else group['layer']
            factor = group['lr'] / self.base_lr if self.base_lr else 0.0
            decay = f'{group["weight_decay"]:g}' if 'weight_decay' in group else 'default'
            number = sum(tensor.numel() for tensor in group['params'])
            rows.append(f'{layer:>5}  {factor:>9.4g}  {decay:>12}  {number:>10,}')
        return '\n'.join([f'layer-wise lr decay, lr {self.base_lr:g}:', *rows])


def _order(group: dict) -> tuple:
    """Layers in order, then all else."""
    layer = group['layer']
    return layer is None, layer or 0, -group.get('weight_decay', 0), -group['lr']


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_multipliers(name: str, multipliers: dict) -> None:
    for key, value in multipliers.items():
        if not _is_number(value) or not value >= 0:
            raise ValueError(f'{name}.{key} must be a number from 0, got {value!r}')
