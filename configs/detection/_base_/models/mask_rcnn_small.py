"""Mask R-CNN on SAGA-T for training from scratch on small images, CPU included.

It has half the width and a quarter of the regions of `mask_rcnn.py`. The FPN and the heads have
group norm, because batches are small.
"""

_base_ = './mask_rcnn.py'

norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(drop_path_rate=0.05),
    neck=dict(out_channels=128, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=128, feat_channels=128),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128, fc_out_channels=512),
        mask_roi_extractor=dict(out_channels=128),
        mask_head=dict(in_channels=128, conv_out_channels=128, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=500),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
