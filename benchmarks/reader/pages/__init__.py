"""Pages of word pieces, and what is asked about them: procedural, seeded, without data files or a model."""
