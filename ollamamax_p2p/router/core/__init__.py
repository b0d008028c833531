"""What the router decides; sans-IO."""
