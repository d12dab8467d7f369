"""A real language model that reads rendered pages, made from public parts by one command."""
