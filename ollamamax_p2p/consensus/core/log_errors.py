"""What a log answers when it does not have what it is asked for. Between core and storage only."""


class Compacted(LookupError):
    """The index lies before the first that is kept; a snapshot covers it."""


class Unavailable(LookupError):
    """The index lies behind the last entry."""


class SnapshotTemporarilyUnavailable(LookupError):
    """No snapshot can be given now; ask again."""
