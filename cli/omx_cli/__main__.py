"""`python -m omx_cli`: the same as `omx`."""

from omx_cli.entry import main

main()
