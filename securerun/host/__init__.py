"""This host as a launcher finds it: umask, accounts, interfaces, routes."""
