"""Mask R-CNN, SAGA-T, that masks padding; otherwise like `mask_rcnn_saga_t.py`."""

_base_ = './mask_rcnn_saga_t.py'

model = dict(
    data_preprocessor=dict(type='saga_mm.MaskedDetDataPreprocessor'),
    backbone=dict(pad_mask=True),
)
