"""UperNet, SAGA-T, from scratch: batch 8 x 1 CPU or GPU, 500 iterations, nuclei (2 classes).

`DATA_ROOT=/path/to/nuclei` names the folder of the data.
"""

_base_ = [
    './_base_/models/upernet_small.py',
    './_base_/datasets/nuclei.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    # Fluorescence images are dark; these are the mean and standard deviation of the training set.
    data_preprocessor=dict(size=(192, 192), mean=[13.0] * 3, std=[18.0] * 3),
    decode_head=dict(num_classes=2),
    auxiliary_head=dict(num_classes=2),
)
train_cfg = dict(max_iters=500)
