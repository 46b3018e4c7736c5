"""Text to instructions and back, in the dialects that people already read."""
