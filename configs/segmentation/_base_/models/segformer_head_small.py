"""SegFormer's head on SAGA-T with plain BN, for a single process on a GPU or a CPU."""

_base_ = './segformer_head.py'

model = dict(
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(norm_cfg=dict(type='BN', requires_grad=True)),
)
