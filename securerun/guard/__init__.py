"""The privileged side: the process that holds a lease, and how a launcher speaks to it. Standard library alone."""
