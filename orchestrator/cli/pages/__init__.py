"""Results as text lines for people and as documents for programs."""
