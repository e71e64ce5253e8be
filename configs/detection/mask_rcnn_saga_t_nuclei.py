"""Mask R-CNN, SAGA-T, from scratch: batch 4 x 1 CPU or GPU, 6 epochs, nuclei.

`DATA_ROOT=/path/to/nuclei` names the data. On a GPU, `--cfg-options train_cfg.max_epochs=36`
trains longer; the schedule follows.
"""

_base_ = [
    './_base_/models/mask_rcnn_small.py',
    './_base_/datasets/nuclei.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    # fluorescence images are dark: the mean and spread of the training set
    data_preprocessor=dict(mean=[13.0] * 3, std=[18.0] * 3),
    # nuclei are 10 to 130 pixels wide at 512x512: anchors of 12, 24, ..., 192 pixels
    rpn_head=dict(anchor_generator=dict(scales=[3])),
    roi_head=dict(
        bbox_roi_extractor=dict(finest_scale=28),
        bbox_head=dict(num_classes=1),
        mask_roi_extractor=dict(finest_scale=28),
        mask_head=dict(num_classes=1),
    ),
    # up to about 100 nuclei in an image
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000),
        rcnn=dict(max_per_img=300),
    ),
)
# linear layers over 6,272 features: at the rate that detectors are usually trained with
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'bbox_head': dict(lr_mult=0.1),
            # a custom key replaces flat_decay_mult
            'bbox_head.shared_fcs.0.bias': dict(lr_mult=0.1, decay_mult=0.0),
            'bbox_head.shared_fcs.1.bias': dict(lr_mult=0.1, decay_mult=0.0),
            'bbox_head.fc_cls.bias': dict(lr_mult=0.1, decay_mult=0.0),
            'bbox_head.fc_reg.bias': dict(lr_mult=0.1, decay_mult=0.0),
        }
    )
)
train_cfg = dict(max_epochs=6, val_interval=6)
default_hooks = dict(logger=dict(interval=10))
