"""What several test files begin with."""
import os
import pytest

@pytest.fixture(scope="module")
def quick():
    "Nothing here has to outlive a power cut: files are not waited for."
    with pytest.MonkeyPatch.context() as m:
        for call in ("fsync", "fdatasync"): m.setattr(os, call, lambda fd: None)
        yield
