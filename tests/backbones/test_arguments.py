"""Arguments of a wrong type, as configs and command lines have them, end in one line."""

import re

import numpy as np
import pytest

from saga_mm import RAVLT, SAGA, SoLAVision

SMALL = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2))


@pytest.mark.parametrize(
    ('kind', 'name', 'value', 'expected'),
    [
        (SAGA, 'in_channels', 3.0, 'an int'),
        (SAGA, 'out_indices', 1.5, 'increasing stage numbers from 0 to 3'),
        (SAGA, 'drop_path_rate', '0.1x', 'a number'),
        (SAGA, 'lepe_kernel_size', 'abc', 'an int'),
        (SAGA, 'qk_norm', 'abc', 'two numbers, gain and bias, or None'),
        (SAGA, 'layer_scale', 'abc', 'a number or None'),
        (SAGA, 'norm_cfg', 'LN', 'a dict'),
        (SAGA, 'with_cp', 'false', 'True or False'),
        (SAGA, 'pad_mask', 3, 'True or False'),
        (SAGA, 'init_cfg', 'weights.pth', 'a dict or a list or None'),
        (SAGA, 'init_cfg', dict(checkpoint='a.pth'), "a type, such as 'Pretrained'"),
        (RAVLT, 'drop_path_rate', 'abc', 'a number or None'),
        (RAVLT, 'norm_eval', 'no', 'True or False'),
        (SoLAVision, 'token_shift', 1, 'a string or None'),
    ],
)
def test_a_wrong_type_is_named(kind, name, value, expected):
    with pytest.raises(ValueError) as error:
        kind(**{name: value})
    assert re.match(f'{name} must (be|have) {expected}, got ', str(error.value))
    assert repr(value) in str(error.value)


def test_positional_arguments_are_checked():
    with pytest.raises(ValueError, match="in_channels must be an int, got 'rgb'"):
        SAGA(SMALL, 'rgb')


def test_what_works_is_allowed():
    SAGA(
        SMALL,
        in_channels=1,
        out_indices=range(2),
        drop_path_rate=np.float32(0.1),
        layer_scale=1,
        lepe_kernel_size=np.int64(3),
        pad_mask=1,
        with_cp=0,
        init_cfg=[dict(type='Constant', layer='Linear', val=0.0)],
    )
    RAVLT(SMALL, out_indices=[0, 1], layer_scale=[1.0, 0.5])


class Own(SAGA):
    """A subclass with annotations that are not of use when a program runs."""

    def __init__(self, arch: str, extra: 'Unknown' = 'anything') -> None:  # noqa: F821
        super().__init__(arch, out_indices=1)
        self.extra = extra


def test_subclasses_have_arguments_of_their_own():
    assert Own(SMALL).extra == 'anything'
    with pytest.raises(TypeError, match='unknown'):
        SAGA(SMALL, unknown=1)
