"""AdamW from scratch on a small data set: a few hundred to a few thousand iterations at batch 8."""

_base_ = './adamw_160k.py'

optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=8)
train_cfg = dict(max_iters=450, val_interval=450)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=450, max_keep_ckpts=1),
)
randomness = dict(seed=0)
