"""One training that nobody disturbs, for all that are disturbed to be compared with."""

import pytest
from jobs import job


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of the job with its default settings, trained by one process from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    job(folder).run()
    return folder
