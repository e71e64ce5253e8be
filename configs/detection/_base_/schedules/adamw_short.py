"""AdamW from scratch on a small data set: some epochs at batch 4.

`PolyLR` has no `end`, so it ends with the training. `train_cfg.max_epochs` alone sets the length.
"""

_base_ = './adamw_1x.py'

optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=4)
randomness = dict(seed=0)
