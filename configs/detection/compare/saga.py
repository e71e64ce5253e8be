"""Small Mask R-CNN, SAGA of the widths of PVTv2-B0: batch 4, 6 epochs, nuclei.

The configs of this folder differ in the backbone only. `tools/compare_training.py` trains them.
`DATA_ROOT=/path/to/nuclei` names the folder of the data.
"""

_base_ = '../mask_rcnn_saga_t_nuclei.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SAGA',
        drop_path_rate=0.0,
        arch=dict(
            embed_dims=(32, 64, 160, 256),
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratios=(8, 8, 4, 4),
        ),
    ),
    neck=dict(in_channels=[32, 64, 160, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=128),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
)
