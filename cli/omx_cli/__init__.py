"""omx: the command line over `ollamamax_p2p`. Draws and asks; decides nothing. Start at `main`.

Commands import what they need when they run: `omx --help` must not pay for a network library.
"""
