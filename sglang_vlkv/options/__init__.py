"""What a server is asked: flags, options, what is refused."""
