"""These tensors are tiny: one thread is faster than waiting for a second on a busy machine."""

import os

import headstats
import pytest
import torch
from headstats.cpu import build, library
from headstats.cpu import self_test as trial
from headstats_jobs import Jobs


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled_library(tmp_path_factory):
    """The compiled CPU backend: the one that is there, or one built for this session. Skips without a compiler."""
    if trial.failure(torch.float32) is not None:
        try:
            build.compiler()
        except build.BuildError as error:
            pytest.skip(f"the compiled CPU backend was not tested: {error}")
        os.environ["HEADSTATS_CACHE"] = str(tmp_path_factory.mktemp("compiled"))
        build.build()
        library.find.cache_clear()
        trial.cached_failure.cache_clear()
    assert trial.failure(torch.float32) is None


@pytest.fixture
def attend_compiled(compiled_library):
    """attend with backend="compiled"; skips, with its words, what that backend says it does not do."""

    def attend(*qkv, **options):
        try:
            return headstats.attend(*qkv, backend="compiled", **options)
        except NotImplementedError as error:
            pytest.skip(str(error))

    return attend


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    """``jobs[name]``: a finished process of `headstats_jobs`.

    The first test of a file that asks starts all jobs that the file's collected tests name by their parameter ``job``.
    """
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    wanted = {call.params["job"] for call in calls if call is not None and "job" in call.params}
    running = Jobs(wanted, tmp_path_factory.mktemp("triton"))
    yield running
    running.close()
