"""UperNet, RAVLT-T: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512.

To start from the published ImageNet weights, add
`--cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE`.
"""

_base_ = './upernet_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='tiny', norm_cfg=dict(type='SyncBN')),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
