"""What a blob, a manifest, a name and a chunk map are; pure values and functions."""
