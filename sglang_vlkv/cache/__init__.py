"""The memory: slots and cells, who owns which rows, and what outlives its request."""
