"""Building the model of a config."""

import pytest
from mmengine.config import Config
from mmengine.model import BaseModel

from saga_mm.apis import build_model


class ReturnsNothing(BaseModel):
    """Like some models of mmdet, whose `train` returns nothing."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return inputs


def test_a_model_is_in_eval_mode_whatever_its_train_returns():
    model = build_model(Config(dict(model=dict(type=ReturnsNothing))))
    assert isinstance(model, ReturnsNothing)
    assert not model.training


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="must be a registered model, got 'Nothing'"):
        build_model(Config(dict(model=dict(type='Nothing'), default_scope='mmdet')))
