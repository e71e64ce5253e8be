"""Same random numbers in every test, whatever runs before it."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
