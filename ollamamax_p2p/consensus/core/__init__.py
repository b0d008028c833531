"""Raft as a pure state machine: no clock, no disk, no network, no dice of its own.

Start at `raft.py`, whose head explains the algorithm; `raw_node.py` is what a program drives.
"""
