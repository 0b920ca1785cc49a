"""A GPU's first day: everything that only a GPU can say, in one command of a few minutes."""
