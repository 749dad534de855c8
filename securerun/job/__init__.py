"""The job: its command line, its ports, and who its peers are. Nothing here needs privilege."""
