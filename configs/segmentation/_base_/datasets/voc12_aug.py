"""Pascal VOC 2012 with the additional labels (trainaug), 21 classes, 512x512 crops, 2 per GPU.

`DATA_ROOT` names the folder `VOCdevkit/VOC2012`, in which mmseg's
tools/dataset_converters/voc_aug.py has made `SegmentationClassAug`.
"""

_base_ = './ade20k.py'

dataset_type = 'PascalVOCDataset'
data_root = '{{$DATA_ROOT:data/VOCdevkit/VOC2012}}'
train_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='ImageSets/Segmentation/trainaug.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassAug'),
    ),
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='ImageSets/Segmentation/val.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    ),
)
test_dataloader = val_dataloader
