"""AdamW from scratch on a small data set: some epochs at batch 64."""

_base_ = './adamw_300e.py'

optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=0, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=64)
train_cfg = dict(max_epochs=20, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1, save_best=None))
custom_hooks = []
randomness = dict(seed=0)
