"""DeepLabV3+ on SAGA-T: atrous pyramid pooling at stride 32, refined with the map of stride 4.

The dilations are those of DeepLabV3+ at stride 16, divided by two.
"""

_base_ = './upernet.py'

model = dict(
    # nothing would read the map of stride 8
    backbone=dict(out_indices=(0, 2, 3)),
    decode_head=dict(
        _delete_=True,
        type='DepthwiseSeparableASPPHead',
        in_channels=512,
        in_index=2,
        channels=256,
        dilations=(1, 3, 6, 9),
        c1_in_channels=64,
        c1_channels=48,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=dict(in_index=1),
)
