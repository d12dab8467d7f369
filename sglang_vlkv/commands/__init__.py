"""What the package's command lines share: how they are given values, ask a server, read media, and end."""


class Problem(Exception):
    """What keeps a command from its work; a sentence for the person who gave it."""
