"""UperNet on SAGA-T with narrow heads and plain BN, for a single process on a GPU or a CPU."""

_base_ = './upernet.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(channels=64, norm_cfg=norm_cfg),
)
