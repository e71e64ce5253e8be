"""Lets torchvision be imported where its compiled operators can't be loaded.

The wheels of torchvision on PyPI are for a torch with CUDA. Beside a torch without it, the import
fails, because it adds to two operators that are not there. This folder on PYTHONPATH declares them.
mmpretrain needs only transforms of torchvision, and none of its operators.
"""

import sys


class Declare:
    """A finder that finds nothing, but declares the operators when torchvision is first sought."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != 'torchvision':
            return
        sys.meta_path.remove(self)
        from torch.library import Library

        self.library = Library('torchvision', 'DEF')
        for op in ('nms', 'qnms'):
            self.library.define(f'{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        # A library removes its operators when it is freed.
        sys.modules[__name__].declared = self.library


sys.meta_path.insert(0, Declare())
