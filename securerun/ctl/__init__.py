"""The command securerunctl: one module a command, each loaded only when it is asked for."""
