"""UperNet, SAGA-T, that masks padding; otherwise like `upernet_saga_t.py`."""

_base_ = './upernet_saga_t.py'

model = dict(
    data_preprocessor=dict(type='saga_mm.MaskedSegDataPreprocessor'),
    backbone=dict(pad_mask=True),
)
