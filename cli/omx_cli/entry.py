"""What the console script calls. Ready for Ctrl-C and closed streams before it imports."""

import os
import sys


def main() -> None:
    """Run this process's command line, and end the process."""
    try:
        _open_missing_streams()
        from omx_cli.main import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("Error: interrupted\n")
        sys.exit(130)


def _open_missing_streams() -> None:
    """Where a standard stream is closed, the first files opened would get its number, and whatever
    is written to the stream would go into them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
