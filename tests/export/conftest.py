"""What tests of exports share."""

import pytest
from exports import FEATURES, LATENTS
from models import LinearGaussian


@pytest.fixture
def oracle() -> LinearGaussian:
    """Its posterior is a product of normals."""
    return LinearGaussian.random_weights(FEATURES, LATENTS, orthogonal=True)
