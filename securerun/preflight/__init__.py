"""Preflight: what of a host and a launch departs from the hardening advice, or would keep the job from running."""
