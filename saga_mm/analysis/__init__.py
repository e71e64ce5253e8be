"""What models cost, and what their attention does."""
