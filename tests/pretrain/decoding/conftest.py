"""What the tests of decoding share."""

import pytest
from tiny_models import FAMILIES, made


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return made(request.param)
