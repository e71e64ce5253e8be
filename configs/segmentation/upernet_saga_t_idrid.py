"""UperNet, SAGA-T, from scratch: batch 8 x 1 CPU or GPU, 450 iterations, IDRiD 512x512.

`DATA_ROOT=/path/to/idrid` names the folder of the data.
"""

_base_ = [
    './_base_/models/upernet_small.py',
    './_base_/datasets/idrid.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=6),
    auxiliary_head=dict(num_classes=6),
)
