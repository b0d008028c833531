"""What a download decides: which chunk of whom next, when to give up on a source. Pure."""
