"""Asks Linux: its sockets, rules, processes, programs and files. Nothing here knows of securerun."""
