"""Mask R-CNN, SAGA-T, from scratch: batch 4 x 1 CPU or GPU, 6 epochs, nuclei.

`DATA_ROOT=/path/to/nuclei` names the folder of the data. On a GPU, train longer with
`--cfg-options train_cfg.max_epochs=36`; the schedule adapts to the length.
"""

_base_ = [
    './_base_/models/mask_rcnn_small.py',
    './_base_/datasets/nuclei.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    # Fluorescence images are dark; these are the mean and standard deviation of the training set.
    data_preprocessor=dict(mean=[13.0] * 3, std=[18.0] * 3),
    # Nuclei are 10 to 130 pixels wide at 512x512, so anchors have 12, 24, ..., 192 pixels.
    rpn_head=dict(anchor_generator=dict(scales=[3])),
    roi_head=dict(
        bbox_roi_extractor=dict(finest_scale=28),
        bbox_head=dict(num_classes=1),
        mask_roi_extractor=dict(finest_scale=28),
        mask_head=dict(num_classes=1),
    ),
    # An image has up to about 100 nuclei.
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000),
        rcnn=dict(max_per_img=300),
    ),
)
# The box head has linear layers over 6,272 features. It gets a tenth of the learning rate, which is
# the rate that detectors are usually trained with.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'bbox_head': dict(lr_mult=0.1),
            # A custom key replaces flat_decay_mult, so the biases are named here.
            'bbox_head.shared_fcs.0.bias': dict(lr_mult=0.1, decay_mult=0.0),
            'bbox_head.shared_fcs.1.bias': dict(lr_mult=0.1, decay_mult=0.0),
            'bbox_head.fc_cls.bias': dict(lr_mult=0.1, decay_mult=0.0),
            'bbox_head.fc_reg.bias': dict(lr_mult=0.1, decay_mult=0.0),
        }
    )
)
train_cfg = dict(max_epochs=6, val_interval=6)
default_hooks = dict(logger=dict(interval=10))
