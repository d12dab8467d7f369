"""Pages of word pieces, and what is asked about them: procedural, seeded, without data files or a model.

``draw`` makes a page and its questions; ``splits`` says which of them train, tune and report;
``arrangements`` puts them into chats and ``grading`` judges what comes back. ``page`` is the contract
between them and whoever draws the cells.
"""
