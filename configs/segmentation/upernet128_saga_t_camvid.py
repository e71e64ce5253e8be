"""UperNet (128), SAGA-T, from scratch: batch 8 x 1 CPU or GPU, 450 iterations, CamVid 160x224.

`DATA_ROOT=/path/to/camvid` names the folder of the data.
"""

_base_ = [
    './_base_/models/upernet128_small.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(160, 224)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
