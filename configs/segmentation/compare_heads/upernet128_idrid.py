"""UperNet (128), SAGA of the widths of PVTv2-B0, IDRiD."""

_base_ = './segformer_head_idrid.py'

norm_cfg = dict(type='BN', requires_grad=True)
class_weight = {{_base_.class_weight}}
model = dict(
    decode_head=dict(
        _delete_=True,
        type='UPerHead',
        in_channels=[32, 64, 160, 256],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=128,
        dropout_ratio=0.1,
        num_classes=6,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0, class_weight=class_weight),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=160,
        in_index=2,
        channels=128,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=6,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4, class_weight=class_weight),
    ),
)
