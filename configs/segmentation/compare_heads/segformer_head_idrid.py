"""SegFormer's head (64), SAGA of the widths of PVTv2-B0: batch 4, 300 iterations, IDRiD 256x256.

`upernet128_idrid.py` differs in the head only. Images and crops are those of `../compare_idrid`, at
a width of 1024. `DATA_ROOT=/path/to/idrid` names the folder of the data.
"""

_base_ = '../compare_idrid/saga.py'

# lesions are less than a hundredth of the pixels
class_weight = [0.3, 8.0, 4.0, 2.0, 6.0, 1.0]
model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SAGA',
        drop_path_rate=0.0,
        arch=dict(
            embed_dims=(32, 64, 160, 256),
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratios=(8, 8, 4, 4),
        ),
    ),
    decode_head=dict(
        in_channels=[32, 64, 160, 256],
        channels=64,
        loss_decode=dict(class_weight=class_weight),
    ),
)
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_iters=300, val_interval=300)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(checkpoint=dict(interval=300))
