"""How many files a node may hold open."""

import resource

from omx_cli.running import OPEN_FILES_MAX, allow_many_files


def test_a_node_takes_as_many_open_files_as_the_system_allows_it_within_reason():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 512 if hard == resource.RLIM_INFINITY else min(512, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        allow_many_files()
        soft, unchanged = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert unchanged == hard
        assert soft == (
            OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
        )
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
