"""RetinaNet, SAGA-T: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = [
    './_base_/models/retinanet.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/adamw_1x.py',
    './_base_/default_runtime.py',
]

optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
