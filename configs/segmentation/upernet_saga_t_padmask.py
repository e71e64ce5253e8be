"""UperNet, SAGA-T, that knows the padding of a batch: else like `upernet_saga_t.py`."""

_base_ = './upernet_saga_t.py'

model = dict(
    data_preprocessor=dict(type='saga_mm.MaskedSegDataPreprocessor'),
    backbone=dict(pad_mask=True),
)
