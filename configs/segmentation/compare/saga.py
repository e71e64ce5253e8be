"""SegFormer's head, SAGA of the widths of PVTv2-B0: batch 8, 450 iterations, CamVid 160x224.

The configs of this folder differ in the backbone only. `tools/compare_training.py` trains them.
`DATA_ROOT=/path/to/camvid` names the folder of the data.
"""

_base_ = '../segformer_head_saga_t_camvid.py'

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
    decode_head=dict(in_channels=[32, 64, 160, 256], channels=64),
)
# The last third of the validation images, frames of one video in order, is kept for the test.
val_dataloader = dict(dataset=dict(indices=list(range(67))))
test_dataloader = dict(dataset=dict(indices=list(range(67, 101))))
