"""Looks at a folder of data, and writes a config that trains on it."""

from .detection import survey_detection
from .segmentation import survey_segmentation
from .survey import Survey

__all__ = ['Survey', 'survey_detection', 'survey_segmentation']
