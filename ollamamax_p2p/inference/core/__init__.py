"""What is asked of an engine and what it answers, the same for all; sans-IO."""
