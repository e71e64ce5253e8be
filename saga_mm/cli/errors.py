"""Errors of the command-line tools, in one line."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from traceback import extract_tb, walk_tb
from types import TracebackType
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DefaultScope, build_from_cfg
from mmengine.structures import BaseDataElement

from ..engine.classes import describe_empty
from ..stack import StackError, describe_missing_ops, describe_missing_toolbox
from .suggest import suggest_argument, suggest_type
from .types import name_of

# mistakes of the user; anything else may be a fault of the program
EXPECTED = (OSError, StackError, ValueError)
# what to say about errors of others, by their text
HINTS = {
    "unexpected keyword argument 'pretrained'": (
        "model.pretrained of a base config is for that config's backbone: set pretrained=None in "
        "model, and init_cfg=dict(type='Pretrained', checkpoint=FILE) in the backbone"
    ),
    "^(KeyError: )?(KeyError: )?'?mask'?$": (
        "an object has no mask ('segmentation' in a COCO file), which a mask head and "
        'LoadAnnotations(with_mask=True) need'
    ),
    'operator torchvision::': (
        'torchvision was built for another torch: install both from the same index, such as '
        'https://download.pytorch.org/whl/cpu'
    ),
    'NoneType takes no arguments': (
        'mmpretrain, which mmdet imports if it is installed, does not work with transformers 5: '
        "run pip install 'transformers<5', or uninstall one of them"
    ),
    r'to have \d+ channels, but got \d+ channels': (
        "in_channels of a neck or head must be the widths of the backbone's maps, and those of the "
        'backbone the channels of the images'
    ),
    'Cannot find valid image': (
        'the pipeline leaves no sample: see whether the classes of the data set have the names of '
        'its annotations, and which objects its filters and crops keep'
    ),
}
# what Python says about text that is no number, without a word about whose it is
CONVERSION = re.compile('invalid literal for int|could not convert string to float')
# what errors say about a name that the toolbox of the config would register
UNREGISTERED = r'is not in the mm\w+::|must be a registered model|No module named'


class command_line:
    """Context of a tool's work: an error ends the program with one line and exit status 1.

    Args:
        debug (bool): Let the error through, with its traceback.
    """

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        # a log that can't be written, as on a full disk, is no reason for a traceback of its own
        self.raises, logging.raiseExceptions = logging.raiseExceptions, self.debug

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        logging.raiseExceptions = self.raises
        if _is_interrupted(error) and not self.debug:
            print('interrupted', file=sys.stderr)
            sys.exit(130)
        if isinstance(error, Exception) and not self.debug:
            sys.exit(f'error: {describe(error)}')


def describe(error: Exception) -> str:
    """An error in one line, with the file that it came from if it came from data."""
    if isinstance(error, ImportError) and error.name == 'mmcv._ext':
        return describe_missing_ops()
    file, empty, told = _look_into(error)
    near = _nearest(error)
    if empty is not None:
        return describe_empty(empty)
    if isinstance(error, OSError) and error.strerror:
        message = ': '.join(str(part) for part in (error.strerror, error.filename) if part)
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])
    else:
        message = text_of(error)
    in_worker = message.startswith('Caught ') and 'in DataLoader worker process' in message
    if in_worker:
        # below the traceback of the other process
        message = message.rstrip().rpartition('\n')[2]
        file = 'while reading data in a worker; with num_workers=0 the file is named'
    if 'gloo/transport' in message:
        return (
            'the connection to another process of this run is lost: that one has ended, see its '
            'own error'
        )
    message = textwrap.shorten(message, 1000, placeholder=' ...')
    kind = '' if in_worker else f'{type(error).__name__}: '
    if file is None and (not isinstance(error, EXPECTED) or CONVERSION.match(message)):
        file = _arguments(error)
    told += [hint for pattern, hint in HINTS.items() if re.search(pattern, kind + message)]
    if re.search(UNREGISTERED, message) and (scope := DefaultScope.get_current_instance()):
        told += filter(None, [describe_missing_toolbox(scope.scope_name)])
    message = '; '.join([message, *told]) + near + (f' ({file})' if file else '')
    if isinstance(error, EXPECTED) and message:
        return message
    return f'{kind}{message} (run with --debug for the traceback)'


def text_of(error: Exception) -> str:
    """What an error says; of an assertion that says nothing, such as those of necks, its line."""
    frames = extract_tb(error.__traceback__)
    is_silent = isinstance(error, AssertionError) and not str(error) and frames
    return frames[-1].line or '' if is_silent else str(error)


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether an error comes of Ctrl-C: mmengine makes a SyntaxError of it in places."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _nearest(error: Exception) -> str:
    """What a mistyped type or argument may stand for, from the object that was being built."""
    built = _built(error)
    if not built:
        return ''
    kind, registry = built.get('obj_type'), built['registry']
    if isinstance(error, KeyError) and isinstance(kind, str) and 'obj_cls' in built:
        return suggest_type(kind, registry) if built['obj_cls'] is None else ''
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return suggest_argument(unknown[1], built.get('obj_cls')) if unknown else ''


def _built(error: Exception) -> dict[str, Any]:
    """The variables of mmengine's function that was building an object, the innermost one."""
    built: dict[str, Any] = {}
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is build_from_cfg.__code__:
            built = frame.f_locals
    return built


def _arguments(error: Exception) -> str | None:
    """The class that was being built, with those of its arguments that a config writes out."""
    built = _built(error)
    if built.get('obj_cls') is None or 'keyword argument' in str(error):
        return None
    simple = int | float | str | list | tuple
    given = [
        f'{key}={value!r}' for key, value in built['args'].items() if isinstance(value, simple)
    ]
    short = ', '.join(text for text in given if len(text) < 80)
    name = name_of(built['obj_cls'])
    return f'while building {name}({textwrap.shorten(short, 300, placeholder=" ...")})'


def _look_into(error: Exception) -> tuple[str | None, BaseDataset | None, list[str]]:
    """What the frames of an error tell: a file, a data set that is empty, what else to say."""
    file = None
    told = []
    for frame, _ in walk_tb(error.__traceback__):
        name, variables = frame.f_code.co_name, frame.f_locals
        owner = variables.get('self')
        # mmengine fails to store an empty list
        if name == '_serialize_data' and isinstance(owner, BaseDataset) and not owner.data_list:
            return None, owner, []
        if name == 'transform' and (paths := _paths(variables.get('results'))):
            file = f'while reading {paths}'
        elif name == 'process' and (paths := _paths(variables.get('data_sample'))):
            file = f'while evaluating {paths}'
        # pycocotools'
        elif isinstance(variables.get('annotation_file'), str):
            file = f'while reading {variables["annotation_file"]}'
        elif name == 'results2json' and owner is not None:
            label, number = variables.get('label', -1), len(owner.cat_ids)
            if label >= number:
                told = [
                    f'the model predicts class {label}, and the data set has {number} classes: set '
                    'num_classes of the heads'
                ]
    return file, None, told


def _paths(sample: object) -> str:
    """The files of a sample in the pipeline of its data, or of one that is evaluated."""
    if not isinstance(sample, (dict, BaseDataElement)):
        return ''
    return ' and '.join(str(path) for path in map(sample.get, ('img_path', 'seg_map_path')) if path)
