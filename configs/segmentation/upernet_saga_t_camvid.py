"""UperNet, SAGA-T, from scratch: batch 8 x 1 CPU or GPU, 450 iterations, CamVid 160x224.

`DATA_ROOT=/path/to/camvid` names the folder of the data. On a GPU, train longer with
`--cfg-options train_cfg.max_iters=4000`; the schedule adapts to the length, also with `--resume`
after a shorter training.
"""

_base_ = [
    './_base_/models/upernet_small.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(160, 224)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
