"""Results of verbs: as lines of text for people, and as documents for programs."""
