"""RTMDet, SAGA-T: batch 2 x 8 GPUs, 3x (36 epochs), COCO.

The images and the schedule are those of the other detectors here, without the mosaics and the 300
epochs with which RTMDet is trained from scratch.
"""

_base_ = [
    './_base_/models/rtmdet.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/adamw_3x.py',
    './_base_/default_runtime.py',
]

# the levels share the convolutions of the head
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))
